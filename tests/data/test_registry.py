"""The registry of data sets: config, data, tasks and reports read it, so that a new data set is right everywhere."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from seqpe_jax import config, tasks
from seqpe_jax.data import images, qa, registry, tokenizers, tokens
from seqpe_jax.data.datasets.image_base import ImageBuilder
from seqpe_jax.data.datasets.qa_base import QABuilder, Question
from seqpe_jax.data.registry import DATA_IMAGE, DATA_QA, DATA_TEXT, Dataset
from seqpe_jax.errors import InputError
from seqpe_jax.reporting.study import Run
from seqpe_jax.tasks.metrics import answer_metrics

MODEL = {"layers": 1, "width": 16, "heads": 2}
NO_POSITIONS = {
    "encoding": {"kind": "none"},
    "objective": {"contrastive": {"weight": 0.0}, "distillation": {"weight": 0.0}},
}


class ToySums(QABuilder):
    """Sums, whose answers are code: -1 is not 1."""

    VERSION = tfds.core.Version("1.0.0")
    PROMPT_SUFFIX = "{}"

    @classmethod
    def sources(cls, paths):
        return ["toy"]

    def questions(self):
        made = [Question("toy", f"{n} - 9 = {n - 9}", f"{n} - 9 =", "sum", (str(n - 9),)) for n in range(20)]
        return {"train": made[:16], "validation": made[16:18], "test": made[18:]}

    @staticmethod
    def leaks_answer(text, question, answers):
        return False


class ToyStripes(ImageBuilder):
    """Videos of two frames, of three classes."""

    VERSION = tfds.core.Version("1.0.0")
    CLASS_NAMES = ("a", "b", "c")

    @classmethod
    def sources(cls, paths):
        return ["toy"]

    def images(self):
        made = [(np.full((2, 4, 4, 1), 40 * label, np.uint8), label) for label in (0, 1, 2)]
        return {"train": made, "validation": made, "test": made}


QA_SET = Dataset("toy_sums", DATA_QA, f"{__name__}:ToySums", paths="none", answers="code")
VIDEO_SET = Dataset(
    "toy_stripes",
    DATA_IMAGE,
    f"{__name__}:ToyStripes",
    paths="none",
    size=(2, 4, 4),
    video=True,
    channels=1,
    mean=(0.2,),
    std=(0.1,),
    num_classes=3,
)


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setattr(registry, "DATASETS", dict(registry.DATASETS))
    monkeypatch.setattr("seqpe_jax.reporting.study.DATASETS", registry.DATASETS)
    registry.register(QA_SET)
    registry.register(VIDEO_SET)


def test_every_data_set_has_its_class():
    for name, dataset in registry.DATASETS.items():
        assert registry.load_builder(name, dataset.kind).name == name
    with pytest.raises(ValueError, match="'qa_jsonl' is registered already"):
        registry.register(registry.get("qa_jsonl"))


@pytest.mark.parametrize(
    "source,kind", [(tokens.token_source, "text"), (qa.qa_source, "questions"), (images.image_source, "images")]
)
def test_a_data_set_of_another_kind_is_refused(source, kind, tmp_path):
    options = {"split": "train", "cache_dir": tmp_path}
    if kind != "images":
        options["tokenizer"] = tokenizers.ByteTokenizer()
    if kind == "questions":
        options["length"] = 64
    for name, dataset in registry.DATASETS.items():
        if dataset.kind != kind:
            with pytest.raises(InputError, match=f"'{name}' .* is {dataset.kind}, but this run needs {kind}: choose "):
                source(name, **options)
        elif dataset.paths == "none":
            with pytest.raises(InputError, match=f"'{name}' takes no data.paths; .* data.name='"):
                source(name, paths=("x",), **options)
        elif dataset.paths != "optional":
            with pytest.raises(InputError, match=f"'{name}' needs .*data.paths.*: give .*"):
                source(name, **options)
    with pytest.raises(InputError, match="unknown data set 'digits_images' .*Did you mean 'digit_images'"):
        source("digits_images", **options)


def test_a_new_question_set_is_right_everywhere(toys, tmp_path):
    """It was reported as text, and its answers were scored as prose, before the registry."""
    data = {"name": "toy_sums", "length": 64, "cache_dir": str(tmp_path), "question_weight": 0.1}
    settings = config.from_dict(NO_POSITIONS | {"model": MODEL, "data": data, "eval": {"examples": 2}})
    assert settings.is_qa and not settings.is_image and settings.data_kind == DATA_QA
    assert tasks.task_class(settings) is tasks.QuestionAnswering
    assert tasks.QuestionAnswering.training_metrics(settings) == ("loss", "contains", "exact_match_strict")
    assert answer_metrics("toy_sums") == answer_metrics("stdlib_qa")
    source = tasks.QuestionAnswering(settings).questions("train", 64)
    assert len(source) == 16 and source[0]["outputs"] == ("-9",)
    run = Run("toy", config.to_dict(settings), [{"step": 1, "train/tokens_per_second": 5.0}], {}, None, None)
    assert run.data_kind == "questions" and run.per_second == 5.0 and run.dataset.answers == "code"
    with pytest.raises(InputError, match="'toy_sums' takes no data.paths"):
        config.from_dict(NO_POSITIONS | {"data": data | {"paths": ("x",)}})


def test_a_new_image_set_is_right_everywhere(toys, tmp_path):
    data = {"name": "toy_stripes", "size": (2, 4, 4), "cache_dir": str(tmp_path)}
    page = NO_POSITIONS | {"model": MODEL | {"kind": "vit", "patch": (1, 2, 2)}}
    settings = config.from_dict(page | {"data": data})
    assert settings.is_image and settings.grid == (2, 2, 2)
    task = tasks.task_class(settings)(settings)
    spec = task.data_spec
    assert (spec.classes, spec.channels, spec.mean, spec.std) == (3, 1, (0.2,), (0.1,))
    assert [task.source("test")[n]["label"] for n in range(3)] == [0, 1, 2]
    run = Run("toy", config.to_dict(settings), [{"step": 1, "train/images_per_second": 5.0}], {}, None, None)
    assert run.data_kind == "images" and run.per_second == 5.0
    with pytest.raises(InputError, match=r"data.size must be \(frames, height, width\)"):
        config.from_dict(page | {"data": data | {"size": (4, 4)}})
    with pytest.raises(
        InputError, match="data.bit_depth=12 is not read by data.name='toy_stripes', only by image_folder"
    ):
        config.from_dict(page | {"data": data | {"bit_depth": 12}})


def test_names_in_configs_and_in_reports():
    assert config.from_dict({}).data_kind == DATA_TEXT
    with pytest.raises(InputError, match="config field 'data.name' is 'toy_sums'.* Known: algorithmic, digit_images, "):
        config.from_dict({"data": {"name": "toy_sums"}})
    for name, size, kind in (
        ("elsewhere", (), "text"),
        ("elsewhere", (8, 8), "images"),
        ("squad_long", (), "questions"),
    ):
        run = Run("r", {"data": {"name": name, "size": size}}, [], {}, None, None)
        assert run.data_kind == kind, "a report reads runs of data sets that are not registered here"
