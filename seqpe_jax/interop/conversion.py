"""A checkpoint of others, read and written as a run of ours."""

import pathlib
import shutil
import tempfile
from typing import Any

import tokenizers

from seqpe_jax import loading
from seqpe_jax.data.formats import without_mark
from seqpe_jax.data.tokenizers import ADDED, FILE, NAMED_IN, load_tokenizer
from seqpe_jax.errors import InputError
from seqpe_jax.files import check_free
from seqpe_jax.interop import folders, reference, weights
from seqpe_jax.interop.writing import write_reference, write_run
from seqpe_jax.trees import count


def to_run(source: str, output: str, tokenizer: str = "") -> dict[str, Any]:
    """Writes a checkpoint of others as a run of ours: config.json, checkpoints/0, tokenizer.json, conversion.json.

    Args:
      source: see `interop.folders`; output: a folder that does not exist or is empty; tokenizer: a tokenizer.json, for a
        source that brings none.

    Returns:
      {"source", "files", "encoding", "parameters", "mapped": {ours: theirs}, "left_out": {theirs: why}, "text",
      "tokenizer"}.

    Raises:
      InputError: as `loading.load`; the tokenizer does not fit. Nothing is written then.
    """
    check_free(output)
    if loading.is_ours(source):
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
        "parameters": count(model.params),
        "mapped": mapped,
        "left_out": found.dropped,
        "text": not config.reads_images,
        "tokenizer": None if words is None else words.name,
    }
    write_run(output, config, model.params, model.sizes, 0, keep=words and words.save, report=report)
    return report


def to_reference(checkpoint: str, output: str) -> dict[str, Any]:
    """Writes a run of ours in the reference's text or image layout; returns and raises as `writing.write_reference`."""
    check_free(output)
    return write_reference(loading.opened(checkpoint), output)


def _tokenizer(files: tuple[pathlib.Path, ...], given: str) -> Any:
    """The tokenizer of a source, or the one given, or None."""
    by_name = {file.name: file for file in files}
    if given:
        return load_tokenizer(given)
    if FILE in by_name:
        return load_tokenizer(by_name[FILE])
    if {"vocab.json", "merges.txt"} <= by_name.keys():
        with tempfile.TemporaryDirectory() as scratch:
            file = pathlib.Path(scratch) / files[0].parent.name / FILE
            file.parent.mkdir()
            parts = [file.with_name(name) for name in ("vocab.json", "merges.txt")]
            for part in parts:
                part.write_bytes(without_mark(by_name[part.name].read_bytes()))
            try:
                made = tokenizers.ByteLevelBPETokenizer(*map(str, parts))
            except Exception as error:  # the library raises bare Exception
                where = files[0].parent
                raise InputError(
                    f"vocab.json and merges.txt in '{where}' are no tokenizer ({error}): give --tokenizer, or mend them"
                ) from None
            file.write_text(made.to_str(), encoding="utf-8")
            for beside in (*NAMED_IN, ADDED):  # which say how its texts end, and which further tokens there are
                if (files[0].parent / beside).is_file():
                    shutil.copyfile(files[0].parent / beside, file.parent / beside)
            return load_tokenizer(file)
    return None
