"""Models of the PyTorch reference, from its files or from arrays in memory."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax.build import make_objective, saved, spacing_of
from seqpe_jax.config import Config, EncodingConfig
from seqpe_jax.encodings.composed import Composed
from seqpe_jax.encodings.seqpe import SeqPE
from seqpe_jax.encodings.signal import PositionSignal
from seqpe_jax.errors import InputError
from seqpe_jax.interop import folders, settings, weights
from seqpe_jax.objectives.objective import Objective
from seqpe_jax.objectives.task import Classification, LanguageModelling
from seqpe_jax.runtime.checkpoint import Checkpoints

Start = int | Sequence[int] | None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a model needs to know of its data when there are none."""

    task: LanguageModelling | Classification
    inputs: jax.ShapeDtypeStruct
    model_fields: dict[str, int]
    prefix: int


@dataclasses.dataclass(frozen=True)
class ReferenceModel:
    """A model whose weights come from the PyTorch reference.

    Attributes:
      config: of the model; of an encoder alone, its encoding section.
      params: {"encoding": ..., "model": ...}, float32, in our own form.
      encoding, model: the Flax modules; an encoder alone has no model.
      signal: given vectors float32[P, L, E] in place of an encoder, or None.
    """

    config: Config | EncodingConfig
    params: Any
    encoding: nn.Module
    model: nn.Module | None
    signal: jax.Array | None = None

    def logits(self, inputs: Any, start: Start = None) -> jax.Array:
        """Returns logits: float32[B, L, V] of tokens int32[B, L], float32[B, V] of images float32[B, H, W, C], normalised.

        Args:
          start: the first position, an int or one per axis; None = the origin.

        Raises:
          InputError: inputs of another kind or size, positions beyond the digits, or an encoder alone.
        """
        if self.model is None:
            raise InputError("this is a position encoder alone: it has no logits, only encode_positions")
        inputs = jnp.asarray(inputs)
        text = self.config.model.kind == "gpt2"
        if inputs.ndim != (2 if text else 4):
            wanted = "tokens int32[B, L]" if text else "images float32[B, H, W, C]"
            raise InputError(f"this model reads {wanted}, got an array of shape {inputs.shape}")
        return self._logits(self.params, inputs, self._start(start, inputs.shape))

    def encode_positions(self, positions: Any) -> jax.Array:
        """Returns the vectors float32[R, E] of positions int32[R] or int32[R, A], in units of their last digit.

        Raises:
          InputError: the encoding has no vectors, or positions beyond the digits.
        """
        if self._encoder is None:
            raise InputError("this model has no encoder of positions: only 'seq_pe' with its own weights has vectors")
        positions = jnp.asarray(positions, jnp.int32)
        positions_RA = positions[:, None] if positions.ndim == 1 else positions
        if positions_RA.ndim != 2 or positions_RA.shape[1] != self._encoder.axes:
            raise InputError(f"positions must be int32[R, {self._encoder.axes}], got shape {positions.shape}")
        self._check(np.asarray(positions_RA))
        return self._vectors(self.params, positions_RA)

    def apply(self, params: Any, inputs: jax.Array, start: jax.Array, signal: jax.Array | None = None) -> jax.Array:
        """Returns `logits` as a pure function of parameters and, where they are given, vectors; start int32[A]."""
        shape = self._shape(inputs.shape)
        variables = {"params": params["encoding"]}
        if signal is not None:
            effect = self._given(variables, signal)
        else:
            effect = self.encoding.apply(variables, self._positions(start, shape)[None], shape=shape)
        return self.model.apply({"params": params["model"]}, inputs, effect)

    @property
    def _encoder(self) -> SeqPE | None:
        """What makes vectors of positions, if there is one."""
        first = self.encoding.parts[0] if isinstance(self.encoding, Composed) else self.encoding
        return first if isinstance(first, SeqPE) and self.signal is None else None

    def _positions(self, start: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Where the places of a window or grid stand, int32[L, A], that begins so many tokens or patches on."""
        spacing = spacing_of(self.config)
        return spacing.grid(shape) + spacing.unit * jnp.asarray(start, jnp.int32)

    @functools.cached_property
    def _logits(self) -> Any:
        return jax.jit(lambda params, inputs, start: self.apply(params, inputs, start, self.signal))

    @functools.cached_property
    def _vectors(self) -> Any:
        return jax.jit(lambda params, rows: self.encoding.apply({"params": params["encoding"]}, rows, method="vectors"))

    def _shape(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        return inputs[1:2] if self.config.model.kind == "gpt2" else self.config.grid_of(inputs[1:3])

    def _given(self, variables: Any, vectors_PLE: jax.Array) -> PositionSignal:
        """The effect of given vectors; those of the fixed encodings are the rows of the reference's tables."""
        kind = self.config.encoding.kind
        if kind == "seqpe":
            return self.encoding.apply(variables, vectors_PLE, method="signal")
        if kind == "sinusoidal":
            return PositionSignal(added=vectors_PLE)
        if kind == "rotary":
            sin, cos = jnp.split(vectors_PLE[:, :, None], 2, axis=-1)
            return PositionSignal(rotation=(cos, sin))
        if kind == "alibi":
            head_width = self.config.model.width // self.config.model.heads
            query = jnp.full_like(vectors_PLE[..., None], head_width**-0.5)
            return PositionSignal(features=(query, vectors_PLE[..., None]))
        raise InputError(f"signal= makes no sense for encoding '{kind}'")

    def _start(self, start: Start, inputs: tuple[int, ...]) -> jax.Array:
        shape = self._shape(inputs)
        first = np.zeros(len(shape), np.int32) if start is None else np.atleast_1d(np.asarray(start, np.int32))
        if first.shape != (len(shape),):
            raise InputError(f"start must be {len(shape)} int(s), one per axis, got {start!r}")
        if self._encoder is not None:
            self._check(np.asarray(self._positions(first, shape)))
        elif first.any() and self.signal is not None:
            raise InputError("start= makes no sense with given vectors: they are those of the positions read")
        elif first.any() and self.config.encoding.kind in ("learned", "sinusoidal") and len(shape) > 1:
            raise InputError(f"encoding '{self.config.encoding.kind}' has no grids elsewhere: leave start at the origin")
        return jnp.asarray(first)

    def _check(self, positions: np.ndarray) -> None:
        digits, base = self._encoder.digits, self._encoder.base
        reach = base**digits
        if positions.size and (positions.min() < 0 or positions.max() >= reach):
            worst = positions.max() if positions.min() >= 0 else positions.min()
            raise InputError(
                f"position {worst} is outside 0 .. {reach - 1}, what {digits} digits in base {base} can write"
            )


def from_state_dicts(
    config: Mapping[str, Any],
    model_state: weights.State | None,
    encoder_state: weights.State | None = None,
    signal: Any = None,
) -> ReferenceModel:
    """Returns the model of weights in memory under the reference's names.

    Args:
      config: see `interop.settings`; kinds gpt2, vit, seqpe_encoder.
      model_state: the model's arrays; None = an encoder alone.
      encoder_state: the position model's arrays; None = given by `signal`, or an encoding that needs none.
      signal: float32[P, L, E], vectors in place of an encoder.

    Raises:
      InputError: an unknown field, an array missing, left over, of another shape or not finite.
    """
    if model_state is None:
        if encoder_state is None:
            raise InputError("no weights: give model_state, or encoder_state for an encoder alone")
        return _encoder_alone(config, _named(encoder_state))
    if encoder_state is not None and signal is not None:
        raise InputError("give encoder_state or signal, not both: one stands in place of the other")
    spec = dict(config)
    state = dict(model_state) | (_named(encoder_state) if encoder_state is not None else {})
    state.pop("lm_head.weight", None) if _tied(state) else None
    if spec.get("pe_type") == "seq_pe" and encoder_state is not None and not spec.get("encoder"):
        spec["encoder"] = _inferred(spec, encoder_state)
    if spec.get("pe_type") == "seq_pe" and encoder_state is None and signal is None:
        raise InputError("pe_type='seq_pe' needs encoder_state, or given vectors as signal")
    return from_config(settings.config_of(spec), state, signal)


def from_config(config: Config, state: weights.State, signal: Any = None) -> ReferenceModel:
    """Returns the model of a config and of weights under the reference's names (the position model's with `pe_model.`).

    Raises:
      InputError: as `from_state_dicts`.
    """
    objective = objective_of(config, channels_of(state))
    rules, shapes = weights.rules(config), jax.eval_shape(objective.init, jax.random.PRNGKey(0))
    if signal is not None:
        rules = [rule for rule in rules if not rule.ours.startswith("encoding/encoder/")]
        shapes["encoding"].pop("encoder", None)
    params = checked(weights.to_params(rules, state), shapes)
    given = None if signal is None else jnp.asarray(signal, jnp.float32)
    return ReferenceModel(config, params, objective.encoding, objective.model, given)


def objective_of(config: Config, channels: int = 3) -> Objective:
    """Returns model and encoding of a config that names its own vocabulary or classes, without its data."""
    if config.reads_images:
        inputs = jax.ShapeDtypeStruct((1, *config.data.size, channels), jnp.float32)
        task = Classification(config.objective.label_smoothing, config.objective.mixing)
        sizes = Sizes(task, inputs, {"classes": config.model.classes}, prefix=1)
    else:
        inputs = jax.ShapeDtypeStruct((1, config.data.length), jnp.int32)
        sizes = Sizes(LanguageModelling(), inputs, {"vocabulary": config.model.vocabulary}, prefix=0)
    return make_objective(config, sizes)


def channels_of(state: weights.State) -> int:
    """Returns the channels of the images that a state reads; 3 where it reads none."""
    kernel = state.get("patch_embed.proj.weight")
    return 3 if kernel is None else np.shape(kernel)[1]


def checked(params: Any, shapes: Any) -> Any:
    """Returns parameters as float32. Raises: InputError: an array has another shape than wanted, or is not finite."""

    def check(path: Any, leaf: np.ndarray, wanted: jax.ShapeDtypeStruct) -> np.ndarray:
        name = "/".join(str(key.key) for key in path)
        if leaf.shape != wanted.shape:
            raise InputError(f"parameter {name} has shape {leaf.shape}, but the config asks for {wanted.shape}")
        if not np.isfinite(leaf.astype(np.float32)).all():
            raise InputError(f"parameter {name} holds NaN or infinite values: the checkpoint is of a run that failed")
        return leaf.astype(np.float32)

    return jax.tree_util.tree_map_with_path(check, params, shapes)


def _encoder_alone(config: Mapping[str, Any], state: weights.State) -> ReferenceModel:
    encoding = settings.encoding_of({"kind": "seqpe_encoder"} | dict(config))
    axes, out = config.get("data_dim", 1), encoding.output_width
    fields = {field.name for field in dataclasses.fields(SeqPE)} & {field.name for field in dataclasses.fields(encoding)}
    module = SeqPE(
        layers_model=1, width_model=out, heads_model=1, axes=axes,
        **{name: getattr(encoding, name) for name in fields} | {"mode": "input_add", "qk": "none", "per_head": False},
    )  # fmt: skip
    rules = weights.encoder_rules(encoding.layers, axes, encoding.cls, encoding.final_norm)
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.PRNGKey(0), jnp.zeros((1, 1, axes), jnp.int32), shape=(1,) * axes)["params"]
    )
    params = weights.to_params(rules, state)
    return ReferenceModel(encoding, checked(params, {"encoding": shapes, "model": {}}), module, None)


def _named(state: weights.State) -> dict[str, Any]:
    """The position model's arrays under the names that `weights` knows them by."""
    return {name if name.startswith(weights.ENCODER) else weights.ENCODER + name: leaf for name, leaf in state.items()}


def _inferred(spec: Mapping[str, Any], state: weights.State) -> dict[str, Any]:
    """The settings of an encoder that its config leaves out, where the arrays tell them; heads as the model's."""
    state = {name.removeprefix(weights.ENCODER): leaf for name, leaf in state.items()}
    missing = [name for name in ("pos_of_seqpe_embed.weight", "out_proj.weight") if name not in state]
    if missing:
        raise InputError(f"the checkpoint lacks tensors that this model has: {', '.join(missing)}")
    places, width = np.shape(state["pos_of_seqpe_embed.weight"])
    axes = len(state["dim_token_embed"]) if "dim_token_embed" in state else 1
    return {
        "pe_embed_dim": width, "max_digits": places // axes, "data_dim": axes,
        "layer_num": len({name.split(".")[1] for name in state if name.startswith("transformers.")}),
        "num_attention_heads": spec.get("n_head") or spec.get("num_heads"),
        "use_cls_token": "cls_token_embed" in state, "use_last_layernorm": "layernorm.weight" in state,
        "out_proj_dim": len(state["out_proj.weight"]),
    }  # fmt: skip


def _tied(state: weights.State) -> bool:
    """Whether an output embedding of its own is the token embedding. Raises: InputError: it is another one."""
    head, tokens = state.get("lm_head.weight"), state.get("transformer.wte.weight")
    if head is None or tokens is None:
        return False
    if not np.array_equal(head, tokens):
        raise InputError("lm_head.weight differs from transformer.wte.weight: only tied output embeddings are supported")
    return True


def load_reference(path: str) -> ReferenceModel:
    """Returns the model of a checkpoint of the PyTorch reference, of a Hugging Face GPT-2 directory, or of a run of ours.

    Raises:
      InputError: none of these, a file missing, damaged or refused, an unknown field, arrays that do not fit the config.
    """
    return from_run(path)[0] if is_run(path) else from_source(folders.read(path))


def is_run(path: str) -> bool:
    """Whether a path is a folder of `train` or an output of `convert`."""
    return (pathlib.Path(path) / "checkpoints").is_dir()


def from_run(path: str) -> tuple[ReferenceModel, int]:
    """Returns (model, step) of a run of ours; its data are opened only where the config leaves sizes to them.

    Raises:
      InputError: not a run, no or a damaged checkpoint.
    """
    config = saved.saved_config(path)
    if config.model.vocabulary or config.model.classes:
        objective, here = objective_of(config), jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.eval_shape(objective.init, jax.random.PRNGKey(0))
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
        checkpoints = Checkpoints(path, create=False)
        params, step = checkpoints.restore_params(shapes)
        checkpoints.close()
    else:
        run, params, step = saved.open_run(path, config)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **run.data.model_fields))
        objective = run.objective
    return ReferenceModel(config, params, objective.encoding, objective.model), step


def from_source(source: folders.Source) -> ReferenceModel:
    """Returns the model of a checkpoint that has been read. Raises: as `load_reference`."""
    model = from_config(settings.config_of(source.spec), source.state)
    for name, table in source.tables.items():
        rows = min(len(table), 64)
        if table.ndim != 2 or np.abs(fixed_table(model, rows) - table[:rows]).max(initial=0.0) > 1e-4:
            raise InputError(
                f"tensor {name} is not the table of encoding '{source.spec['pe_type']}' that its config describes"
            )
    return model


def fixed_table(model: ReferenceModel, rows: int) -> np.ndarray:
    """Returns the first rows of the table that the reference stores for a fixed encoding on one axis.

    Sinusoidal: [rows, width]; rotary: sines, then cosines, [rows, head width]; ALiBi: slope times index, [rows, heads].
    """
    kind, encoding = model.config.encoding.kind, model.encoding
    if getattr(encoding, "prefix", 0):  # its rows count the class token
        encoding = encoding.clone(prefix=0)
    signal = encoding.apply({}, jnp.arange(rows, dtype=jnp.int32)[None, :, None], shape=(rows,))
    if kind == "sinusoidal":
        return np.asarray(signal.added[0])
    if kind == "rotary":
        cos, sin = (np.asarray(part[0, :, 0]) for part in signal.rotation)
        return np.concatenate([sin, cos], axis=-1)
    query, key = (np.asarray(part[0], np.float64) for part in signal.features)
    head_width = model.config.model.width // model.config.model.heads
    return (np.einsum("hf,lhf->lh", query[0], np.broadcast_to(key, (rows, *query.shape[1:]))) * head_width**0.5).astype(
        np.float32
    )
