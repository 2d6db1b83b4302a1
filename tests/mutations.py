"""Command lines, config files and stored files with the faults of mistakes, accidents and malice, drawn by Hypothesis."""

import copy
import dataclasses
import functools
import json
import os
import pathlib
import stat
import sys
import typing
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

from seqpe_jax import config
from seqpe_jax.data import formats
from seqpe_jax.data.datasets import image_base
from seqpe_jax.data.tokenizers import load_tokenizer
from seqpe_jax.interop import (
    hf,
    hf_families,
    hf_images,
    hf_rope,
    hf_weights,
    pickles,
    torch_config,
    torch_model,
    torch_reference,
    weights,
)
from seqpe_jax.models.build import DataSpec, ModelSpec
from seqpe_jax.run_dir import RunDir
from seqpe_jax.training.checkpoint import Checkpointer
from seqpe_jax.training.trainer import Trainer
from tests.interop import test_hf_images
from tests.tiny import random_state, tiny_config

PAGE = '''"""A config, as `train` takes it."""

from seqpe_jax.config import defaults


def get_config(variant=None):
    c = defaults()
    c.update({fields})
    return c
'''
SWEEP = """from seqpe_jax.sweeps import Range, Search, product, zipped

CONFIG = "page.py"
SEARCH = Search(
    {"optimizer.learning_rate": Range(1e-4, 1e-2, log=True)}, {"eval.every": 2, "eval.lengths": (16,)},
    minimise="eval/loss@16", trials=2,
)


def runs():
    for point in product({"seed": (0, 1), "steps": (6, 8)}):
        yield f"{point['seed']}-{point['steps']}", point
"""
RUN = ("run/config.json", "run/sizes.json", "run/checkpoints/2/digests.json")
ARRAYS = ("run/similarity.npz", "run/position_curves.npz")
RESULTS = ("run/metrics.jsonl", "run/evaluation.json")
IMAGE_RUN = ("image_run/config.json", "image_run/sizes.json", "image_run/classes.json")
GPT2 = ("gpt2/config.json", "gpt2/model.safetensors", "words.json")
SWEEP_FILES = ("sweep.py", "page.py")
REFERENCE = ("reference/config.json", "reference/pe_config.json", "reference/train_args.json")
OUT = "--output=new/out"
# Command lines that work in a folder of `write_inputs`, and the files that each reads there.
COMMANDS = {
    ("train", "--config=page.py", "--workdir=new/run", "--config.seed=3", "--config.optimizer.clip=1.0"): ("page.py",),
    ("train", "--config=page.py", "--workdir=run"): ("page.py", *RUN, *RESULTS),
    ("train", "--config=page.py", "--workdir=new/run", "--init-from=run", "--config.steps=9"): ("page.py", *RUN),
    ("train", "--config", "images.py", "--workdir", "new/run", "--config.data.augment.flip", "0.5"): ("images.py",),
    ("evaluate", "--checkpoint=run", "--lengths=16,32", "--split=test", "--tokens=64", OUT): (*RUN, "text.txt"),
    ("evaluate", "--checkpoint=run", "--data=text_files", "--paths=text.txt", OUT): (*RUN, "text.txt"),
    ("evaluate", "--checkpoint=image_run", "--sizes=8,8x12", OUT): IMAGE_RUN,
    ("generate", "--checkpoint=run", "--prompt=line 12", "--max-new-tokens=8", "--temperature=0.5", "--top-p=0.9"): RUN,
    ("generate", "--checkpoint=run", "--prompts-file=prompts.txt", "--seed=3", OUT): (*RUN, "prompts.txt"),
    ("export", "--checkpoint=run", OUT, "--max-length=64", "--platforms=cpu"): (*RUN, *RESULTS),
    ("export", "--checkpoint=image_run", OUT, "--max-size=16"): IMAGE_RUN,
    ("report", "--workdir=run", OUT): ("run/config.json", *RESULTS, *ARRAYS, "run/log.txt"),
    ("convert", "--source=gpt2", OUT, "--to=run", "--tokenizer=words.json"): GPT2,
    ("convert", "--source=run", OUT, "--to=reference"): RUN,
    ("convert", "--source=reference", OUT): REFERENCE,
    ("evaluate", "--checkpoint=timm", "--sizes=32", OUT): ("timm/config.json",),
    ("sweep", "--sweep=sweep.py", "--workdir=new/sweep", "--jobs=2", "--only=0-6,1-8"): SWEEP_FILES,
    ("sweep", "--sweep=sweep.py", "--workdir=new/sweep", "--executor=print"): SWEEP_FILES,
    ("sweep", "--sweep=sweep.py", "--workdir=new/sweep", "--executor=optuna"): SWEEP_FILES,
    ("aot", "--config=page.py", "--topology=v5e:2x2", OUT, "--config.mesh.fsdp=1"): ("page.py",),
    ("benchmark", "--config=page.py", "--compare=seqpe,rotary", "--mode=train", "--steps=3", OUT): ("page.py",),
}
WORDS = [
    *"0 -1 1 2147483648 99999999999999999999 1e309 -1e309 nan inf 1e-320 1e30 0.5 True None () (0,) (1,2,3,4,5,6,7)".split(),
    *"(-1,-1) [[[[]]]] ² 1:² ٣ é 名前 ' \" ( { [1, __import__('os') -- = ~ ~nobody-of-that-name gs://bucket/x".split(),
    *"s3://bucket/x http://x gcs:/x - . .. %s%n {0} 0x10 1_000 1. 1+1 10**10 1,,2 , * ** [ =1+1 1x 8x8x8x8 v5e:0x0".split(),
    *"file empty dangling loop file/under zero run image_run gpt2 page.py words.json closed page.py:none page.py:".split(),
    *"new seqpe learned wsd 1:3".split(),
    *("", " ", "\n", "a\nb", "\t", "lambda: 0", "\udcff", "9" * 5000, "[" * 3000, "a" * 300, "abc/" * 2000),
]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(("x", "=1", "\ud800", 10**25, 10**9))
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("xy"), inner), max_leaves=4
)
CONTENTS = [
    *b'|null|[]|{}|0|\xff\xfe|"|def get_config(|import json\n1/0|import sys\nsys.exit(3)|raise SystemExit'.split(b"|"),
    *b"get_config = 3|CONFIG = 'page.py'\ndef runs(): yield 1|&a [*a]|!!python/object/apply:os.system ['x']".split(
        b"|"
    ),
    *b'{"step": NaN}|{"model": {"width": 1e999}}|PK\x03\x04'.split(b"|"),
    *(b"\x00" * 64, b"[" * 100_000, b'{"a":' * 50_000, b"- " * 50_000, b"x" * 200_000, b"9" * 6000),
]


def write_inputs(folder: pathlib.Path) -> None:
    """Fills a folder with inputs of the commands: texts, config files, runs, a GPT-2 folder, and paths that are no files."""
    folder.mkdir(parents=True)
    before = pathlib.Path.cwd()
    os.chdir(folder)
    try:
        pathlib.Path("text.txt").write_text("".join(f"line {number:4d} of text\n" for number in range(300)))
        pathlib.Path("prompts.txt").write_text("line 1\nline 22\n")
        pathlib.Path("sweep.py").write_text(SWEEP)
        _write_tokenizer(pathlib.Path("words.json"))
        settings = tiny_config(data__name="text_files", data__paths=("text.txt",), eval__every=2)
        images = config.load(
            str(before / "configs/digits_vit.py"),
            {
                "model.layers": 1,
                "model.width": 24,
                "model.heads": 2,
                "encoding.layers": 1,
                "encoding.width": 24,
                "encoding.heads": 2,
                "eval.sizes": (8,),
                "batch_size": 8,
                "objective.shift.sets": 1,
            },
        )
        for name, page, one in (("run", "page.py", settings), ("image_run", "images.py", images)):
            pathlib.Path(page).write_text(PAGE.format(fields=config.to_dict(one)))
            _write_run(pathlib.Path(name), one)
        _write_results(pathlib.Path("run"))
        _write_gpt2(pathlib.Path("gpt2"))
        for name in ("reference", "timm"):  # without weights
            pathlib.Path(name).mkdir()
            for file, content in foreign_settings()[name].items():
                pathlib.Path(name, file).write_text(json.dumps(content))
        _write_traps()
    finally:
        os.chdir(before)


def _write_tokenizer(path: pathlib.Path) -> None:
    import tokenizers

    words = ["[UNK]", "<|endoftext|>", "line", "of", "text", *map(str, range(300))]
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(path))


def _write_run(folder: pathlib.Path, settings: config.Config) -> None:
    trainer = Trainer.of(settings, jax.devices()[:1])
    checkpoints = Checkpointer(folder)
    checkpoints.save(2, random_state(trainer, 0.2), {"seconds": 1.0})
    checkpoints.close()
    RunDir(folder).write_config(config.to_dict(trainer.config))  # with the random bits that training resolves
    RunDir(folder).write_data_spec(trainer.task.data_spec)
    trainer.task.save_assets(folder)


def _write_results(folder: pathlib.Path) -> None:
    lines = [{"step": step, "time": step, "train/loss": 3.0, "train/tokens_per_second": 9.0} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = [
        {
            "length": length,
            "tokens": 640,
            "loss": 2.0,
            "perplexity": 7.4,
            "bits_per_byte": 2.9,
            "loss_by_position": {"position": [0.0, 1.0], "loss": [3.0, 2.0]},
        }
        for length in (16, 32)
    ]
    report = {"checkpoint": "run", "step": 2, "split": "test", "parameters": 99, "results": results}
    (folder / "evaluation.json").write_text(json.dumps(report))
    positions = np.arange(16)[:, None]
    arrays = {"pivots": positions[[4, 8]], "positions": positions, "cosine": np.ones((2, 16))}
    np.savez(folder / "similarity.npz", **arrays)
    np.savez(folder / "position_curves.npz", distances=np.arange(16), logit=np.ones((2, 2, 16)))
    (folder / "log.txt").write_text("== failed: no room\n")


def _write_gpt2(folder: pathlib.Path) -> None:
    """Writes a Hugging Face GPT-2 of random weights."""
    folder.mkdir()
    width, draw = 8, np.random.default_rng(0)
    sizes = {"wte.weight": (400, width), "wpe.weight": (32, width), "ln_f.weight": (width,), "ln_f.bias": (width,)}
    for name, shape in {
        "ln_1": (width,),
        "ln_2": (width,),
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }.items():
        sizes |= {f"h.0.{name}.weight": shape, f"h.0.{name}.bias": shape[-1:]}
    save_file(
        {name: draw.normal(size=shape).astype(np.float32) for name, shape in sizes.items()},
        folder / "model.safetensors",
    )
    settings = {"model_type": "gpt2", "vocab_size": 400, "n_layer": 1, "n_embd": width, "n_head": 2, "n_positions": 32}
    (folder / "config.json").write_text(json.dumps(settings))


def _write_traps() -> None:
    """Makes paths that are not the file or folder that a command expects."""
    pathlib.Path("file").write_text("some words\n")
    pathlib.Path("empty").mkdir()
    pathlib.Path("dangling").symlink_to("nowhere/at/all")
    pathlib.Path("loop").symlink_to("loop")
    pathlib.Path("closed").mkdir(mode=0o500)


def device(path: pathlib.Path) -> None:
    """Makes a device that is read without end, where this process may."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        path.symlink_to("/dev/zero")  # which only root could replace


@dataclasses.dataclass(frozen=True)
class Case:
    """A command line, and the files of its folder that are changed before.

    Attributes:
      words: the command and its arguments.
      files: new content of files by name.
      base: the command line of `COMMANDS` that it was made from.
    """

    words: tuple[str, ...]
    files: dict[str, bytes]
    base: tuple[str, ...] = ()

    def smaller(self) -> Iterator["Case"]:
        """Yields cases with one change less."""
        for name in self.files:
            yield dataclasses.replace(self, files={other: self.files[other] for other in self.files if other != name})
        if self.base and self.words != self.base:
            yield dataclasses.replace(self, words=self.base)
        for index in range(1, len(self.words)):
            if self.words[index] not in self.base:
                yield dataclasses.replace(self, words=self.words[:index] + self.words[index + 1 :])
            if len(self.words) == len(self.base) and self.words[index] != self.base[index]:
                changed = (*self.words[:index], self.base[index], *self.words[index + 1 :])
                yield dataclasses.replace(self, words=changed)

    @property
    def key(self) -> str:
        """Text by which equal cases are found."""
        return repr((self.words, sorted(self.files.items())))

    def __repr__(self) -> str:
        files = {name: content[:60] + b"..." * (len(content) > 60) for name, content in self.files.items()}
        return f"{' '.join(word[:80] for word in self.words)!r} {files}"


@st.composite
def cases(draw: st.DrawFn, folder: pathlib.Path) -> Case:
    """Draws a command with one to three changes of its words or its files."""
    chosen = draw(st.sampled_from(tuple(COMMANDS)))
    words, files, reads = list(chosen), {}, COMMANDS[chosen]
    changes = [_value, _value, _letters, _argument, *[_field] * 4 * ("page.py" in reads or "images.py" in reads)]
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        change = draw(st.sampled_from([*changes, *[_file] * (len(changes) // 2)]))
        if change is _file:
            _file(draw, draw(st.sampled_from(reads)), files, folder)
        else:
            change(draw, words)
    return Case(tuple(words), files, chosen)


TYPES = config.field_types()
FIELDS = tuple(name for name in TYPES if name != "data.name")  # whose other values take minutes to prepare
NUMBERS = (
    "0 1 2 3 4 7 -1 -7 16 100 1000 65536 1000000 1000000000 2147483647 1e300 9223372036854775808 1000000000000000000000 "
    "0.5 1.0 0.999 1e-3 1e-12 1e-38 1e-320 1e30"
).split()
LISTS = "() (1,) (0,) (8,8) (4,8,8) (-1,3) (1.0,0.5) (1000000000,8) (0.5,0.25,0.25) ('x',)".split()


def _field(draw: st.DrawFn, words: list[str]) -> None:
    """Sets a field of the config."""
    name = draw(st.sampled_from(FIELDS))
    kind, value = TYPES[name], draw(st.sampled_from(WORDS))
    if kind in (int, float):
        value = draw(st.sampled_from((*NUMBERS, value)))
    elif typing.get_origin(kind) is tuple:
        value = draw(st.sampled_from((*LISTS, value)))
    elif typing.get_origin(kind) is typing.Literal:
        value = draw(st.sampled_from((*typing.get_args(kind), value)))
    words.append(f"--config.{name}={value}")


def _value(draw: st.DrawFn, words: list[str]) -> None:
    """Gives an option another value."""
    index = draw(st.integers(1, len(words) - 1))
    name, given, _ = words[index].partition("=")
    words[index] = f"{name}={draw(st.sampled_from(WORDS))}" if given else draw(st.sampled_from(WORDS))


def _letters(draw: st.DrawFn, words: list[str]) -> None:
    """Drops, doubles or swaps letters of a word."""
    index = draw(st.integers(1, len(words) - 1))
    word = words[index]
    if len(word) < 2:
        return
    at, how = draw(st.integers(0, len(word) - 2)), draw(st.sampled_from(("drop", "double", "swap")))
    middle = {"drop": word[at + 1], "double": word[at] + word[at : at + 2], "swap": word[at + 1] + word[at]}[how]
    words[index] = word[:at] + middle + word[at + 2 :]


def _argument(draw: st.DrawFn, words: list[str]) -> None:
    """Drops or doubles an argument, or adds a word."""
    index, how = draw(st.integers(1, len(words) - 1)), draw(st.sampled_from(("drop", "double", "add")))
    if how == "drop" and len(words) > 2:
        del words[index]
    else:
        words.insert(index, words[index] if how == "double" else draw(st.sampled_from(WORDS)))


def _file(draw: st.DrawFn, name: str, files: dict[str, bytes], folder: pathlib.Path) -> None:
    """Changes a file that the command reads: its JSON at one place, a few bytes, or all of it."""
    path = folder / name
    if not path.exists():
        return
    files[name] = draw(damaged(name, files.get(name, path.read_bytes())))


@st.composite
def damaged(draw: st.DrawFn, name: str, content: bytes) -> bytes:
    """Draws a file with a change: its JSON at one place, a few bytes, or all of it."""
    how = draw(st.sampled_from(("json", "json", "bytes", "cut", "all")))
    if how == "all":
        return draw(st.sampled_from(CONTENTS))
    if how == "json" and name.endswith((".json", ".jsonl")):
        return _json(draw, content)
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    return content[:at] if how == "cut" else content[:at] + draw(st.binary(min_size=1, max_size=3)) + content[at + 1 :]


def _json(draw: st.DrawFn, content: bytes) -> bytes:
    """A JSON file, or lines of JSON, with one value changed, removed or added."""
    lines = content.splitlines() if content.count(b"\n{") else [content]
    number = draw(st.integers(0, len(lines) - 1)) if lines else 0
    try:
        value = json.loads(lines[number])
    except (ValueError, IndexError, RecursionError):
        return content
    nodes: list[tuple[Any, Any]] = []

    def look(node: Any) -> None:
        for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            nodes.append((node, key))
            look(child)

    look(value)
    if not nodes:
        return content
    node, key = draw(st.sampled_from(nodes))
    how = draw(st.sampled_from(("set", "set", "set", "remove", "add")))
    if how == "remove":
        del node[key]
    elif how == "add" and isinstance(node, dict):
        node[draw(st.sampled_from(("x", "", "=", "step", "export")))] = draw(VALUES)
    else:
        node[key] = draw(VALUES)
    lines[number] = json.dumps(value).encode()
    return b"\n".join(lines) + b"\n"


# --- Settings of other programs, and files, that are read in this process

SIZES = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
SIZES |= {"n_layer": 2, "n_embd": 48, "n_head": 3}
POSITIONS = {
    "PE_TYPE": "seq_pe",
    "PE_APPLY_METHOD": "attn_mul",
    "PE_EMBED_DIM": 48,
    "PE_DATA_DIM": 2,
    "PE_MAX_POSITION": 10_000,
    "NUM_ATTENTION_HEADS": 3,
    "SEQPE_LAYER_NUM": 2,
    "SEQPE_MAX_DIGITS": 2,
    "USE_PE_MULTI_HEAD": True,
    "USE_PE_QK_PER_LAYER": "multi",
}
TIMM = {"architecture": "vit_tiny_patch16_224", "num_classes": 9, "num_features": 192, "global_pool": "token"}
TIMM |= {"model_args": {"img_size": 32, "num_heads": 3}, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
ROPE: dict[str, Any] = {
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
    "rope_scaling": {"type": "linear", "factor": 2.0},
}


def foreign_settings() -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the files of settings of a folder in each foreign format, and their fields; none has weights."""
    found = {
        "reference": {
            "config.json": {"model_type": "gpt2", "vocab_size": 40, "n_layer": 2, "n_embd": 48, "n_head": 3},
            "pe_config.json": POSITIONS | {"PE_APPLY_METHOD": "attn_scalar", "PE_DATA_DIM": 1, "SEQPE_MAX_DIGITS": 5},
            "train_args.json": {"block_size": 32},
        },
        "reference_images": {
            "config.json": POSITIONS
            | {
                "MODEL": {"TYPE": "vit_s_16", "NUM_HEADS": 3, "DROP_PATH_RATE": 0.1},
                "DATA": {"IMG_SIZE": 32},
                "TRAIN": {},
            }
        },
        "timm": {"config.json": TIMM},
        "vit": {"config.json": {"model_type": "vit", "hidden_size": 48, "num_attention_heads": 3, "image_size": 32}},
    }
    for kind, family in hf_families.FAMILIES.items():
        required = {
            name: SIZES[name] for name, (_, default) in family.fields.items() if default is hf_families.REQUIRED
        }
        required |= (
            {"num_key_value_heads": 2} if "num_key_value_heads" in family.fields else {}
        )  # the default divides no 4
        found[kind] = {"config.json": {"model_type": kind} | required | (ROPE if family.has_rope else {})}
    return copy.deepcopy(found)  # draws change it


def foreign_fields(format: str, file: str) -> tuple[str, ...]:
    """Returns the names of the fields that are known in a file of a format."""
    reference = (*torch_reference.PE_FIELDS, *torch_reference.ENCODER_FIELDS)
    known = {
        "reference": {"pe_config.json": reference, "train_args.json": ("block_size",)},
        "reference_images": {"config.json": (*reference, "MODEL", "DATA", "TRAIN")},
        "timm": {"config.json": (*hf_images.TIMM_FIELDS, *hf_images.TIMM_ARGUMENTS, *hf_images.TIMM_SIDES)},
        "vit": {"config.json": (*hf_images.HF_FIELDS, *hf_images.HF_SIDES, "qkv_bias")},
    }
    family = hf_families.FAMILIES.get(format, hf_families.FAMILIES["gpt2"])
    rope = tuple(sorted(hf_rope.ROPE_KEYS)) if family.has_rope else ()
    return known.get(format, {}).get(file, (*family.fields, *rope))


FOREIGN_VALUES = (
    LEAVES
    | st.sampled_from((0, -1, 3, 48, 0.5, 1e-320, 1e30, 2**24, 10**400, 10**5000, "causal", "gelu", *hf_rope.TYPES))
    | st.sampled_from(([1], ["x"], [1.0] * 8, {"x": 1}, [[[1]] * 9] * 9))
    | VALUES
)
_SCALED = {"factor": 2.0, hf_rope.ORIGINAL: 32}
ROPES: tuple[dict[str, Any], ...] = (
    {},
    ROPE["rope_scaling"],
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "beta_fast": 32, "mscale": 1.0, "mscale_all_dim": 0.5} | _SCALED,
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8} | _SCALED,
    {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0} | _SCALED,
    {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}},
)
INNER_FIELDS = (
    "IMG_SIZE",
    "NUM_HEADS",
    "TYPE",
    "img_size",
    "num_heads",
    "std",
    "rope_type",
    "partial_rotary_factor",
    *_SCALED,
)


@st.composite
def foreign_cases(draw: st.DrawFn) -> tuple[str, dict[str, bytes]]:
    """Draws (format, files of settings) with one to three fields that are other than they were, or damaged files."""
    by_format = foreign_settings()
    chosen = draw(st.sampled_from(tuple(by_format)))
    settings = by_format[chosen]
    if "rope_scaling" in settings.get("config.json", {}):
        settings["config.json"]["rope_scaling"] = copy.deepcopy(draw(st.sampled_from(ROPES)))
    for _ in range(draw(st.sampled_from((1, 1, 2, 3)))):
        file = draw(st.sampled_from(tuple(settings)))
        section = settings[file]
        inner = tuple(name for name, value in section.items() if isinstance(value, dict))
        if inner and draw(st.booleans()):
            section = section[draw(st.sampled_from(inner))]
            names = (*section, *INNER_FIELDS)
        else:
            names = foreign_fields(chosen, file)
        section[draw(st.sampled_from(names))] = copy.deepcopy(draw(FOREIGN_VALUES))  # it may get fields itself
    files = {name: _dump(content) for name, content in settings.items()}
    if draw(st.sampled_from((False, False, False, True))):
        name = draw(st.sampled_from(tuple(files)))
        files[name] = draw(damaged(name, files[name]))
    return chosen, files


def _dump(content: Any) -> bytes:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)  # a file may hold numbers that Python would not write
    try:
        return json.dumps(content).encode()
    finally:
        sys.set_int_max_str_digits(before)


def right_settings() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields (format, files of settings) that are right, with each form of RoPE."""
    for kind, files in foreign_settings().items():
        yield kind, {name: _dump(content) for name, content in files.items()}
    llama = foreign_settings()["llama"]["config.json"]
    for rope in ROPES:
        yield "llama", {"config.json": _dump(llama | {"rope_scaling": rope})}


def read_foreign(format: str, folder: pathlib.Path) -> None:
    """Reads the settings of a folder as `load` does, and what follows from them without its weights."""
    if format == "reference_images":
        settings = hf.read_mapping(folder / "config.json")
        arrays = {"patch_embed.proj.weight": np.zeros((48, 3, 8, 8)), "head.weight": np.zeros((9, 48))}
        arrays |= {"blocks.0.mlp.fc1.weight": np.zeros((192, 48))}
        torch_config.config_from_spec(torch_reference._image_spec(folder / "config.json", settings, arrays))
        return
    if format in ("timm", "vit"):
        file = folder / "config.json"
        settings = hf.read_mapping(file)
        if hf_images.is_image_folder(settings):
            timm = "architecture" in settings
            known = hf_images._known_timm(file, settings) if timm else hf_images._known_hf(file, settings, folder)
            assert known.heads >= 1 and min(known.side) >= 1
            return
    torch_reference.read(folder)


TEXT_SPEC = {"vocab_size": 9, "n_layer": 1, "n_embd": 12, "n_head": 3, "n_inner": 16, "block_size": 32}
IMAGE_SPEC = {"depth": 1, "embed_dim": 12, "img_size": 32, "num_classes": 9, "num_heads": 3, "patch_size": 8}
SPEC = {"pe_type": "seq_pe", "pe_apply_method": "attn_mul", "use_pe_multi_head": True, "use_pe_qk_per_layer": "multi"}
ENCODER = {"pe_embed_dim": 12, "num_attention_heads": 3, "layer_num": 1, "max_digits": 2}
NEOX_SIZES = {
    "vocab_size": 9,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
}
Weights = dict[str, dict[str, np.ndarray]]  # arrays by name, by file


@functools.cache
def foreign_weights() -> dict[str, tuple[dict[str, bytes], Weights]]:
    """Returns (files of settings, files of weights) of a folder in each foreign format."""
    found: dict[str, tuple[dict[str, bytes], Weights]] = {}
    for kind, spec in (("gpt2", TEXT_SPEC), ("vit", IMAGE_SPEC)):
        axes = 2 if kind == "vit" else 1
        encoder = ENCODER | {"data_dim": axes}
        made = torch_config.config_from_spec({"kind": kind, "encoder": encoder} | SPEC | spec)
        state = _zeros(weights.make_rules(made), made, DataSpec(*((0, 9, 3) if axes == 2 else (9,))))
        prefix = weights.PE_PREFIX
        own = {name: array for name, array in state.items() if not name.startswith(prefix)}
        theirs = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
        names = {there: here for here, there in torch_reference.PE_FIELDS.items()}
        names |= {there: here for here, there in torch_reference.ENCODER_FIELDS.items()}
        positions = {names[name]: value for name, value in (SPEC | encoder).items()}
        if axes == 2:
            settings = {"MODEL": {"TYPE": "vit_s_16", "NUM_HEADS": 3}, "DATA": {"IMG_SIZE": 32}, "TRAIN": {}}
            files, second = {"config.json": _dump(positions | settings)}, torch_reference.IMAGE_ENCODER_FILE
        else:
            settings = {name: value for name, value in spec.items() if name != "block_size"}
            files, second = {"config.json": _dump(settings)}, torch_reference.TEXT_ENCODER_FILE
            files |= {"pe_config.json": _dump(positions), "train_args.json": _dump({"block_size": 32})}
        found[f"reference_{kind}"] = files, {hf.MODEL_FILE: own, second: theirs}
    small = {"gpt2": {"vocab_size": 9, "n_layer": 1, "n_embd": 12, "n_head": 3, "n_positions": 8}}
    grouped = NEOX_SIZES | {"num_key_value_heads": 1, "head_dim": 4}
    small |= {"llama": grouped, "qwen3": grouped, "gpt_neox": NEOX_SIZES}
    for kind, sizes in small.items():
        family = hf_families.FAMILIES[kind]
        settings = {"model_type": kind} | sizes
        made = family.config(pathlib.Path("config.json"), settings)
        rules = hf_weights.make_rules(family, made, hf_families.rotary_columns(made))
        found[kind] = {"config.json": _dump(settings)}, {hf.MODEL_FILE: _zeros(rules, made, DataSpec(9))}
    timm = test_hf_images.timm_state(3, test_hf_images.PATCHES, norm="fc_norm", layer_scale=True)
    found["timm"] = {"config.json": _dump(test_hf_images.TIMM)}, {hf.MODEL_FILE: timm}
    deit = test_hf_images.to_hf(test_hf_images.timm_state(1, 2 + test_hf_images.PATCHES))
    found["deit"] = {"config.json": _dump(test_hf_images.HF)}, {hf.MODEL_FILE: deit}
    pixels = {"image_mean": test_hf_images.MEAN, "image_std": test_hf_images.STD}
    found["deit"][0][hf_images.PIXELS_FILE] = _dump(pixels)
    return found


def _zeros(rules: Iterable[weights.Rule], made: config.Config, data_spec: DataSpec) -> dict[str, np.ndarray]:
    """Arrays of 0 of a model, under the names of its rules."""
    shapes = ModelSpec.of(made, data_spec).shapes
    return weights.to_state(rules, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes))


ARRAY_NAMES = (
    "x",
    "blocks.",
    "blocks.x.y",
    "blocks.7.norm1.weight",
    "transformer.h.",
    "h.7.ln_1.weight",
    "lm_head.weight",
)
ARRAY_NAMES += ("pe_model.weight", "weight", "reg_token", "head_dist.weight", "pos_embed", "attn.bias", "")


@st.composite
def weight_cases(draw: st.DrawFn) -> tuple[str, Weights]:
    """Draws (format, files of weights) with one or two arrays that are missing, added, or of other shapes or types."""
    chosen = draw(st.sampled_from(tuple(foreign_weights())))
    files = {file: dict(arrays) for file, arrays in foreign_weights()[chosen][1].items()}
    for _ in range(draw(st.sampled_from((1, 1, 2)))):
        arrays = files[draw(st.sampled_from(tuple(files)))]
        name = draw(st.sampled_from(tuple(arrays)))
        how = draw(st.sampled_from(("shape", "shape", "type", "number", "leave out", "add")))
        sides = arrays[name].shape
        if how == "leave out":
            del arrays[name]
        elif how == "add":
            arrays[draw(st.sampled_from(ARRAY_NAMES))] = np.zeros(draw(st.sampled_from(((), (0,), (3, 12), sides))))
        elif how == "type":
            kinds = (np.float16, np.float64, np.int8, np.uint64, np.bool_, ml_dtypes.bfloat16)
            with np.errstate(all="ignore"):
                arrays[name] = arrays[name].astype(draw(st.sampled_from(kinds)))
        elif how == "number":
            arrays[name] = np.full(sides, draw(st.sampled_from((np.nan, -np.inf, 1e-45, 3e38))), np.float32)
        else:
            at = draw(st.integers(0, max(len(sides) - 1, 0)))
            longer = (
                sides[:at] + (side,) + sides[at + 1 :]
                for side in (0, 1, 2, 3, *(side + 1 for side in sides[at : at + 1]))
            )
            shape = draw(st.sampled_from(((), (0,), (1,), (7, 5), sides[::-1], sides[1:], (*sides, 1), *longer)))
            arrays[name] = np.zeros(shape, np.float32)
    return chosen, files


@functools.cache
def _shapes(made: config.Config, data_spec: DataSpec) -> Any:
    return ModelSpec.of(made, data_spec).shapes


def read_weights(folder: pathlib.Path) -> None:
    """Reads a folder of another program to the parameters, as `load` does."""
    source = torch_reference.read(folder)
    data_spec = source.data_spec or torch_model._data_spec(source.config, source.arrays.state)
    torch_model.check_params(weights.to_params(source.rules, source.arrays.state), _shapes(source.config, data_spec))


def write_readable(folder: pathlib.Path) -> dict[str, Callable[[pathlib.Path], object]]:
    """Fills a folder with a file for each reader, and returns the readers by the name of their file."""
    folder.mkdir(parents=True)
    content = (
        b"\x80\x02}U\x01wctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQ"
    )
    content += b"K\x00(K\x02K\x02t(K\x02K\x01t\x89ccollections\nOrderedDict\n)RtRs."
    with zipfile.ZipFile(folder / "model.pth", "w") as archive:
        archive.writestr("model/data.pkl", content)
        archive.writestr("model/data/0", np.arange(4, dtype=np.float32).tobytes())
    save_file({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.int8)}, folder / "model.safetensors")
    _write_tokenizer(folder / "tokenizer.json")
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(folder / "image.png")
    Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10)).save(folder / "image.jpg")
    lines = [{"step": 1, "time": 2.5, "train/loss": 3.0}, {"step": 2, "time": 3.5, "train/loss": 2.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps(config.to_dict(tiny_config())))
    (folder / "sizes.json").write_text('{"vocabulary": 9, "channels": 3, "mean": [0.5, 0.5, 0.5], "std": [1, 1, 1]}')
    (folder / "data.json").write_text('{"train": {"tokens": 7, "fingerprint": "0a1b2c3d4e5f6789"}}')
    (folder / "classes.json").write_text('["one", "two"]')
    (folder / "lines.txt").write_text("".join(f"line {number} of text\n" for number in range(40)))

    def run(path: pathlib.Path) -> RunDir:
        return RunDir(path.parent)

    return {
        "model.pth": pickles.read,
        "model.safetensors": hf.read_safetensors,
        "tokenizer.json": lambda path: load_tokenizer(path).encode(b"line 12 of text"),
        "image.png": lambda path: image_base.read_rgb(str(path), "one", "mend it"),
        "image.jpg": lambda path: image_base.read_rgb(str(path), "one", "mend it", upright=True),
        "metrics.jsonl": lambda path: run(path).read_metrics(),
        "config.json": lambda path: run(path).config,
        "sizes.json": lambda path: run(path).data_spec,
        "data.json": lambda path: run(path).fingerprints,
        "classes.json": lambda path: run(path).class_names,
        "lines.txt": lambda path: formats.check_text_file(path),
    }
