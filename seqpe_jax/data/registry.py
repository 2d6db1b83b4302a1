"""The registry of data sets and their properties, read by config, data, tasks and reports. Light: it imports no library.

A new data set is one builder class and one `register(Dataset(...))`; docs/extending.md shows both.
"""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from seqpe_jax.errors import InputError, suggest

Kind = Literal["text", "questions", "sequences", "images"]

# Kinds of data; `of` of a config field names those whose runs read it.
DATA_TEXT: Kind = "text"
DATA_QA: Kind = "questions"
DATA_SEQUENCES: Kind = "sequences"
DATA_IMAGE: Kind = "images"
TOKENIZED = (DATA_TEXT, DATA_QA)  # text that a tokenizer reads
TEXT_LIKE = (*TOKENIZED, DATA_SEQUENCES)  # read as tokens
IMAGE_LIKE = (DATA_IMAGE,)  # read as pixels; videos are among them

# Unit in which the throughput of a run is counted, by kind of data.
COUNT_NAMES: dict[str, str] = {
    DATA_TEXT: "tokens",
    DATA_QA: "tokens",
    DATA_SEQUENCES: "tokens",
    DATA_IMAGE: "images",
}
# Data set that reads a user's own files, by kind of data.
OWN_FILES: dict[str, str] = {
    DATA_TEXT: "text",
    DATA_QA: "squad_long",
    DATA_SEQUENCES: "qa_jsonl",
    DATA_IMAGE: "image_folder",
}

# Task of data.name='algorithmic' -> symbols of its input and, at most, of its output, at a length.
ALGORITHMIC_TASKS: dict[str, tuple[Callable[[int], int], Callable[[int], int]]] = {
    "even_pairs": (lambda n: n, lambda n: 1),
    "modular_arithmetic": (lambda n: n - 1 + n % 2, lambda n: 1),
    "parity_check": (lambda n: n, lambda n: 1),
    "cycle_navigation": (lambda n: n, lambda n: 1),
    "stack_manipulation": (lambda n: n, lambda n: n + 1),
    "reverse_string": (lambda n: n, lambda n: n),
    "modular_arithmetic_brackets": (lambda n: n, lambda n: 1),
    "solve_equation": (lambda n: n, lambda n: 1),
    "duplicate_string": (lambda n: n, lambda n: 2 * n),
    "missing_duplicate": (lambda n: n, lambda n: 1),
    "odds_first": (lambda n: n, lambda n: n),
    "binary_addition": (lambda n: n, lambda n: n + 1),
    "binary_multiplication": (lambda n: n, lambda n: n),
    "compute_sqrt": (lambda n: n, lambda n: (n + 1) // 2),
    "bucket_sort": (lambda n: n, lambda n: n),
    "copy": (lambda n: n, lambda n: n),
    "addition": (lambda n: 2 * n + 1, lambda n: n + 1),
    "sorting": (lambda n: n, lambda n: n),
}


# Of data.name='retrieval', and the suites of them that `evaluate --suite` names.
PROBES = (
    "passkey",
    "niah_single",
    "niah_multikey",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "mqar",
    "induction",
    "mixed",
)
SUITES: dict[str, tuple[str, ...]] = {
    "passkey": ("passkey",),
    "ruler": PROBES[1:8],
    "mqar": ("mqar",),
    "induction": ("induction",),
}


def window_of_task(task: str, form: str, length: int) -> int:
    """Returns the tokens of a window that holds an algorithmic example of a length.

    Args:
      task: one of `ALGORITHMIC_TASKS`.
      form: "encoder", with blanks in place of outputs, or "decoder", with a separator before the outputs.
      length: length of the task.
    """
    given, output = (symbols(length) for symbols in ALGORITHMIC_TASKS[task])
    return given + output + (form == "decoder")


# Per channel in 0..1, of ImageNet's training photos: the usual normalization of photos.
PHOTO_MEAN = (0.485, 0.456, 0.406)
PHOTO_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One data set.

    Attributes:
      name: value of `data.name`.
      kind: "text", "questions", "sequences" or "images"; it decides the task.
      builder: "MODULE:CLASS" that reads the data: a `TextBuilder`, `QABuilder` or `ImageBuilder`; or makes it.
      paths: use of `data.paths`: "none", "optional", "one" (exactly one) or "some" (at least one).
      paths_hint: description of `data.paths` for messages, for data sets that need it.
      answers: kind of the answers to questions, "prose" (scored with SQuAD's normalization), "code" (compared strictly), "any" (all
        scores) or "parts" (an answer has several, and all of them count).
      size: image size (height, width), or (frames, height, width) of videos; () = images differ, or the config decides.
      video: whether image examples are videos.
      channels: image channels.
      mean: image mean per channel, in 0..1.
      std: image standard deviation per channel, in 0..1.
      num_classes: number of image classes; 0 = known from the files alone.
      options: fields of `data` that it reads and others do not.
      has_image_files: whether images come from files, which `python -m seqpe_jax.prepare` writes into shards.
      is_drawn: whether images are drawn at the size that is asked for, so that none is resized.
    """

    name: str
    kind: Kind
    builder: str
    paths: Literal["none", "optional", "one", "some"] = "optional"
    paths_hint: str = ""
    answers: Literal["prose", "code", "any", "parts"] = "prose"
    size: tuple[int, ...] = ()
    video: bool = False
    channels: int = 3
    mean: tuple[float, ...] = PHOTO_MEAN
    std: tuple[float, ...] = PHOTO_STD
    num_classes: int = 0
    options: tuple[str, ...] = ()
    has_image_files: bool = False
    is_drawn: bool = False

    @property
    def count_name(self) -> str:
        """Unit in which the throughput of a run is counted: "tokens" or "images"."""
        return COUNT_NAMES[self.kind]

    def options_of(self, data: Any) -> tuple[tuple[str, Any], ...]:
        """Returns (name, value) of the options in a `data` section whose value is not the default."""
        defaults = type(data)()
        pairs = ((name, getattr(data, name)) for name in self.options)
        return tuple((name, value) for name, value in pairs if value != getattr(defaults, name))

    @property
    def foreign_options(self) -> tuple[str, ...]:
        """Options that other data sets read and this one does not."""
        return tuple(sorted({option for one in DATASETS.values() for option in one.options} - set(self.options)))

    def check_options(self, data: Any) -> None:
        """Raises InputError where a `data` section sets an option of other data sets."""
        defaults = type(data)()
        for name in self.foreign_options:
            if getattr(data, name) != getattr(defaults, name):
                readers = ", ".join(one.name for one in DATASETS.values() if name in one.options)
                raise InputError(
                    f"data.{name}={getattr(data, name)} is not read by data.name='{self.name}', only by {readers}: leave it at "
                    f"{getattr(defaults, name)!r}"
                )

    def check_prepared(self) -> None:
        """Raises InputError for a data set that is never prepared: it is small, and made on each host."""
        can = [one.name for one in DATASETS.values() if one.kind == DATA_TEXT or one.has_image_files]
        if self.name not in can:
            raise InputError(
                f"data.name='{self.name}' needs no preparation (data.prepared, python -m seqpe_jax.prepare), since each host "
                f"makes it: only {', '.join(can)} are prepared"
            )

    def check_paths(self, paths: Sequence[str]) -> None:
        """Raises InputError where `data.paths` does not fit the data set."""
        if paths and self.paths == "none":
            raise InputError(
                f"data.name='{self.name}' takes no data.paths; for your own {self.kind}: "
                f"data.name='{OWN_FILES[self.kind]}'"
            )
        if self.paths == "one" and len(paths) != 1:
            raise InputError(
                f"data.name='{self.name}' needs one path in data.paths, got {len(paths)}: {self.paths_hint}"
            )
        if self.paths == "some" and not paths:
            raise InputError(f"data.name='{self.name}' needs data.paths: {self.paths_hint}")


DATASETS: dict[str, Dataset] = {}


def register(dataset: Dataset) -> None:
    """Adds a data set, which configs may name from then on. Raises: ValueError: the name is taken."""
    if dataset.name in DATASETS:
        raise ValueError(f"data set '{dataset.name}' is registered already")
    DATASETS[dataset.name] = dataset


def names() -> tuple[str, ...]:
    """Returns the names of all data sets."""
    return tuple(DATASETS)


def get(name: str) -> Dataset:
    """Returns the data set that `data.name` names. Raises: InputError: there is none of that name."""
    if name not in DATASETS:
        raise InputError(f"unknown data set '{name}' (data.name).{suggest(name, DATASETS)}")
    return DATASETS[name]


def load_builder(name: str, kind: Kind) -> type:
    """Imports the class that reads a data set.

    Raises:
      InputError: there is none of that name, or it is of another kind.
    """
    dataset = get(name)
    if dataset.kind != kind:
        fitting = ", ".join(sorted(one.name for one in DATASETS.values() if one.kind == kind))
        raise InputError(
            f"data set '{name}' (data.name) is {dataset.kind}, but this run needs {kind}: choose {fitting}"
        )
    module, _, class_name = dataset.builder.partition(":")
    return getattr(importlib.import_module(module), class_name)


_FOLDER = "seqpe_jax.data.datasets"

register(Dataset("stdlib_text", DATA_TEXT, f"{_FOLDER}.stdlib_text:StdlibText", paths="none"))
register(
    Dataset(
        "text",
        DATA_TEXT,
        f"{_FOLDER}.text:Text",
        paths="some",
        paths_hint="give files, globs or folders of text, JSON lines, Parquet or Arrow, or tfds:NAME",
        options=("text_key", "split_on"),
    )
)
register(
    Dataset(
        "text_files",
        DATA_TEXT,
        f"{_FOLDER}.text_files:TextFiles",
        paths="some",
        paths_hint="give files, globs or directories of UTF-8 text",
        options=("raw",),
    )
)
register(Dataset("wikitext103", DATA_TEXT, f"{_FOLDER}.wikitext103:Wikitext103"))
register(Dataset("stdlib_qa", DATA_QA, f"{_FOLDER}.stdlib_qa:StdlibQA", paths="none", answers="code"))
register(
    Dataset(
        "squad_long",
        DATA_QA,
        f"{_FOLDER}.squad_long:SquadLong",
        paths="one",
        paths_hint=(
            "give one file in SQuAD's JSON format, or of rows {context, question, answers} as JSON lines or Parquet, or a folder "
            "with train-*.json and dev-*.json (train-v1.1.json and dev-v1.1.json, or v2.0, from "
            "rajpurkar.github.io/SQuAD-explorer)"
        ),
        options=("unanswerable",),
    )
)
register(
    Dataset(
        "qa_jsonl",
        DATA_QA,
        f"{_FOLDER}.qa_jsonl:QaJsonl",
        paths="one",
        paths_hint=(
            "give one file, or a folder with train.jsonl, validation.jsonl and test.jsonl; each line is an object like "
            '{"index": 0, "input": "... Question: ... Answer:", "outputs": ["an answer"]}'
        ),
        answers="any",  # nobody knows whether a user's answers are code
    )
)
register(
    Dataset(
        "retrieval",
        DATA_QA,
        f"{_FOLDER}.retrieval:Retrieval",
        paths="none",
        answers="parts",
        options=("probe", "depths", "instructions"),
    )
)
register(
    Dataset(
        "algorithmic",
        DATA_SEQUENCES,
        f"{_FOLDER}.algorithmic:Algorithmic",
        paths="none",
        options=("task", "form"),
    )
)
register(
    Dataset(
        "digit_images",
        DATA_IMAGE,
        f"{_FOLDER}.digits:DigitImages",
        paths="none",
        size=(8, 8),
        channels=1,
        mean=(0.3051,),  # mean and std of the train split
        std=(0.3761,),
        num_classes=10,
    )
)
register(
    Dataset(
        "moving_digits",
        DATA_IMAGE,
        f"{_FOLDER}.digits:MovingDigits",
        paths="none",
        size=(8, 16, 16),
        video=True,
        channels=1,
        mean=(0.0763,),  # mean and std of the train split
        std=(0.2298,),
        num_classes=40,
    )
)
register(
    Dataset(
        "glyphs",
        DATA_IMAGE,
        f"{_FOLDER}.glyphs:Glyphs",
        paths="none",
        channels=1,
        mean=(0.1348,),  # mean and std of the train split at 32 x 32
        std=(0.3162,),
        num_classes=36,
        is_drawn=True,
    )
)
register(
    Dataset(
        "image_folder",
        DATA_IMAGE,
        f"{_FOLDER}.image_folder:ImageFolder",
        paths="one",
        paths_hint=(
            "give a directory ROOT/{train,validation,test}/CLASS/*.png (jpg, tif, gif, ...), or ROOT/CLASS/*, which is "
            "split 80/10/10, or a CSV file of labels"
        ),
        options=("bit_depth", "max_pixels"),
        has_image_files=True,
    )
)
for _name, _class in (("imagenet2012", "Imagenet2012"), ("imagenet_resized", "ImagenetResized")):
    register(Dataset(_name, DATA_IMAGE, f"{_FOLDER}.imagenet:{_class}", num_classes=1000, has_image_files=True))
