"""Conversion of checkpoints: the reference's and Hugging Face's to runs, and any of them to both layouts."""

import pathlib
from collections.abc import Collection
from typing import Any

from seqpe_jax import loading
from seqpe_jax.data.tokenizers import Tokenizer, load_tokenizer
from seqpe_jax.errors import InputError
from seqpe_jax.files import require_empty
from seqpe_jax.interop import hf_decoders, torch_model, torch_reference
from seqpe_jax.interop.run_writer import write_run
from seqpe_jax.trees import num_params


def convert_to_run(
    source: str, output: str, tokenizer: str = "", ignore_fields: Collection[str] = ()
) -> dict[str, Any]:
    """Writes a checkpoint of another format as a run: config.json, checkpoints/0, tokenizer.json, conversion.json.

    Args:
      source: path of a checkpoint that `interop.torch_reference` reads.
      output: path of a folder that does not exist or is empty.
      tokenizer: path of a tokenizer.json, for a text model that has none; "" = its own, if any.
      ignore_fields: fields of a Hugging Face folder's config.json that are passed over.

    Returns:
      {"source", "files", "encoding", "parameters", "mapped": {parameter here: [arrays there]}, "left_out": {array there:
      reason}, "text", "tokenizer", "settings": fields that --to=huggingface writes again}.

    Raises:
      InputError: the source is a run or cannot be read (`loading.load`), or the tokenizer does not fit. Nothing is written
        then.
    """
    require_empty(output)
    if loading.is_run_or_export(source):
        raise InputError(
            f"{source} is a run of ours already: --to=reference and --to=huggingface write it in other formats"
        )
    checkpoint = torch_reference.read(source, ignore_fields)
    model = torch_model.from_checkpoint(checkpoint)
    config = model.config
    words = None if config.is_image else _load_tokenizer(checkpoint.tokenizer_files, tokenizer)
    if words is not None and words.vocab_size > config.model.vocabulary:
        raise InputError(
            f"the tokenizer has {words.vocab_size} tokens, but the model only {config.model.vocabulary}: give the one "
            "that it was trained with by --tokenizer"
        )
    report = {
        "source": str(source),
        "files": [str(file) for file in checkpoint.arrays.files],
        "encoding": config.encoding.kind,
        "parameters": num_params(model.params),
        "mapped": {rule.path: list(rule.reference_names) for rule in checkpoint.rules},
        "left_out": checkpoint.arrays.left_out,
        "text": not config.is_image,
        "tokenizer": None if words is None else words.name,
        "settings": checkpoint.settings,
    }
    write_run(output, config, model.params, model.data_spec, 0, save_assets=words and words.save, report=report)
    return report


def convert_to_reference(checkpoint: str, output: str) -> dict[str, Any]:
    """Writes a run in the reference's text or image layout (`torch_reference.write_reference`)."""
    require_empty(output)
    return torch_reference.write_reference(loading.open_model(checkpoint), output)


def convert_to_huggingface(
    checkpoint: str, output: str, dtype: str = "float32", ignore_fields: Collection[str] = ()
) -> dict[str, Any]:
    """Writes a run, or a checkpoint of another format, as a folder of Hugging Face (`hf_decoders.write`)."""
    require_empty(output)
    return hf_decoders.write(loading.open_folder(checkpoint, ignore_fields=ignore_fields), output, dtype)


def _load_tokenizer(files: tuple[pathlib.Path, ...], chosen: str) -> Tokenizer | None:
    """Returns the chosen tokenizer, else that of the source's files, else None."""
    if not (chosen or files):
        return None
    return load_tokenizer(chosen or files[0].parent)
