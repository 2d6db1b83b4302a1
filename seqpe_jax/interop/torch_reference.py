"""Checkpoints of the PyTorch reference, text and images, read and written as files; `read` takes Hugging Face folders too.

Text: a folder with config.json, pe_config.json (YAML inside), train_args.json and best_model/model.safetensors (the
model) + model_1.safetensors (the position model). Images: best_model.pth or ckpt_epoch_N.pth with the keys model, pe_model
and config; without PyTorch installed, model.safetensors + pe_model.safetensors + config.json (YAML inside) are written in
their place.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from safetensors.numpy import save_file

from seqpe_jax.config import Config
from seqpe_jax.data.cache import local_copies
from seqpe_jax.data.tokenizers import TOKENIZER_FILE, load_tokenizer
from seqpe_jax.errors import InputError, format_value, suggest
from seqpe_jax.files import apply_umask, as_path, atomic_dir, require_empty
from seqpe_jax.interop import hf, hf_decoders, hf_images, hf_weights, pickles, torch_config, weights
from seqpe_jax.interop.foreign import Arrays, ForeignCheckpoint
from seqpe_jax.interop.hf_families import FAMILIES, GPT2_SCALING
from seqpe_jax.interop.settings import Field, check_names
from seqpe_jax.interop.torch_config import ReferenceSpec
from seqpe_jax.models import transformer
from seqpe_jax.models.build import ModelSpec
from seqpe_jax.trees import num_params

TEXT_ENCODER_FILE = "model_1.safetensors"
IMAGE_ENCODER_FILE = "pe_model.safetensors"

# The reference's names of settings -> names in a `ReferenceSpec`; those of the second table are in its "encoder".
PE_FIELDS = {
    "PE_TYPE": "pe_type",
    "PE_APPLY_METHOD": "pe_apply_method",
    "USE_PE_MULTI_HEAD": "use_pe_multi_head",
    "USE_PE_QK_PER_LAYER": "use_pe_qk_per_layer",
    "PE_OUT_PROJ_DIM": "pe_out_dim",
    "SEQPE_SCALAR_SCALE": "seqpe_scalar_scale",
    "SINUSOIDAL_PE_BASE": "sinusoidal_pe_base",
    "PE_MAX_POSITION": "pe_max_position",
}
ENCODER_FIELDS = {
    "PE_EMBED_DIM": "pe_embed_dim",
    "NUM_ATTENTION_HEADS": "num_attention_heads",
    "PE_DATA_DIM": "data_dim",
    "SEQPE_LAYER_NUM": "layer_num",
    "SEQPE_MAX_DIGITS": "max_digits",
    "SEQPE_LAST_LAYERNORM": "use_last_layernorm",
    "SEQPE_ATTN_DIRECTION": "attn_direction",
    "SEQPE_MASK_PADDING": "mask_padding",
    "SEQPE_ATTN_PDROP": "attn_pdrop",
    "SEQPE_RESID_PDROP": "resid_pdrop",
    "SEQPE_ACTIVATION_FUNCTION": "activation_function",
    "SEQPE_TEMPERATURE": "seqpe_temperature",
    "SEQPE_INIT_NORM_WEIGHT": "init_norm_weight",
}
REQUIRED_FIELDS = {"SEQPE_SCALE_ATTN_WEIGHTS": True, "SEQPE_ADD_OUT_PROJ": True}  # other values compute something else
TRAINING_FIELDS = {  # settings of training, which change nothing that the weights compute
    "PE_MAIN_BATCH_SIZE",
    "PE_USE_RANDOM_SHIFT",
    "PE_RANDOM_SHIFT_RATE",
    "PE_RANDOM_SHIFT_DOWNSAMPLE",
    "PE_CLIP_GRAD",
    "SEQPE_DIST_SAMPLE_RANGE",
    "SEQPE_DECAY",
    "SEQPE_LR",
    "SEQPE_PRETRAINED",
    "SEQPE_FREEZE_EPOCH_NUM",
    "SEQPE_LOGIT_SCALED_LOSS",
    "SEQPE_MULTI_HEAD_LOSS",
    "SEQPE_WARMUP_STEPS",
    "SEQPE_EPOCH_SHUFFLE",
    "SEQPE_TRANSFER_WEIGHT",
    "SEQPE_TRANSFER_BETA",
    "SEQPE_TRANSFER_METRIC",
    "SEQPE_TRANSFER_BATCH_SIZE",
    "SEQPE_TRANSFER_NUM",
    "SEQPE_CONTRASTIVE_WEIGHT",
    "SEQPE_CONTRASTIVE_BATCH_SIZE",
    "SEQPE_CONTRASTIVE_NUM",
}
LINEAR_QUERIES = {"vanilla", "sin", "nope", "rotary"}  # encodings before which a query may be scaled
IMAGE_SECTIONS = {
    "AMP_OPT_LEVEL",
    "AUG",
    "BASE",
    "CODE_VERSION",
    "DATA",
    "EVAL",
    "EVAL_MODE",
    "LOCAL_RANK",
    "MODEL",
    "OUTPUT",
    "PRINT_FREQ",
    "SAVE_FREQ",
    "SEED",
    "TAG",
    "TEST",
    "THROUGHPUT_MODE",
    "TRAIN",
    "SLURM_JOB_INFO",
}
VIT_TYPES = ("vit_s_16", "vit_b_16")
DATA_NAMES = {"imagenet": "imagenet2012"}


def read(path: str | os.PathLike, ignored: Collection[str] = ()) -> ForeignCheckpoint:
    """Returns the checkpoint at a path, in any of the formats.

    Args:
      path: a folder, a .pth file, or an address in a bucket of either.
      ignored: fields of a Hugging Face folder's config.json that are passed over.

    Raises:
      InputError: no such path, none of the formats, a file missing, damaged or refused, an unknown field.
    """
    path = pathlib.Path(*local_copies([str(path)], option="the checkpoint"))
    if path.is_file() and path.suffix in (".pth", ".pt"):
        return _read_images(path)
    if not path.is_dir():
        problem = "is neither a directory nor a .pth file" if path.exists() else "does not exist"
        raise InputError(
            f"{path} {problem}: expected a checkpoint of the PyTorch reference or a directory of Hugging Face"
        )
    pickled = _newest_pickle(path)
    if pickled is not None:
        return _read_images(pickled)
    settings = hf.without_fields(path / "config.json", hf.read_mapping(path / "config.json", missing=True), ignored)
    if (path / IMAGE_ENCODER_FILE).is_file() or "MODEL" in settings:
        return _read_images(path)
    if (path / "pe_config.json").is_file() or settings.get("pe_config") or (path / "best_model").is_dir():
        return _read_text(path, settings)
    if hf_images.is_image_folder(settings):
        return hf_images.read(path, settings)
    if (path / "config.json").is_file():
        return hf_decoders.read(path, settings)
    raise InputError(
        f"{path} is no checkpoint that can be read: expected config.json, pe_config.json and best_model/{hf.MODEL_FILE} "
        f"(text), best_model.pth or ckpt_epoch_N.pth (images), or config.json and {hf.MODEL_FILE} (Hugging Face)"
    )


def _newest_pickle(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns best_model.pth, or the ckpt_epoch_N.pth of the last epoch, or None."""
    if (folder / "best_model.pth").is_file():
        return folder / "best_model.pth"
    epochs = {
        int(found[1]): file
        for file in folder.glob("ckpt_epoch_*.pth")
        if (found := re.search(r"_(\d+)\.pth$", file.name))
    }
    return epochs[max(epochs)] if epochs else None


def _read_text(path: pathlib.Path, settings: Mapping[str, Any]) -> ForeignCheckpoint:
    """Reads a text checkpoint of the reference, whose layout is that of a GPT-2 of Hugging Face."""
    file, family = path / "config.json", FAMILIES["gpt2"]
    files = [file]
    hf.require_value(file, "model_type", settings.get("model_type", family.kind), family.kind)
    known = family.known_settings(file, {name: value for name, value in settings.items() if name != "pe_config"})
    scaling = {name: known.pop(name) for name in GPT2_SCALING}
    spec: dict[str, Any] = {"kind": "gpt2"} | known
    pe_file = path / "pe_config.json"
    if pe_file.is_file():
        spec |= _pe_spec(pe_file, hf.read_mapping(pe_file), {"MODEL"})
        files.append(pe_file)
    elif settings.get("pe_config"):
        positions = Field(dict).check(f"{file}: field 'pe_config'", settings["pe_config"])
        spec |= _pe_spec(file, positions, {"MODEL"})
    else:
        spec |= {"pe_type": "vanilla", "pe_apply_method": "input_add"}
    arguments = path / "train_args.json"
    if arguments.is_file():
        length = torch_config.SPEC_FIELDS["gpt2"]["block_size"]
        stored = hf.read_mapping(arguments).get("block_size")
        spec["block_size"] = length.check(f"{arguments}: field 'block_size'", stored) or 0
        files.append(arguments)
    if scaling != GPT2_SCALING and spec["pe_type"] not in LINEAR_QUERIES:
        name = next(name for name in scaling if scaling[name] != GPT2_SCALING[name])
        hf.require_value(file, name, scaling[name], GPT2_SCALING[name])
    folder = path / "best_model" if (path / "best_model").is_dir() else path

    def read_arrays() -> Arrays:
        arrays, weight_files = hf.read_weights(folder)
        state, left_out = hf_weights.known_state(family, arrays, spec["tie_word_embeddings"], weight_files[0])
        if scaling != GPT2_SCALING:
            state = hf.fold_attention_scaling(state, spec["n_embd"], spec["n_head"], scaling)
        all_files, encoder = [*files, *weight_files], folder / TEXT_ENCODER_FILE
        if encoder.is_file():
            all_files.append(encoder)
            state |= {weights.PE_PREFIX + name: leaf for name, leaf in hf.read_safetensors(encoder).items()}
        elif spec["pe_type"] == "seq_pe":
            raise InputError(f"{encoder} is missing: it holds the position encoder's weights")
        tables = _pop_fixed_table(spec, state)
        return Arrays(state, left_out | _reasons(tables, spec), tables, tuple(all_files))

    return of_spec(spec, read_arrays, hf.tokenizer_files(path))


def of_spec(
    spec: ReferenceSpec, read_arrays: Callable[[], Arrays], tokenizer_files: tuple[pathlib.Path, ...] = ()
) -> ForeignCheckpoint:
    """Returns the checkpoint of a spec and its arrays.

    Args:
      spec: settings under the reference's names (`interop.torch_config`).
      read_arrays: reads the arrays, under the reference's names, the position model's with the prefix `pe_model.`.
      tokenizer_files: paths of the tokenizer's files.

    Raises:
      InputError: a field or value without a counterpart here.
    """
    config = torch_config.config_from_spec(spec)
    return ForeignCheckpoint(config, tuple(weights.make_rules(config)), read_arrays, tokenizer_files)


def _read_images(path: pathlib.Path) -> ForeignCheckpoint:
    """Reads an image checkpoint of the reference: a .pth file, or a folder of safetensors."""
    if path.is_file():
        stored, files = pickles.read(path), (path,)
        if not isinstance(stored, dict) or "model" not in stored:
            raise InputError(f"{path} is no checkpoint of the reference: expected the keys model, pe_model, config")
        settings = stored.get("config")
        if not isinstance(settings, dict):
            settings, files = hf.read_mapping(path.parent / "config.json"), (path, path.parent / "config.json")
        model = hf.check_state_dict(stored["model"], path)
        encoder = hf.check_state_dict(stored.get("pe_model") or {}, path)
        file = path
    else:
        names = ("config.json", hf.MODEL_FILE, IMAGE_ENCODER_FILE)
        files = tuple(path / name for name in names if (path / name).is_file())
        settings, model = hf.read_mapping(path / "config.json"), hf.read_safetensors(path / hf.MODEL_FILE)
        encoder = hf.read_safetensors(path / IMAGE_ENCODER_FILE) if (path / IMAGE_ENCODER_FILE).is_file() else {}
        file = files[0]
    spec = _image_spec(file, settings, model)
    state = dict(model) | {weights.PE_PREFIX + name: leaf for name, leaf in encoder.items()}
    tables, grid_table = _pop_fixed_table(spec, state), f"{weights.PE_PREFIX}weight"
    reasons = _reasons(tables, spec)
    if spec.get("pe_apply_method") == "rotary_2d" and state.pop(grid_table, None) is not None:
        reasons = _reasons((grid_table,), spec)  # of a grid: not compared
    arrays = Arrays(state, reasons, tables, files)
    return of_spec(spec, lambda: arrays)


def _image_spec(file: pathlib.Path, settings: Mapping[str, Any], model: Mapping[str, np.ndarray]) -> ReferenceSpec:
    """Returns the spec of an image checkpoint from its settings and the shapes of its arrays."""
    check_names(str(file), settings)
    sections = {
        name: Field(dict, null=True).check(f"{file}: field '{name}'", settings.get(name)) or {}
        for name in ("MODEL", "DATA", "TRAIN")
    }

    def setting(section: str, name: str, field: str, default: Any) -> Any:
        """The value of a field, checked as the field of the spec; null and 0 = the default."""
        checked = torch_config.SPEC_FIELDS["vit"][field]
        value = sections[section].get(name)
        zero = value is None or (value == 0 and not isinstance(value, bool))
        return default if zero else checked.check(f"{file}: field '{section}.{name}'", value)

    kind = sections["MODEL"].get("TYPE")
    if not isinstance(kind, str) or kind not in VIT_TYPES:
        raise InputError(f"{file}: MODEL.TYPE is {format_value(kind)}, only {' and '.join(VIT_TYPES)} can be read")
    for name in ("USE_UNK_POS", "USE_IDX_EMB", "USE_DLOCR"):
        hf.require_value(file, f"TRAIN.{name}", sections["TRAIN"].get(name, False), False)
    names = {"patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2, "head.weight": 2}
    try:
        (width, *_, patch), (mlp_width, _), (classes, _) = (weights.shape_of(model, *one) for one in names.items())
    except InputError as error:
        raise InputError(f"{file} holds no vision transformer: {error}") from error
    return {
        "kind": "vit",
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in model if name.startswith("blocks.")}),
        "img_size": setting("DATA", "IMG_SIZE", "img_size", 224),
        "mlp_ratio": mlp_width / width,
        "patch_size": patch,
        "num_classes": classes,
        "num_heads": setting("MODEL", "NUM_HEADS", "num_heads", max(width // 64, 1)),
        "drop_path": setting("MODEL", "DROP_PATH_RATE", "drop_path", 0.0),
        "data_name": DATA_NAMES.get(format_value(sections["DATA"].get("DATASET")).strip("'"), "imagenet2012"),
        **_pe_spec(file, settings, IMAGE_SECTIONS),
    }


def _pe_spec(file: pathlib.Path, settings: Mapping[str, Any], other_fields: set[str]) -> dict[str, Any]:
    """Returns the part of a spec that the reference's PE_* and SEQPE_* settings describe.

    Args:
      file: path of the settings, for messages.
      settings: settings with the reference's names.
      other_fields: names that describe no position encoding, and are passed over.

    Raises:
      InputError: a field that is unknown or missing, or a value that would compute something else.
    """
    spec, encoder = {}, {}
    check_names(str(file), settings)
    fields, encoder_fields = torch_config.SPEC_FIELDS["vit"], torch_config.SPEC_FIELDS["seqpe_encoder"]
    for name, value in settings.items():
        where = f"{file}: field '{name}'"
        if value is None and name in {*PE_FIELDS, *ENCODER_FIELDS}:
            continue
        if name in PE_FIELDS:
            spec[PE_FIELDS[name]] = fields[PE_FIELDS[name]].check(where, value)
        elif name in ENCODER_FIELDS:
            encoder[ENCODER_FIELDS[name]] = encoder_fields[ENCODER_FIELDS[name]].check(where, value)
        elif name in REQUIRED_FIELDS:
            hf.require_value(file, name, value, REQUIRED_FIELDS[name])
        elif name not in TRAINING_FIELDS | other_fields:
            known = [*PE_FIELDS, *ENCODER_FIELDS, *TRAINING_FIELDS]
            raise InputError(f"{file}: field '{name}' is unknown.{suggest(name, known)}")
    if "pe_type" not in spec:
        raise InputError(f"{file}: field 'PE_TYPE' is missing, so the position encoding is unknown")
    if spec["pe_type"] != "seq_pe":
        return spec
    for name in ("PE_EMBED_DIM", "NUM_ATTENTION_HEADS"):
        if ENCODER_FIELDS[name] not in encoder:
            raise InputError(f"{file}: field '{name}' is missing")
    return spec | {"encoder": encoder | {"out_proj_dim": spec.get("pe_out_dim")}}


def _pop_fixed_table(spec: ReferenceSpec, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Removes the table of an encoding without parameters from a state, and returns it by name."""
    name = f"{weights.PE_PREFIX}weight"
    on_one_axis = spec["pe_type"] in ("sin", "alibi") or spec.get("pe_apply_method") == "rotary"
    return {name: state.pop(name)} if on_one_axis and spec["pe_type"] != "seq_pe" and name in state else {}


def _reasons(tables: Collection[str], spec: ReferenceSpec) -> dict[str, str]:
    return dict.fromkeys(tables, f"table of the fixed encoding '{spec['pe_type']}', computed here")


def num_channels(state: weights.State) -> int:
    """Returns the channels of the images that a model takes; 3 for a model of text."""
    kernel = "patch_embed.proj.weight"
    return weights.shape_of(state, kernel, 4)[1] if kernel in state else 3


def fixed_table(config: Config, model_spec: ModelSpec, rows: int) -> np.ndarray:
    """Returns the first rows of the table that the reference stores for an encoding without parameters on one axis.

    Args:
      config: config of the model.
      model_spec: ModelSpec of the same model.
      rows: number of positions, from 0.

    Returns:
      float32: sinusoidal [rows, width]; rotary [rows, head width], sines before cosines; ALiBi [rows, heads], slope times
      position.
    """
    kind, encoding = config.encoding.kind, model_spec.encoding
    if encoding.dims.prefix_tokens:  # its rows count the class token
        encoding = encoding.clone(dims=dataclasses.replace(encoding.dims, prefix_tokens=0))
    signal = encoding.apply({}, jnp.arange(rows, dtype=jnp.int32)[None, :, None], shape=(rows,))
    if kind == "sinusoidal":
        return np.asarray(signal.input_embedding[0])
    if kind == "rotary":
        cos, sin = (np.asarray(part[0, :, 0]) for part in signal.rotation)
        return np.concatenate([sin, cos], axis=-1)
    query, key = (np.asarray(part[0], np.float64) for part in signal.position_query_key)
    head_width = config.model.width // config.model.heads
    logits_LH = np.einsum("hf,lhf->lh", query[0], np.broadcast_to(key, (rows, *query.shape[1:])))
    return (logits_LH * head_width**0.5).astype(np.float32)


def write_reference(model: Any, output: str | os.PathLike) -> dict[str, Any]:
    """Writes a model in the reference's text or image layout.

    Args:
      model: a `seqpe_jax.Model` of a run.
      output: path of a folder that does not exist or is empty.

    Returns:
      {"source", "step", "files", "encoding", "parameters", "mapped": {parameter here: [arrays there]}}.

    Raises:
      InputError: a field that the reference has nothing like. Nothing is written then.
    """
    require_empty(output)
    config, kind, name = model.config, model.config.encoding.kind, model.folder or "the model"
    if model.model_spec.max_grid is not None:
        raise InputError(
            f"{name} is an export, which has no encoder of positions any more: give the --workdir of its run"
        )
    sizes = {"vocabulary": model.data_spec.vocabulary, "classes": model.data_spec.classes}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **sizes))
    spec = torch_config.spec_from_config(config, getattr(model.model_spec.encoding, "vector_width", 0))
    training = torch_config.training_settings(config)
    rules, params = weights.make_rules(config), jax.tree.map(np.asarray, model.params)
    if config.model.scan:
        params = params | {"model": transformer.unstack_layers(params["model"], config.model.layers)}
    state = weights.to_state(rules, params)
    if num_channels(state) != 3:
        raise InputError(f"{name} reads images of one channel: the reference's format knows three alone")
    if not config.is_image and kind in ("sinusoidal", "rotary", "alibi"):
        rows = config.encoding.max_position + (kind != "alibi")  # as many as the reference makes
        state[f"{weights.PE_PREFIX}weight"] = fixed_table(config, model.model_spec, rows)
    tokenizer = as_path(model.folder) / TOKENIZER_FILE if model.folder else None
    with atomic_dir(output) as folder:
        files = (_write_images if config.is_image else _write_text)(folder, spec, training, state)
        if tokenizer is not None and tokenizer.is_file():
            load_tokenizer(tokenizer).save(folder)
        names = [str(file.relative_to(folder)) for file in files]
    return {
        "source": model.folder,
        "step": model.step,
        "files": names,
        "encoding": kind,
        "parameters": num_params(model.params),
        "mapped": {rule.path: list(rule.reference_names) for rule in rules},
    }


def _write_text(
    folder: pathlib.Path, spec: ReferenceSpec, training: Mapping[str, Any], state: weights.State
) -> list[pathlib.Path]:
    """Writes a spec (kind gpt2), settings of its training and its arrays; returns the files."""
    positions = {"MODEL": {}} | _pe_settings(spec) | training
    model = {name: spec[name] for name in FAMILIES["gpt2"].fields if name in spec} | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "pe_config": positions,
        "reorder_and_upcast_attn": False,
        "use_cache": True,
        **GPT2_SCALING,
    }
    arguments = {
        "block_size": spec["block_size"],
        "eval_stride": spec["block_size"],
        "num_attention_heads": spec["n_head"],
        "dataset_name": None,
        "dataset_config_name": None,
        "seed": 0,
        "mixed_precision": "no",
        "attn_method": "sdpa",
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        **{name.lower(): value for name, value in positions.items() if name not in ("MODEL", "PE_OUT_PROJ_DIM")},
    }
    (folder / "best_model").mkdir()
    files = [folder / name for name in ("config.json", "pe_config.json", "train_args.json")]
    files[0].write_text(json.dumps(model, indent=2, sort_keys=True) + "\n")
    files[1].write_text(yaml.safe_dump(positions))
    files[2].write_text(json.dumps(arguments, indent=2) + "\n")
    return files + _write_safetensors(folder / "best_model", state, TEXT_ENCODER_FILE)


def _write_images(
    folder: pathlib.Path, spec: ReferenceSpec, training: Mapping[str, Any], state: weights.State
) -> list[pathlib.Path]:
    """Writes a spec (kind vit), settings of its training and its arrays; returns the files.

    With PyTorch installed best_model.pth, which the authors' scripts load; else model.safetensors and pe_model.safetensors.
    """
    settings = {
        "MODEL": {
            "TYPE": "vit_s_16" if spec["embed_dim"] <= 384 else "vit_b_16",
            "EMBED_DIM": spec["embed_dim"],
            "DEPTH": spec["depth"],
            "NUM_HEADS": spec["num_heads"],
            "NUM_CLASSES": spec["num_classes"],
            "DROP_PATH_RATE": spec["drop_path"],
        },
        "DATA": {
            "IMG_SIZE": spec["img_size"],
            "DATASET": next(
                (name for name, ours in DATA_NAMES.items() if ours == spec["data_name"]), spec["data_name"]
            ),
        },
        "TRAIN": {"PATCH_SIZE": spec["patch_size"]},
        **_pe_settings(spec),
        **training,
    }
    file = folder / "config.json"
    file.write_text(yaml.safe_dump(settings))
    try:
        import torch
    except ImportError:
        return [file, *_write_safetensors(folder, state, IMAGE_ENCODER_FILE)]
    model, encoder = _split_encoder(state)
    stored = {
        "model": {name: torch.from_numpy(leaf) for name, leaf in model.items()},
        "pe_model": {name: torch.from_numpy(leaf) for name, leaf in encoder.items()} or None,
        "max_accuracy": 0.0,
        "epoch": 0,
        "config": settings,
    }
    torch.save(stored, folder / "best_model.pth")
    return [file, folder / "best_model.pth"]


def _pe_settings(spec: ReferenceSpec) -> dict[str, Any]:
    """Returns the reference's PE_* and SEQPE_* settings of a spec."""
    encoder = spec.get("encoder") or {}
    settings = {name: spec[key] for name, key in PE_FIELDS.items() if key in spec}
    settings |= {name: encoder[key] for name, key in ENCODER_FIELDS.items() if key in encoder}
    return settings | (REQUIRED_FIELDS if encoder else {})


def _split_encoder(state: weights.State) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns (arrays of the model, arrays of the position model without their prefix)."""
    model = {name: leaf for name, leaf in state.items() if not name.startswith(weights.PE_PREFIX)}
    encoder = {name.removeprefix(weights.PE_PREFIX): leaf for name, leaf in state.items() if name not in model}
    return model, encoder


def _write_safetensors(folder: pathlib.Path, state: weights.State, encoder_file: str) -> list[pathlib.Path]:
    files = []
    for arrays, name in zip(_split_encoder(state), (hf.MODEL_FILE, encoder_file), strict=True):
        if arrays:
            save_file(arrays, folder / name, metadata={"format": "pt"})
            apply_umask(folder / name)  # safetensors makes it for its owner alone
            files.append(folder / name)
    return files
