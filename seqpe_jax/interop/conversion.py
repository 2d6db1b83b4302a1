"""Checkpoints of others -> runs of ours, and back."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tokenizers

from seqpe_jax import config as configs
from seqpe_jax.data.tokenizers import FILE, NAMED_IN, load_tokenizer
from seqpe_jax.errors import InputError
from seqpe_jax.interop import folders, reference, settings, weights
from seqpe_jax.runtime.checkpoint import Checkpoints, write_config

REPORT = "conversion.json"


def to_run(source: str, output: str, tokenizer: str = "") -> dict[str, Any]:
    """Writes a checkpoint of others as a run of ours: config.json, checkpoints/0, tokenizer.json, conversion.json.

    Args:
      source: see `interop.folders`; output: a folder that does not exist or is empty; tokenizer: a tokenizer.json, for a
        source that brings none.

    Returns:
      {"source", "files", "encoding", "parameters", "mapped": {ours: theirs}, "left_out": {theirs: why}, "text",
      "tokenizer"}.

    Raises:
      InputError: as `interop.load_reference`; the tokenizer does not fit. Nothing is written then.
    """
    free_folder(output)
    if reference.is_run(source):
        raise InputError(f"{source} is a run of ours already: --to=reference writes it in the reference's format")
    found = folders.read(source)
    model = reference.from_source(found)
    config, words = model.config, _tokenizer(found.tokenizer, tokenizer) if not model.config.reads_images else None
    if words is not None and words.vocabulary_size > config.model.vocabulary:
        raise InputError(
            f"the tokenizer has {words.vocabulary_size} tokens, but the model only {config.model.vocabulary}: give the one "
            "that it was trained with by --tokenizer"
        )
    mapped = {rule.ours: list(rule.theirs) for rule in weights.rules(config)}
    report = {
        "source": str(source),
        "files": [str(file) for file in found.files],
        "encoding": config.encoding.kind,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        "mapped": mapped,
        "left_out": found.dropped,
        "text": not config.reads_images,
        "tokenizer": None if words is None else words.name,
    }
    with new_folder(output) as folder:
        write_config(folder, configs.to_dict(config))
        if words is not None:
            words.save(folder)
        checkpoints = Checkpoints(folder)
        checkpoints.save(0, {"params": model.params}, {"params_only": True, "converted": str(source)})
        checkpoints.close()
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return report


def to_reference(checkpoint: str, output: str) -> dict[str, Any]:
    """Writes a run of ours in the reference's text or image layout.

    Args:
      checkpoint: a workdir of `train` or an output of `to_run`; output: a folder that does not exist or is empty.

    Returns:
      {"source", "step", "files", "encoding", "parameters", "mapped": {ours: theirs}}.

    Raises:
      InputError: not a run, or a field that the reference has nothing like. Nothing is written then.
    """
    free_folder(output)
    model, step = reference.from_run(checkpoint)
    config, kind = model.config, model.config.encoding.kind
    spec = settings.spec_of(config, getattr(model.encoding, "vector_width", 0))
    rules = weights.rules(config)
    state = weights.to_state(rules, jax.tree.map(np.asarray, model.params))
    if reference.channels_of(state) != 3:
        raise InputError(f"{checkpoint} reads images of one channel: the reference's format knows three alone")
    if not config.reads_images and kind in ("sinusoidal", "rotary", "alibi"):
        rows = config.encoding.max_position + (kind != "alibi")  # as many as the reference makes
        state[f"{weights.ENCODER}weight"] = reference.fixed_table(model, rows)
    kept = pathlib.Path(checkpoint) / FILE
    with new_folder(output) as folder:
        files = (folders.write_images if config.reads_images else folders.write_text)(
            folder, spec, settings.training_of(config), state
        )
        if kept.is_file():
            load_tokenizer(kept).save(folder)
        names = [str(file.relative_to(folder)) for file in files]
    return {
        "source": str(checkpoint),
        "step": step,
        "files": names,
        "encoding": kind,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        "mapped": {rule.ours: list(rule.theirs) for rule in rules},
    }


def free_folder(output: str) -> None:
    """Refuses a place that holds something. Raises: InputError."""
    path = pathlib.Path(output)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"--output={output} exists and is not empty: choose a new folder")


@contextlib.contextmanager
def new_folder(output: str) -> Iterator[pathlib.Path]:
    """Yields a folder that becomes `output` at the end, and is gone if the end is not reached."""
    path = pathlib.Path(output).absolute()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        yield part
        if path.exists():
            path.rmdir()
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _tokenizer(files: tuple[pathlib.Path, ...], given: str) -> Any:
    """The tokenizer of a source, or the one given, or None."""
    by_name = {file.name: file for file in files}
    if given:
        return load_tokenizer(given)
    if FILE in by_name:
        return load_tokenizer(by_name[FILE])
    if {"vocab.json", "merges.txt"} <= by_name.keys():
        made = tokenizers.ByteLevelBPETokenizer(str(by_name["vocab.json"]), str(by_name["merges.txt"]))
        with tempfile.TemporaryDirectory() as scratch:
            file = pathlib.Path(scratch) / files[0].parent.name / FILE
            file.parent.mkdir()
            file.write_text(made.to_str(), encoding="utf-8")
            for beside in NAMED_IN:  # which say how its texts end
                if (files[0].parent / beside).is_file():
                    shutil.copyfile(files[0].parent / beside, file.parent / beside)
            return load_tokenizer(file)
    return None
