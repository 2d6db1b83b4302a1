"""Class names are stored with a run, and give labels their meaning when it resumes or is evaluated."""

import json

import numpy as np
import pytest
from PIL import Image

from seqpe_jax import config
from seqpe_jax.errors import InputError
from seqpe_jax.tasks.base import EvalContext
from seqpe_jax.tasks.image_classification import CLASS_NAMES_FILE, ImageClassification
from tests.inference.test_export import vit_config


def write_images(root, *classes, split="train"):
    """Writes an image of each class; returns the root."""
    for shade, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 40 * shade, np.uint8)).save(root / split / name / "1.png")
    return root


def task_of(root, run_dir="", **fields):
    return ImageClassification(
        vit_config(data__name="image_folder", data__paths=(str(root),), **fields), run_dir=run_dir
    )


def labels(data, split="train"):
    source = data.source(split)
    return {name: source[index]["label"] for index, (name, *_) in enumerate(source.records.status)}


@pytest.fixture
def run(tmp_path):
    """The folder of a run on ants, cats and dogs."""
    (tmp_path / "run").mkdir()
    task_of(write_images(tmp_path / "photos", "ant", "cat", "dog")).save_assets(tmp_path / "run")
    return tmp_path / "run"


def test_names_are_stored_in_the_order_of_their_labels(run, tmp_path):
    assert json.loads((run / CLASS_NAMES_FILE).read_text()) == ["ant", "cat", "dog"]
    data = task_of(write_images(tmp_path / "others", "dog", "cat"), run)
    assert labels(data) == {"cat/1.png": 1, "dog/1.png": 2}, "a class may be missing"
    assert data.data_spec.classes == 3 and "3 classes" in data.describe()
    data.check_assets(run)
    (tmp_path / "next").mkdir()
    data.save_assets(tmp_path / "next")
    assert (tmp_path / "next" / CLASS_NAMES_FILE).read_text() == (run / CLASS_NAMES_FILE).read_text()
    assert (
        data.export_signature((4, 4)).output == ("batch", "3")
        and CLASS_NAMES_FILE in data.export_signature((4, 4)).meaning
    )


def test_without_stored_names_labels_are_indices_in_sorted_order(tmp_path):
    (tmp_path / "old").mkdir()
    data = task_of(write_images(tmp_path / "photos", "dog", "cat"), tmp_path / "old")
    data.check_assets(tmp_path / "old")
    assert labels(data) == {"cat/1.png": 0, "dog/1.png": 1} and data.class_names == ("cat", "dog")


def test_a_class_that_the_run_does_not_know_is_refused_by_name(run, tmp_path):
    (tmp_path / "photos" / "train" / "cat").rename(tmp_path / "photos" / "train" / "zcat")
    data = task_of(tmp_path / "photos", run)
    with pytest.raises(
        InputError, match=f"has class zcat, unknown to the run of {run}, whose classes are ant, cat, dog"
    ):
        data.check_eval_size((8, 8), "train")


def test_other_classes_than_the_stored_ones_are_refused(run, tmp_path):
    with pytest.raises(InputError, match=rf"label 1 is 'cow' in the data, but 'cat' in the run of {run} \(its clas"):
        task_of(write_images(tmp_path / "one", "ant", "cow", "dog")).check_assets(run)
    with pytest.raises(InputError, match="label 2 is 'no class' in the data, but 'dog' in the run"):
        task_of(write_images(tmp_path / "two", "ant", "cat")).check_assets(run)
    with pytest.raises(InputError, match="model.classes=2 is less than the 3 classes of the run of .*: set it to 3"):
        task_of(tmp_path / "photos", run, model__classes=2)
    assert task_of(tmp_path / "photos", run, model__classes=5).data_spec.classes == 5


@pytest.mark.parametrize("content", ["", "{}", "[]", '["ant", 1]'])
def test_damaged_names_are_refused(run, tmp_path, content):
    (run / CLASS_NAMES_FILE).write_text(content)
    with pytest.raises(InputError, match=r"classes.json .*: put back the file that the run wrote"):
        task_of(tmp_path / "photos", run)


def test_names_may_be_any_bytes(tmp_path):
    data = task_of(write_images(tmp_path / "photos", "caf\udce9", "ü"))
    data.save_assets(tmp_path)
    assert task_of(tmp_path / "photos", tmp_path).class_names == data.class_names == ("caf\udce9", "ü")


def test_digits_go_by_name_too(run, tmp_path):
    (tmp_path / "digits").mkdir()
    digits = vit_config(data__cache_dir=str(tmp_path / "cache"))
    ImageClassification(digits).save_assets(tmp_path / "digits")
    drawn = task_of(write_images(tmp_path / "drawn", "7", "3"), tmp_path / "digits")
    assert labels(drawn) == {"3/1.png": 3, "7/1.png": 7} and drawn.data_spec.classes == 10
    with pytest.raises(InputError, match="digit_images/train has classes 0, 1, .*, unknown to the run of"):
        ImageClassification(config.from_dict(config.to_dict(digits)), run_dir=run).source("train")


def test_an_evaluation_decodes_the_rows_of_this_process_alone(tmp_path, monkeypatch):
    """The others' results come back with the whole batch from the devices."""
    task = ImageClassification(vit_config(data__cache_dir=str(tmp_path / "cache"), data__threads=2))
    source, read, received = task.source("test"), [], []
    original = type(source).__getitem__

    def recorded(self, index):
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(type(source), "__getitem__", recorded)

    def eval_step(batch):
        received.append(batch)
        first = np.zeros((16, 1), int)
        return {
            "loss": np.zeros(16),
            "rank": np.arange(16) % 2,
            "labels": first[:, 0],
            "classes": first,
            "probabilities": first,
        }

    def put_local_rows(batch):
        assert batch["images"].dtype == np.uint8 and batch["images"].shape == (8, 8, 8, 1)
        return batch

    ctx = EvalContext(
        eval_step, None, None, 16, local_rows=lambda count: range(0, count, 2), put_local_rows=put_local_rows
    )
    result = task.evaluate(ctx, (8, 8), "test")
    count = len(source)
    assert result["examples"] == count and len(received) == -(-count // 16)
    own = [index for index in range(count) if index % 16 % 2 == 0]
    assert sorted(set(read)) == own and len(read) <= len(own) + 1, "one more at most, for the shape of padding"
    labels = np.concatenate([batch["labels"] for batch in received])[: len(own)]
    assert labels.tolist() == [int(source.records[index]["label"]) for index in own]
