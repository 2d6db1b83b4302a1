"""Models of the PyTorch reference, from its files or from arrays in memory."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax.config import Config, ModelDims
from seqpe_jax.data import registry
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.encodings.seqpe import SeqPE
from seqpe_jax.errors import InputError
from seqpe_jax.interop import torch_config, weights
from seqpe_jax.interop.foreign import ForeignCheckpoint
from seqpe_jax.interop.torch_reference import fixed_table, num_channels
from seqpe_jax.model import Model
from seqpe_jax.models.build import DataSpec, ModelSpec, Params


class PrecomputedVectors(nn.Module):
    """Position vectors that were computed before, as a parameter `given`, in place of the encoder that computes them.

    Attributes:
      inner: encoding whose vectors they are.
      kind: name of that encoding.
      shape: shape of the vectors, (P, L, E); for encodings without parameters, rows of the reference's tables.
    """

    inner: nn.Module
    kind: str
    shape: tuple[int, ...]

    def setup(self) -> None:
        """Shares the names of the inner encoding's parameters."""
        nn.share_scope(self, self.inner)
        self.given = self.param("given", nn.initializers.zeros, self.shape, jnp.float32)

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns the signal of the vectors.

        Args:
          positions_PLA: not read, since the vectors belong to fixed positions.
          shape: not read.
          deterministic: not read.

        Raises:
          InputError: the encoding has no vectors.
        """
        vectors_PLE = self.given
        if self.kind == "seqpe":
            return self.inner.signal(vectors_PLE)
        if self.kind == "sinusoidal":
            return PositionSignal(input_embedding=vectors_PLE)
        if self.kind == "rotary":
            sin, cos = jnp.split(vectors_PLE[:, :, None], 2, axis=-1)
            return PositionSignal(rotation=(cos, sin))
        if self.kind == "alibi":
            query = jnp.full_like(vectors_PLE[..., None], self.inner.dims.head_width**-0.5)
            return PositionSignal(position_query_key=(query, vectors_PLE[..., None]))
        raise InputError(f"signal= makes no sense for encoding '{self.kind}'")


def from_state_dicts(
    config: Mapping[str, Any],
    model_state: weights.State | None,
    encoder_state: weights.State | None = None,
    signal: Any = None,
) -> Model:
    """Returns the model of arrays in memory under the reference's names.

    Args:
      config: settings of kind gpt2, vit or seqpe_encoder (`interop.torch_config`).
      model_state: arrays of the model; None = an encoder alone.
      encoder_state: arrays of the position model; None = `signal` has its vectors, or the encoding has no parameters.
      signal: float32[P, L, E], position vectors in place of an encoder.

    Raises:
      InputError: an unknown field, an array missing, left over, of another shape or not finite.
    """
    if model_state is None:
        if encoder_state is None:
            raise InputError("no weights: give model_state, or encoder_state for an encoder alone")
        return _encoder_model(config, _with_prefix(encoder_state))
    if encoder_state is not None and signal is not None:
        raise InputError("give encoder_state or signal, not both: one replaces the other")
    spec = dict(config)
    state = dict(model_state) | (_with_prefix(encoder_state) if encoder_state is not None else {})
    head, tokens = state.get("lm_head.weight"), state.get("transformer.wte.weight")
    if head is not None and tokens is not None:
        spec.setdefault("tie_word_embeddings", np.array_equal(head, tokens))
        if spec["tie_word_embeddings"]:
            state.pop("lm_head.weight")
    if spec.get("pe_type") == "seq_pe" and encoder_state is not None and not spec.get("encoder"):
        spec["encoder"] = _infer_encoder_spec(spec, encoder_state)
    if spec.get("pe_type") == "seq_pe" and encoder_state is None and signal is None:
        raise InputError("pe_type='seq_pe' needs encoder_state, or given vectors as signal")
    return from_config(torch_config.config_from_spec(spec), state, signal)


def from_config(config: Config, state: weights.State, signal: Any = None) -> Model:
    """Returns the model of a config and of arrays under the reference's names.

    Args:
      config: config of the model.
      state: arrays, the position model's with the prefix `pe_model.`.
      signal: float32[P, L, E], position vectors in place of an encoder.

    Raises:
      InputError: an array is missing, left over, of another shape or not finite.
    """
    data_spec = _data_spec(config, state)
    model_spec, rules = ModelSpec.of(config, data_spec), weights.make_rules(config)
    shapes = model_spec.shapes
    if signal is not None:
        vectors_PLE = np.asarray(signal, np.float32)
        rules = [rule for rule in rules if not rule.path.startswith("encoding/encoder/")]
        encoding = PrecomputedVectors(model_spec.encoding, config.encoding.kind, vectors_PLE.shape)
        model_spec = dataclasses.replace(model_spec, encoding=encoding, has_vectors=False)
        others = {name: shape for name, shape in shapes["encoding"].items() if name != "encoder"}
        shapes = shapes | {"encoding": others | {"given": jax.ShapeDtypeStruct(vectors_PLE.shape, jnp.float32)}}
    params = weights.to_params(rules, state)
    if signal is not None:
        params["encoding"] = dict(params.get("encoding", {})) | {"given": vectors_PLE}
    params = check_params(params, shapes)
    return Model(config, model_spec, data_spec, lambda: params)


def _data_spec(config: Config, state: weights.State) -> DataSpec:
    """Returns the data spec of a config with a vocabulary or classes; photos are normalised as their data set is."""
    if not config.is_image:
        return DataSpec(vocabulary=config.model.vocabulary)
    dataset, channels = registry.get(config.data.name), num_channels(state)
    known = (dataset.mean, dataset.std) if dataset.channels == channels else ((), ())
    return DataSpec(classes=config.model.classes, channels=channels, mean=known[0], std=known[1])


def check_params(params: Any, shapes: Any) -> Any:
    """Returns parameters as float32.

    Args:
      params: arrays.
      shapes: tree of the same structure with the expected shapes.

    Raises:
      InputError: an array has another shape, or is not finite.
    """

    def check(path: Any, leaf: np.ndarray, wanted: jax.ShapeDtypeStruct) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if leaf.shape != wanted.shape:
            raise InputError(f"parameter {name} has shape {leaf.shape}, but the config asks for {wanted.shape}")
        with np.errstate(over="ignore", invalid="ignore"):  # numbers beyond float32 are refused as infinite ones
            array = leaf.astype(np.float32)
        if not np.isfinite(array).all():
            raise InputError(f"parameter {name} holds NaN or infinite values: the checkpoint is of a run that failed")
        return array

    return jax.tree_util.tree_map_with_path(check, params, shapes)


def _encoder_model(config: Mapping[str, Any], state: weights.State) -> Model:
    encoding = torch_config.encoding_from_spec({"kind": "seqpe_encoder"} | dict(config))
    axes, out = config.get("data_dim", 1), encoding.output_width
    alone = dataclasses.replace(encoding, mode="input_add", qk="none", per_head=False)
    dims = ModelDims(layers=1, width=out, heads=1, grid=(1,) * axes)
    alone.check(axes)
    alone.check_dims(dims)
    module = SeqPE(alone, dims)
    rules = weights.encoder_rules(encoding.layers, axes, encoding.cls, encoding.final_norm)
    nothing = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    model_spec = ModelSpec(module, None, nothing, (1,) * axes, encoding.max_position, encoding.base)
    params = check_params(weights.to_params(rules, state) | {"model": {}}, model_spec.shapes)
    return Model(Config(encoding=encoding), model_spec, DataSpec(), lambda: params)


def _with_prefix(state: weights.State) -> dict[str, Any]:
    """Returns the position model's arrays with the prefix that `weights` expects."""
    return {
        name if name.startswith(weights.PE_PREFIX) else weights.PE_PREFIX + name: leaf for name, leaf in state.items()
    }


def _infer_encoder_spec(spec: Mapping[str, Any], state: weights.State) -> dict[str, Any]:
    """Returns settings of an encoder, which its config leaves out, from the shapes of its arrays; heads as the model's."""
    state = {name.removeprefix(weights.PE_PREFIX): leaf for name, leaf in state.items()}
    digit_indices, width = weights.shape_of(state, "pos_of_seqpe_embed.weight", 2)
    axes = weights.shape_of(state, "dim_token_embed", 3)[0] if "dim_token_embed" in state else 1
    return {
        "pe_embed_dim": width,
        "max_digits": digit_indices // axes,
        "data_dim": axes,
        "layer_num": len({name.split(".")[1] for name in state if name.startswith("transformers.")}),
        "num_attention_heads": spec.get("n_head") or spec.get("num_heads"),
        "use_cls_token": "cls_token_embed" in state,
        "use_last_layernorm": "layernorm.weight" in state,
        "out_proj_dim": weights.shape_of(state, "out_proj.weight", 2)[0],
    }


def from_checkpoint(source: ForeignCheckpoint) -> Model:
    """Returns the model of a checkpoint; the arrays of a text model are read at their first use.

    Args:
      source: result of `torch_reference.read`.

    Raises:
      InputError: settings and arrays do not fit together, or a stored table is not the one that the settings describe.
    """
    config = source.config
    data_spec = source.data_spec or _data_spec(config, source.arrays.state if config.is_image else {})
    model_spec = ModelSpec.of(config, data_spec)
    return Model(config, model_spec, data_spec, lambda: _params_of(source, model_spec))


def _params_of(source: ForeignCheckpoint, model_spec: ModelSpec) -> Params:
    """The parameters of a checkpoint. Raises: InputError: as `from_checkpoint`."""
    params = check_params(weights.to_params(source.rules, source.arrays.state), model_spec.shapes)
    for name, table in source.arrays.fixed_tables.items():
        rows = min(weights.shape_of({name: table}, name, 2)[0], 64)
        ours = fixed_table(source.config, model_spec, rows)
        if table.shape[1] != ours.shape[1] or not np.abs(ours - table[:rows]).max() <= 1e-4:  # not a number, either
            raise InputError(
                f"tensor {name} is not the table of encoding '{source.config.encoding.kind}' that its config describes"
            )
    return params
