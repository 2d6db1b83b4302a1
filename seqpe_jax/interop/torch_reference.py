"""The files of others: the PyTorch reference's text and image checkpoints, Hugging Face GPT-2 directories.

Text: a directory with config.json, pe_config.json (YAML inside), train_args.json and best_model/model.safetensors (the
model) + model_1.safetensors (the position model). Images: best_model.pth or ckpt_epoch_N.pth, keys model, pe_model, config;
without torch we write model.safetensors + pe_model.safetensors + config.json (YAML inside) in their place.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from seqpe_jax.data.cache import local_copies
from seqpe_jax.errors import InputError, suggest
from seqpe_jax.files import apply_umask
from seqpe_jax.interop import pickles, weights
from seqpe_jax.interop.arrays import MODEL, check_state_dict, read_mapping, read_safetensors, read_weights
from seqpe_jax.interop.torch_config import ReferenceSpec

TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # the files of one; the first set that is there counts
POSITIONS = {"text": "model_1.safetensors", "images": "pe_model.safetensors"}

# The reference's names of settings -> ours in a spec; the second table's go into its "encoder".
PE = {
    "PE_TYPE": "pe_type",
    "PE_APPLY_METHOD": "pe_apply_method",
    "USE_PE_MULTI_HEAD": "use_pe_multi_head",
    "USE_PE_QK_PER_LAYER": "use_pe_qk_per_layer",
    "PE_OUT_PROJ_DIM": "pe_out_dim",
    "SEQPE_SCALAR_SCALE": "seqpe_scalar_scale",
    "SINUSOIDAL_PE_BASE": "sinusoidal_pe_base",
    "PE_MAX_POSITION": "pe_max_position",
}
ENCODER = {
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
REQUIRED = {"SEQPE_SCALE_ATTN_WEIGHTS": True, "SEQPE_ADD_OUT_PROJ": True}  # other values compute something else
TRAINING = {  # how it was trained; changes nothing of what the weights compute
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
GPT2 = {
    "vocab_size",
    "n_layer",
    "n_embd",
    "n_head",
    "n_inner",
    "n_positions",
    "activation_function",
    "layer_norm_epsilon",
    "resid_pdrop",
    "attn_pdrop",
    "embd_pdrop",
    "initializer_range",
    "tie_word_embeddings",
}
GPT2_REQUIRED = {"model_type": "gpt2", "add_cross_attention": False}
# How attention logits are scaled there; ours divide by the square root of the head width, so that the weights that make
# queries take up what differs (`_rescaled`).
GPT2_SCALES = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
LINEAR = {"vanilla", "sin", "nope", "rotary"}  # encodings under which a query may be scaled before it gets its position
GPT2_ABOUT = {
    "pe_config",
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "n_ctx",
    "reorder_and_upcast_attn",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "task_specific_params",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "output_past",
    "id2label",
    "label2id",
    "finetuning_task",
    "gradient_checkpointing",
    "_name_or_path",
    "_num_labels",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "predict_special_tokens",
}
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


@dataclasses.dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint of others, read.

    Attributes:
      spec: see `interop.settings`; state: arrays under the reference's names, the position model's with `pe_model.`.
      dropped: what the source stores beside the model's weights, and why they are none; tables: those of them that fixed
        encodings look up there and compute here.
      files: what was read; tokenizer: files of one, if it has any.
    """

    spec: ReferenceSpec
    state: dict[str, np.ndarray]
    dropped: dict[str, str]
    tables: dict[str, np.ndarray]
    files: tuple[pathlib.Path, ...]
    tokenizer: tuple[pathlib.Path, ...] = ()


def read(path: str | pathlib.Path) -> ForeignCheckpoint:
    """Returns the checkpoint at a path, whichever of the formats it has.

    Raises:
      InputError: no such path, none of the formats, a file missing, damaged or refused, an unknown field.
    """
    path = pathlib.Path(*local_copies([str(path)], option="the checkpoint"))
    if path.is_file() and path.suffix in (".pth", ".pt"):
        return _images(path)
    if not path.is_dir():
        what = "is neither a directory nor a .pth file" if path.exists() else "does not exist"
        raise InputError(
            f"{path} {what}: expected a checkpoint of the PyTorch reference or a Hugging Face GPT-2 directory"
        )
    pickled = path / "best_model.pth"
    if not pickled.is_file():
        epochs = {
            int(found[1]): file
            for file in path.glob("ckpt_epoch_*.pth")
            if (found := re.search(r"_(\d+)\.pth$", file.name))
        }
        pickled = epochs[max(epochs)] if epochs else pickled
    if pickled.is_file():
        return _images(pickled)
    if (path / POSITIONS["images"]).is_file() or "MODEL" in read_mapping(path / "config.json", missing=True):
        return _images(path)
    if (path / "config.json").is_file():
        return _text(path)
    raise InputError(
        f"{path} is no checkpoint that can be read: expected config.json, pe_config.json and best_model/{MODEL} (text), "
        f"best_model.pth or ckpt_epoch_N.pth (images), or config.json and {MODEL} (Hugging Face GPT-2)"
    )


def _text(path: pathlib.Path) -> ForeignCheckpoint:
    settings = read_mapping(path / "config.json")
    spec: dict[str, Any] = {"kind": "gpt2"}
    scales = dict(GPT2_SCALES)
    for name, value in settings.items():
        if name in GPT2:
            spec[name] = value
        elif name in GPT2_REQUIRED:
            _require(path / "config.json", name, value, GPT2_REQUIRED[name])
        elif name in GPT2_SCALES:
            scales[name] = bool(value)
        elif name not in GPT2_ABOUT:
            raise InputError(f"{path / 'config.json'}: field '{name}' is unknown.{suggest(name, GPT2 | GPT2_ABOUT)}")
    positions = path / "pe_config.json"
    files = [path / "config.json"]
    if positions.is_file() or settings.get("pe_config"):
        source = positions if positions.is_file() else path / "config.json"
        spec |= _positions(source, read_mapping(positions) if positions.is_file() else settings["pe_config"], {"MODEL"})
        files += [positions] if positions.is_file() else []
    else:
        spec |= {"pe_type": "vanilla", "pe_apply_method": "input_add"}
    arguments = path / "train_args.json"
    if arguments.is_file():
        spec["block_size"] = read_mapping(arguments).get("block_size") or 0
        files.append(arguments)
    folder = path / "best_model" if (path / "best_model").is_dir() else path
    found, holding = read_weights(folder)
    files += holding
    state, dropped = _gpt2_names(found, holding[0], spec)
    if scales != GPT2_SCALES:
        if spec["pe_type"] not in LINEAR:
            name = next(name for name in scales if scales[name] != GPT2_SCALES[name])
            _require(path / "config.json", name, scales[name], GPT2_SCALES[name])
        state = _rescaled(state, spec, scales)
    encoder = folder / POSITIONS["text"]
    if encoder.is_file():
        files.append(encoder)
        state |= {weights.ENCODER + name: leaf for name, leaf in read_safetensors(encoder).items()}
    elif spec["pe_type"] == "seq_pe":
        raise InputError(f"{encoder} is missing: it holds the position encoder's weights")
    tables = _fixed_tables(spec, state)
    dropped |= dict.fromkeys(tables, f"table of the fixed encoding '{spec['pe_type']}', computed here")
    offered = (tuple(path / name for name in names) for names in TOKENIZERS)
    tokenizer = next((files for files in offered if all(file.is_file() for file in files)), ())
    return ForeignCheckpoint(spec, state, dropped, tables, tuple(files), tokenizer)


def _images(path: pathlib.Path) -> ForeignCheckpoint:
    if path.is_file():
        stored, files = pickles.read(path), (path,)
        if not isinstance(stored, dict) or "model" not in stored:
            raise InputError(f"{path} is no checkpoint of the reference: expected the keys model, pe_model, config")
        settings = stored.get("config")
        if not isinstance(settings, dict):
            settings, files = read_mapping(path.parent / "config.json"), (path, path.parent / "config.json")
        model, encoder = check_state_dict(stored["model"], path), check_state_dict(stored.get("pe_model") or {}, path)
    else:
        files = tuple(
            file for file in (path / "config.json", path / MODEL, path / POSITIONS["images"]) if file.is_file()
        )
        settings, model = read_mapping(path / "config.json"), read_safetensors(path / MODEL)
        encoder = read_safetensors(path / POSITIONS["images"]) if (path / POSITIONS["images"]).is_file() else {}
    where = files[0] if path.is_dir() else path
    sections = {name: settings.get(name) or {} for name in ("MODEL", "DATA", "TRAIN")}
    kind = sections["MODEL"].get("TYPE")
    if kind not in VIT_TYPES:
        raise InputError(f"{where}: MODEL.TYPE is {kind!r}, only {' and '.join(VIT_TYPES)} can be read")
    for name in ("USE_UNK_POS", "USE_IDX_EMB", "USE_DLOCR"):
        _require(where, f"TRAIN.{name}", sections["TRAIN"].get(name, False), False)
    kernel = model.get("patch_embed.proj.weight")
    mlp = model.get("blocks.0.mlp.fc1.weight")
    if kernel is None or kernel.ndim != 4 or mlp is None or "head.weight" not in model:
        raise InputError(f"{where} holds no vision transformer: patch_embed.proj, blocks.0.mlp.fc1 or head is missing")
    width = len(kernel)
    spec = {
        "kind": "vit",
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in model if name.startswith("blocks.")}),
        "img_size": sections["DATA"].get("IMG_SIZE", 224),
        "mlp_ratio": len(mlp) / width,
        "patch_size": kernel.shape[-1],
        "num_classes": len(model["head.weight"]),
        "num_heads": sections["MODEL"].get("NUM_HEADS") or width // 64,
        "drop_path": sections["MODEL"].get("DROP_PATH_RATE") or 0.0,
        "data_name": DATA_NAMES.get(str(sections["DATA"].get("DATASET")), "imagenet2012"),
        **_positions(where, settings, IMAGE_SECTIONS),
    }
    state = dict(model) | {weights.ENCODER + name: leaf for name, leaf in encoder.items()}
    tables, grid_table = _fixed_tables(spec, state), f"{weights.ENCODER}weight"
    if spec.get("pe_apply_method") == "rotary_2d" and state.pop(grid_table, None) is not None:
        tables = {grid_table: np.zeros((0, 0), np.float32)}
    dropped = dict.fromkeys(tables, f"table of the fixed encoding '{spec['pe_type']}', computed here")
    return ForeignCheckpoint(spec, state, dropped, tables, files)


def _positions(file: pathlib.Path, settings: Mapping[str, Any], others: set[str]) -> dict[str, Any]:
    """The part of a spec that the reference's PE_* and SEQPE_* settings tell."""
    spec, encoder = {}, {}
    for name, value in settings.items():
        if name in PE:
            spec[PE[name]] = value
        elif name in ENCODER:
            encoder[ENCODER[name]] = value
        elif name in REQUIRED:
            _require(file, name, value, REQUIRED[name])
        elif name not in TRAINING | others:
            raise InputError(f"{file}: field '{name}' is unknown.{suggest(name, [*PE, *ENCODER, *TRAINING])}")
    if "pe_type" not in spec:
        raise InputError(f"{file}: field 'PE_TYPE' is missing, so the position encoding is unknown")
    if spec["pe_type"] != "seq_pe":
        return spec
    missing = [
        name
        for name, ours in ENCODER.items()
        if ours in ("pe_embed_dim", "num_attention_heads") and ours not in encoder
    ]
    if missing:
        raise InputError(f"{file}: field '{missing[0]}' is missing")
    return spec | {"encoder": encoder | {"out_proj_dim": spec.get("pe_out_dim")}}


def _gpt2_names(
    found: dict[str, np.ndarray], file: pathlib.Path, spec: ReferenceSpec
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns (arrays with the prefix `transformer.`, what is left out and why)."""
    state, dropped = {}, {}
    for name, leaf in found.items():
        full = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if full.endswith((".attn.bias", ".attn.masked_bias")):
            dropped[name] = "causal mask"
        else:
            state[full] = leaf
    if spec.get("tie_word_embeddings", True):
        if state.pop("lm_head.weight", None) is not None:
            dropped["lm_head.weight"] = "tied to the token embedding"
    elif "lm_head.weight" not in state:
        raise InputError(
            f"{file} lacks lm_head.weight, and config.json has tie_word_embeddings=false: give all its weights"
        )
    return state, dropped


def _rescaled(state: dict[str, np.ndarray], spec: ReferenceSpec, scales: Mapping[str, bool]) -> dict[str, np.ndarray]:
    """A state whose queries have taken up how attention logits are scaled there: the third of c_attn that makes them."""
    changed, width = dict(state), int(spec.get("n_embd", 0))
    for name in state:
        found = re.fullmatch(r"transformer\.h\.(\d+)\.attn\.c_attn\.(weight|bias)", name)
        if found:
            factor = 1.0 if scales["scale_attn_weights"] else (width / int(spec["n_head"])) ** 0.5
            factor /= int(found[1]) + 1 if scales["scale_attn_by_inverse_layer_idx"] else 1
            array = np.array(state[name], np.float32)
            array[..., :width] *= np.float32(factor)
            changed[name] = array
    return changed


def _fixed_tables(spec: ReferenceSpec, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes the table of a fixed encoding out of a state."""
    name = f"{weights.ENCODER}weight"
    on_one_axis = spec["pe_type"] in ("sin", "alibi") or spec.get("pe_apply_method") == "rotary"
    return {name: state.pop(name)} if on_one_axis and spec["pe_type"] != "seq_pe" and name in state else {}


def _require(file: pathlib.Path, name: str, value: Any, wanted: Any) -> None:
    if value != wanted:
        raise InputError(f"{file}: field '{name}' is {value!r}, only {wanted!r} is supported")


def write_text(
    folder: pathlib.Path, spec: ReferenceSpec, training: ReferenceSpec, state: weights.State
) -> list[pathlib.Path]:
    """Writes a spec (kind gpt2), how it was trained, and its arrays in the reference's text layout; returns the files."""
    positions = {"MODEL": {}} | _settings(spec) | training
    model = {name: spec[name] for name in GPT2 if name in spec} | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "pe_config": positions,
        "reorder_and_upcast_attn": False,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "use_cache": True,
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
    return files + _weights(folder / "best_model", state, POSITIONS["text"])


def write_images(
    folder: pathlib.Path, spec: ReferenceSpec, training: ReferenceSpec, state: weights.State
) -> list[pathlib.Path]:
    """Writes a spec (kind vit), how it was trained, and its arrays in the reference's image layout; returns the files.

    With torch best_model.pth, which the authors' scripts load; without it model.safetensors and pe_model.safetensors.
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
        **_settings(spec),
        **training,
    }
    file = folder / "config.json"
    file.write_text(yaml.safe_dump(settings))
    try:
        import torch
    except ImportError:
        return [file, *_weights(folder, state, POSITIONS["images"])]
    model, encoder = _parted(state)
    stored = {
        "model": {name: torch.from_numpy(leaf) for name, leaf in model.items()},
        "pe_model": {name: torch.from_numpy(leaf) for name, leaf in encoder.items()} or None,
        "max_accuracy": 0.0,
        "epoch": 0,
        "config": settings,
    }
    torch.save(stored, folder / "best_model.pth")
    return [file, folder / "best_model.pth"]


def _settings(spec: ReferenceSpec) -> dict[str, Any]:
    """The reference's PE_* and SEQPE_* settings of a spec."""
    encoder = spec.get("encoder") or {}
    found = {name: spec[ours] for name, ours in PE.items() if ours in spec}
    return (
        found
        | {name: encoder[ours] for name, ours in ENCODER.items() if ours in encoder}
        | (REQUIRED if encoder else {})
    )


def _parted(state: weights.State) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    encoder = {
        name.removeprefix(weights.ENCODER): leaf for name, leaf in state.items() if name.startswith(weights.ENCODER)
    }
    return {name: leaf for name, leaf in state.items() if not name.startswith(weights.ENCODER)}, encoder


def _weights(folder: pathlib.Path, state: weights.State, second: str) -> list[pathlib.Path]:
    files = []
    for arrays, name in zip(_parted(state), (MODEL, second), strict=True):
        if arrays:
            save_file(arrays, folder / name, metadata={"format": "pt"})
            apply_umask(folder / name)  # safetensors makes it for its owner alone
            files.append(folder / name)
    return files
