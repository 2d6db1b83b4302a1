"""A checkpoint of others, read and written as a run of ours."""

import pathlib
from typing import Any

from seqpe_jax import loading
from seqpe_jax.data.tokenizers import Tokenizer, load_tokenizer
from seqpe_jax.errors import InputError
from seqpe_jax.files import require_empty
from seqpe_jax.interop import torch_model, torch_reference, weights
from seqpe_jax.interop.writing import write_reference, write_run
from seqpe_jax.trees import count


def convert_to_run(source: str, output: str, tokenizer: str = "") -> dict[str, Any]:
    """Writes a checkpoint of others as a run of ours: config.json, checkpoints/0, tokenizer.json, conversion.json.

    Args:
      source: see `interop.torch_reference`; output: a folder that does not exist or is empty; tokenizer: a tokenizer.json, for a
        source that brings none.

    Returns:
      {"source", "files", "encoding", "parameters", "mapped": {ours: theirs}, "left_out": {theirs: why}, "text",
      "tokenizer"}.

    Raises:
      InputError: as `loading.load`; the tokenizer does not fit. Nothing is written then.
    """
    require_empty(output)
    if loading.is_run_or_export(source):
        raise InputError(f"{source} is a run of ours already: --to=reference writes it in the reference's format")
    found = torch_reference.read(source)
    model = torch_model.from_checkpoint(found)
    config, words = model.config, _tokenizer(found.tokenizer, tokenizer) if not model.config.is_image else None
    if words is not None and words.vocab_size > config.model.vocabulary:
        raise InputError(
            f"the tokenizer has {words.vocab_size} tokens, but the model only {config.model.vocabulary}: give the one "
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
        "text": not config.is_image,
        "tokenizer": None if words is None else words.name,
    }
    write_run(output, config, model.params, model.data_spec, 0, save_assets=words and words.save, report=report)
    return report


def convert_to_reference(checkpoint: str, output: str) -> dict[str, Any]:
    """Writes a run of ours in the reference's text or image layout; returns and raises as `writing.write_reference`."""
    require_empty(output)
    return write_reference(loading.open_model(checkpoint), output)


def _tokenizer(files: tuple[pathlib.Path, ...], given: str) -> Tokenizer | None:
    """The tokenizer given, or that of a source, or None."""
    if not (given or files):
        return None
    return load_tokenizer(given or files[0].parent)
