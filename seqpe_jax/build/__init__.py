"""Config -> data, model, objective, optimiser, mesh: the only room that knows everybody."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax import axes, generation
from seqpe_jax.build.answers import Answers
from seqpe_jax.build.images import Images
from seqpe_jax.build.text import Text
from seqpe_jax.config import Config, DataConfig, EncodingConfig, ModelConfig, check_positions, digits_of
from seqpe_jax.encodings.composed import Composed
from seqpe_jax.encodings.fixed import LogScaling
from seqpe_jax.encodings.registry import ENCODINGS
from seqpe_jax.encodings.signal import PositionSignal
from seqpe_jax.errors import InputError
from seqpe_jax.evaluation.similarity import cosine
from seqpe_jax.generation import Generation, Sampling
from seqpe_jax.models.choice import BLOCK, choose
from seqpe_jax.models.gpt2 import GPT2
from seqpe_jax.models.operands import Operands
from seqpe_jax.models.vit import ViT
from seqpe_jax.objectives.objective import Objective, Params, initial_encoding
from seqpe_jax.positions.grids import Spacing
from seqpe_jax.positions.prefixes import Group
from seqpe_jax.runtime import mesh as layout
from seqpe_jax.training import optimizer as optimizers
from seqpe_jax.training.state import TrainState, create
from seqpe_jax.training.step import TrainStep, make_train_step

Shape = tuple[int, ...]

MODELS = {"gpt2": GPT2, "vit": ViT}
READ_AT_ONCE = 4096  # positions that the encoder reads at once outside of training


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run, linked; nothing is compiled yet.

    Attributes:
      shapes: of the state that trains, with shardings; whole: dimensions that could not be split as the mesh asks.
      reach: of an export: positions that it serves along each axis; else None.
    """

    config: Config
    mesh: jax.sharding.Mesh
    data: Text | Images
    objective: Objective
    optimizer: Any
    shapes: TrainState
    whole: tuple[layout.Whole, ...] = ()
    reach: Shape | None = None

    def init_state(self) -> TrainState:
        """Returns the state at step 0, each part made on the devices that hold it."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        return jax.jit(_initial(self.objective, self.optimizer, self.config.seed), out_shardings=shardings)()

    def train_step(self) -> TrainStep:
        """Returns the compiled-on-first-call train step; the state that goes in is donated."""
        step = make_train_step(
            self._laid_out(self.objective.loss),
            self.optimizer,
            optimizers.learning_rate(self.config.optimizer, self.config.steps),
            accumulate=self.config.optimizer.accumulate,
            weight=self.objective.task.weight,
        )
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        return jax.jit(step, donate_argnums=0, out_shardings=(shardings, layout.replicated(self.mesh)))

    def _laid_out(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, traced with this run's layout in force."""

        @functools.wraps(function)
        def traced(*arguments: Any, **options: Any) -> Any:
            with axes.laid_out(layout.Layout(self.mesh)):
                return function(*arguments, **options)

        return traced

    def batches(self, first: int) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        """Yields (step, global batch) from a step on, read ahead in the background."""
        train = self.data.train_loader(*layout.host_part(self.mesh))
        for step, batch in train.prefetch(first):
            yield step, layout.to_global(self.mesh, batch)

    def signal(self, params: Params, shape: Shape, first: int | None = None) -> PositionSignal:
        """Returns the signal of a window or grid, or of a window's first positions; vectors are computed part by part."""
        rows = shape[0] if first is None else min(first, shape[0])
        if not self.objective.has_vectors:
            return self._signal(params, shape, rows)
        positions_PLA = self.objective.spacing.grid(shape, rows=rows)[None]
        return self._signal_of(params, self.vectors(params, shape, rows)[None], positions_PLA, shape)

    def vectors(
        self, params: Params, shape: Shape, side: int | None = None, spacing: Spacing | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> jax.Array:  # fmt: skip
        """Returns the vectors of the positions of a window or grid, float32[prod(shape), E].

        Args:
          side: only the first places of the first axis; None = all. spacing: other than that of the model.
        """
        side, rest = side or shape[0], math.prod(shape[1:])
        spacing = spacing or self.objective.spacing
        rows = min(side, max(1, READ_AT_ONCE // rest))
        parts = []
        for start in range(0, side, rows):
            first = min(start, side - rows)  # the last part overlaps the one before: one program serves all
            parts.append(self._vectors(params, first, rows, shape, spacing)[(start - first) * rest :])
            progress(min(start + rows, side) * rest, side * rest)
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0]

    @functools.cached_property
    def _signal(self) -> Callable[[Params, Shape, int], PositionSignal]:
        def signal(params: Params, shape: Shape, rows: int) -> PositionSignal:
            return self.objective.signal(params, self.objective.spacing.grid(shape, rows=rows)[None], shape)

        return jax.jit(self._laid_out(signal), static_argnums=(1, 2))

    @functools.cached_property
    def _signal_of(self) -> Callable[[Params, jax.Array, jax.Array, Shape], PositionSignal]:
        def signal(params: Params, vectors_PLE: jax.Array, positions_PLA: jax.Array, shape: Shape) -> PositionSignal:
            return self._encode(params, vectors_PLE, positions_PLA, shape=shape, method="signal")

        return jax.jit(self._laid_out(signal), static_argnums=3)

    @functools.cached_property
    def _vectors(self) -> Callable[[Params, int, int, Shape, Spacing], jax.Array]:
        def vectors(params: Params, first: jax.Array, rows: int, shape: Shape, spacing: Spacing) -> jax.Array:
            known = Group(1, (rows, *shape[1:]), spans=spacing.spans(shape, rows))
            return self._encode(params, spacing.grid(shape, first, rows), groups=(known,), method="vectors")

        return jax.jit(self._laid_out(vectors), static_argnums=(2, 3, 4))

    def _encode(self, params: Params, *arguments: Any, **options: Any) -> Any:
        encoding = axes.gathered(params["encoding"], "encoding")
        return self.objective.encoding.apply({"params": encoding}, *arguments, **options)

    @functools.cached_property
    def examine(self) -> Callable[..., dict[str, jax.Array]]:
        """Evaluates a batch: `Objective.examine`, compiled on first call."""
        return jax.jit(self._laid_out(self.objective.examine), out_shardings=layout.replicated(self.mesh))

    def check_scale(self, scale: Shape, split: str) -> None:
        """Refuses a scale that needs positions that there are none of, or is more than the split holds.

        Raises:
          InputError: says so, and how far the positions reach.
        """
        self.data.check_scale(scale, split)
        shape = self.data.grid_of(scale)
        if self.reach is not None and any(side > end for side, end in zip(shape, self.reach, strict=True)):
            field, sides = self.data.scale_field, self.config.model.patch[-2:] or (1,)
            end = "x".join(str(count * side) for count, side in zip(self.reach[-len(sides) :], sides, strict=True))
            raise InputError(
                f"evaluation {field} {'x'.join(map(str, scale))} is beyond the exported range, up to {end}: "
                f"choose less, or export the run again with --max-{field}={max(scale)}"
            )

    def evaluate(
        self, params: Params, scale: Shape, split: str, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, Any]:
        """Returns the result at one scale, (length,) or (height, width); the signal is computed once.

        Raises:
          InputError: as of `check_scale`.
        """
        self.check_scale(scale, split)
        shape = self.data.grid_of(scale)
        batch = max(1, self.config.eval.batch_tokens // math.prod(shape))
        parts = layout.batch_shards(self.mesh)
        batch = -(-batch // parts) * parts
        answering = {"generate": functools.partial(self.generate, params)} if self.config.asks_questions else {}
        return self.data.evaluate(
            functools.partial(self.examine, params, self.signal(params, shape)), scale, split, batch,
            put=functools.partial(layout.whole_to_global, self.mesh), progress=progress, **answering,
        )  # fmt: skip

    def check_generation(self, lengths: Sequence[int], sampling: Sampling, window: int | None = None) -> int:
        """Returns the window that prompts of these lengths and their new tokens stand in: `window`, or the least.

        Raises:
          InputError: not a run on text, no prompt, an empty one, or a window too small or beyond the encoding's reach.
        """
        if not isinstance(self.data, Text):
            raise InputError("a run on images generates no text: give a run on text")
        if not lengths:
            raise InputError("there is no prompt to go on from: give at least one")
        if not all(lengths):
            which = f"prompt {lengths.index(0) + 1} of {len(lengths)}" if len(lengths) > 1 else "the prompt"
            raise InputError(f"{which} is empty: a prompt must hold at least one token")
        needed = max(lengths) + sampling.new_tokens
        check_positions(self.config, max(needed, window or 0), "the length of prompt and new tokens")
        if window and window < needed:
            raise InputError(
                f"a window of {window} does not hold the longest prompt ({max(lengths)} tokens) and {sampling.new_tokens} "
                f"new tokens: make it at least {needed}"
            )
        return window or needed

    def generate(
        self,
        params: Params,
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        *,
        window: int | None = None,
        keep_logits: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
        heard: Callable[[int, Generation], None] = lambda index, generation: None,
    ) -> list[Generation]:
        """Returns what follows each prompt: equal to the uncached forward of the same tokens, whatever else is generated.

        Prompts are sorted by length into batches of few shapes, of eval.batch_tokens tokens each; the signal is computed
        once for each shape.

        Args:
          prompts: token ids, each int[n].
          window: positions of which the signal is computed; None = the longest prompt and its new tokens. It matters to
            a learned table and under encoding.resize='stretch' alone, which a longer window than that of training
            stretches to its length: the text is that of a forward under the signal of the whole window.
          keep_logits: return the logits too.
          progress: called with the new tokens done and those possible at most.
          heard: called now and then with a prompt's index and what has followed it so far.

        Raises:
          InputError: as `check_generation`, or a token that the model does not know.
        """
        window = self.check_generation([len(prompt) for prompt in prompts], sampling, window)
        vocabulary = self.objective.model.vocabulary
        for prompt in prompts:
            if not 0 <= int(np.min(prompt)) <= int(np.max(prompt)) < vocabulary:
                raise InputError(f"a prompt has tokens outside of the vocabulary (0 .. {vocabulary - 1})")
        static = generation.Static(
            sampling.new_tokens, sampling.temperature == 0, sampling.top_p == 1, keep_logits=keep_logits
        )
        compiled = generation.programs(self.objective.model, static, layout.Layout(self.mesh))
        work = generation.batches(
            [len(prompt) for prompt in prompts], new_tokens=sampling.new_tokens, window=window,
            batch_tokens=self.config.eval.batch_tokens, multiple=layout.batch_shards(self.mesh),
        )  # fmt: skip
        found: dict[int, Generation] = {}
        places, signal, done, total = 0, None, 0, len(prompts) * sampling.new_tokens
        for batch in work:
            if batch.places != places:
                places = batch.places
                signal = self.signal(params, (window,), places + sampling.new_tokens)
            put = functools.partial(layout.whole_to_global, self.mesh)
            for results in generation.decode(
                compiled, params["model"], signal, batch, prompts, sampling, self.data.known_V, put=put
            ):
                for index, result in zip(batch.indices, results, strict=True):
                    heard(index, result)
                done = len(found) * sampling.new_tokens + sum(len(result.tokens) for result in results)
                progress(done, total)
            found |= zip(batch.indices, results, strict=True)
        if done < total:
            progress(total, total)
        return [found[index] for index in range(len(prompts))]

    def stored(self, reach: Shape) -> "Run":
        """Returns this run as an export serves it: positions below `reach` only, their vectors read from a table."""
        objective = self.objective
        if objective.has_vectors:
            encoding = objective.encoding.storing(*objective.spacing.table(reach))
            objective = dataclasses.replace(objective, encoding=encoding)
        return dataclasses.replace(self, objective=objective, reach=reach)

    def stored_params(
        self, params: Params, reach: Shape, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Params:
        """Returns the parameters of `stored(reach)`: those of a run, with vectors computed once in the encoder's place."""
        if not self.objective.has_vectors:
            return params
        sides, step = self.objective.spacing.table(reach)
        table = np.asarray(self.vectors(params, sides, spacing=Spacing(step), progress=progress)).reshape(*sides, -1)
        rest = {name: value for name, value in params["encoding"].items() if name != "encoder"}
        return params | {"encoding": rest | {"table": table}}

    def served_block(self, tokens: int) -> int:
        """Returns the queries, and the keys, of which an export holds the attention logits at once."""
        model = self.config.model
        return tokens if model.attention_kind == "plain" else min(tokens, model.attention_block or BLOCK)

    def logits(self, params: Params, inputs: jax.Array) -> jax.Array:
        """Returns the logits, float32, of tokens int32[B, L] or images float32[B, sides..., C]; sizes may be symbolic."""
        shape = self.config.grid_of(inputs.shape[1:-1]) if self.config.reads_images else inputs.shape[1:]
        signal = self.objective.signal(params, self.objective.spacing.grid(shape)[None], shape)
        return self.objective.model.apply({"params": params["model"]}, inputs, signal)

    def similarity(self, params: Params, scale: Shape, pivots: int = 5, columns: int = 512) -> dict[str, np.ndarray] | None:
        """Returns how alike the vectors of a window or grid are to those of a few pivots, or None without vectors.

        Returns:
          {"pivots" int[n, A], "positions" int[m, A], "cosine" float32[n, m]}: places of tokens or patches, wherever they
          stand; a window is thinned out to `columns` of them, a grid comes whole, row-major.
        """
        if not self.objective.has_vectors:
            return None
        shape = self.data.grid_of(scale)
        places_RA, positions_RA = (np.asarray(spacing.grid(shape)) for spacing in (Spacing(), self.objective.spacing))
        if len(shape) == 1:
            taken = np.unique(np.linspace(0, len(positions_RA) - 1, columns).astype(int))
            places_RA, positions_RA = places_RA[taken], positions_RA[taken]
        chosen = np.unique(np.linspace(0, len(positions_RA) - 1, pivots + 2).astype(int)[1:-1])
        vectors_RE = jax.jit(functools.partial(self.objective.encoding.apply, method="vectors"))(
            {"params": params["encoding"]}, jnp.asarray(positions_RA)
        )
        return {
            "pivots": places_RA[chosen],
            "positions": places_RA,
            "cosine": np.asarray(cosine(vectors_RE, chosen), np.float32),
        }

    def attention(self, params: Params, scale: Shape, split: str, count: int = 4) -> dict[str, np.ndarray] | None:
        """Returns where the class token looks in a few images of a split, or None where there is no class token.

        Returns:
          {"images" float32[n, sides..., C] in 0..1, "attention" float32[n, H, patches along each axis...]}: the last
          layer's weights of the class token on the patches.
        """
        if not isinstance(self.data, Images):
            return None
        shape = self.data.grid_of(scale)
        images, pictures = self.data.pictures(scale, split, count)
        weights = jax.jit(functools.partial(self.objective.model.apply, method="attention"))(
            {"params": params["model"]}, jnp.asarray(images), self.signal(params, shape)
        )
        weights_BHL = np.asarray(weights, np.float32)[:, :, 0, 1:]
        return {"images": pictures, "attention": weights_BHL.reshape(*weights_BHL.shape[:2], *shape)}


def build(
    config: Config, devices: list[jax.Device] | None = None, *, data_there: bool = True, kept: str | pathlib.Path = ""
) -> Run:
    """Returns the linked parts of a run on all devices, or on those given.

    Args:
      data_there: whether the data can be read; without them a run can only be compiled, and sizes that they would tell
        (vocabulary, classes) come from the config or the tokenizer's file.
      kept: folder of the run that this one goes on from or evaluates: what it keeps of its data (tokenizer, class names)
        holds here too; "" = a new run.

    Raises:
      InputError: fields contradict each other or the machine, the data cannot be read, or are not those of the run kept;
        found before compiling.
    """
    mesh = layout.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.context, config.mesh.tensor, devices)
    part, parts = config.batch_size // config.optimizer.accumulate, layout.batch_shards(mesh)
    if part % parts:
        raise InputError(
            f"batch_size={config.batch_size} (in {config.optimizer.accumulate} part(s)) does not divide over mesh.data x "
            f"mesh.fsdp = {parts}: make it a multiple of {parts * config.optimizer.accumulate}"
        )
    check_encoding(config)  # reading the data may take minutes
    data = data_of(config)(config, data_there, kept)
    check_attention(config, layout.Layout(mesh))
    objective = make_objective(config, data)
    optimizer = optimizers.make_optimizer(config.optimizer, config.steps)
    shapes = jax.eval_shape(_initial(objective, optimizer, config.seed))
    shapes, whole = layout.with_shardings(mesh, shapes)
    return Run(config, mesh, data, objective, optimizer, shapes, tuple(whole))


def data_of(config: Config) -> type[Text | Images]:
    """Returns the class of what a run of a config needs of its data."""
    return Images if config.reads_images else Answers if config.asks_questions else Text


def check_attention(config: Config, used: layout.Layout) -> None:
    """Refuses an implementation of attention that cannot serve what the config trains, wherever its signal may be served.

    Raises:
      InputError: as `models.choice.choose`.
    """
    model = config.model
    shape = (config.batch_size, math.prod(config.grid), model.heads, model.width // model.heads)
    array = jax.ShapeDtypeStruct(shape, jnp.dtype(config.precision.compute))
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    operands = Operands(
        array, array, array, last=None if config.reads_images else number, seed=number if model.attention_dropout else None
    )
    choose(model.attention_kind, model.attention_block, operands, device=used.device, split=used.shards(axes.LENGTH) > 1)


def make_objective(config: Config, data: Text | Images) -> Objective:
    """Returns model, encoding, task and terms of a config for its data."""
    model, encoding = config.model, config.encoding
    return Objective(
        model=_module(
            MODELS[model.kind],
            dataclasses.asdict(model) | data.model_fields | {"dtype": jnp.dtype(config.precision.compute)},
        ),
        task=data.task,
        inputs=data.inputs,
        encoding=_encoding(config),
        shape=config.grid,
        spacing=spacing_of(config),
        max_position=encoding.max_position * encoding.unit,
        base=encoding.base,
        heads=model.heads if encoding.per_head else None,
        settings=config.objective,
        has_vectors=encoding.kind == "seqpe",
    )


def check_encoding(config: Config) -> None:
    """Refuses an encoding that cannot serve the model and grid of a config, as `build` would, but without data.

    Raises:
      InputError: fields contradict each other.
    """
    _check_encoding(config.data, config.model, config.encoding)


@functools.lru_cache
def _check_encoding(data: DataConfig, model: ModelConfig, encoding: EncodingConfig) -> None:
    """Takes a moment, once for all runs that have the same of all three."""
    config = Config(data=data, model=model, encoding=encoding)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)  # a key itself would take the devices, which others may need
    jax.eval_shape(functools.partial(initial_encoding, _encoding(config), config.grid, spacing_of(config)), key)


def spacing_of(config: Config) -> Spacing:
    """Returns where the places of a config's windows and grids stand."""
    stretched = (0,) * (len(config.grid) - 2) + config.grid[-2:]  # a longer clip goes on, a larger frame is read between
    return Spacing(config.encoding.unit, stretched if config.encoding.resize == "stretch" else ())


def _encoding(config: Config) -> Any:
    """The encoding that a config names, with rotating pairs beside SeqPE, for those heads that get a position.

    Raises:
      InputError: more heads than there are, or pairs that cannot turn beside SeqPE.
    """
    model, encoding = config.model, config.encoding
    for name in ("position_heads", "rotary_heads"):
        if getattr(encoding, name) > model.heads:
            raise InputError(f"encoding.{name}={getattr(encoding, name)} is more than model.heads={model.heads}")
    offered = dataclasses.asdict(encoding) | {
        "digits": digits_of(encoding), "layers_model": model.layers, "width_model": model.width,
        "heads_model": model.heads, "axes": len(config.grid), "table_shape": config.grid,
        "prefix": data_of(config).prefix, "unit": encoding.unit,
    }  # fmt: skip
    parts, reach = [_module(ENCODINGS[encoding.kind], offered)], [encoding.position_heads or model.heads]
    if encoding.kind == "seqpe":
        reach = [model.heads]  # it leaves out heads by itself, since it need not compute what they would get
        if encoding.rotary_pairs:
            width = model.width // model.heads
            if encoding.mode == "rotary":
                raise InputError(
                    f"encoding.mode='rotary' and encoding.rotary_pairs={encoding.rotary_pairs} both turn queries and keys: "
                    "choose another mode, or set encoding.rotary_pairs=0"
                )
            if width % 2:
                raise InputError(
                    f"encoding.rotary_pairs={encoding.rotary_pairs}: model.width / model.heads = {width} must be even for "
                    "columns to turn in pairs"
                )
            if width < 2 * len(config.grid):
                raise InputError(
                    f"encoding.rotary_pairs={encoding.rotary_pairs} turns at least one pair per axis: model.width / "
                    f"model.heads = {width} must be at least {2 * len(config.grid)} for {len(config.grid)} axes"
                )
            parts.append(_module(ENCODINGS["rotary_axial"], offered))  # on one axis, the same as rotary
            reach.append(encoding.rotary_heads or model.heads)
    if encoding.log_scaling:
        parts.append(_module(LogScaling, offered))
        reach.append(model.heads)
    return parts[0] if reach == [model.heads] else Composed(tuple(parts), model.heads, tuple(reach))


def _module(kind: type, offered: dict[str, Any]) -> Any:
    """Returns a Flax module made of those values that are fields of its."""
    fields = {field.name for field in dataclasses.fields(kind)} - {"name", "parent"}
    return kind(**{name: value for name, value in offered.items() if name in fields})


def _initial(objective: Objective, optimizer: Any, seed: int) -> Callable[[], TrainState]:
    def initial() -> TrainState:
        key = jax.random.PRNGKey(seed)
        return create(objective.init(key), optimizer, key)

    return initial
