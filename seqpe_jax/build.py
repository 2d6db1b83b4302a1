"""Config -> data, model, objective, optimiser, mesh: the only room that knows everybody."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.config import Config, check_positions, digits_of
from seqpe_jax.data import loader, text
from seqpe_jax.data.tokenizers import Tokenizer, load_tokenizer
from seqpe_jax.encodings.registry import ENCODINGS
from seqpe_jax.errors import InputError
from seqpe_jax.evaluation.perplexity import perplexity
from seqpe_jax.evaluation.similarity import cosine
from seqpe_jax.models.gpt2 import GPT2
from seqpe_jax.objectives.objective import Metrics, Objective, Params
from seqpe_jax.positions.grids import grid
from seqpe_jax.runtime import mesh as layout
from seqpe_jax.training import optimizer as optimizers
from seqpe_jax.training.state import TrainState, create
from seqpe_jax.training.step import TrainStep, make_train_step

Shape = tuple[int, ...]

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run, linked; nothing is compiled yet."""

    config: Config
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    objective: Objective
    optimizer: Any
    shapes: TrainState  # ShapeDtypeStructs with shardings

    def init_state(self) -> TrainState:
        """Returns the state at step 0, each part made on the devices that hold it."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        return jax.jit(_initial(self.objective, self.optimizer, self.config.seed), out_shardings=shardings)()

    def train_step(self) -> TrainStep:
        """Returns the compiled-on-first-call train step; the state that goes in is donated."""
        step = make_train_step(
            self._loss,
            self.optimizer,
            optimizers.learning_rate(self.config.optimizer, self.config.steps),
            accumulate=self.config.optimizer.accumulate,
        )
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        return jax.jit(step, donate_argnums=0, out_shardings=(shardings, layout.replicated(self.mesh)))

    def _loss(self, params: Params, *arguments: Any) -> tuple[jax.Array, Metrics]:
        """The objective on whole parameters: what fsdp splits in store is gathered for use."""
        if self.mesh.shape["fsdp"] > 1:
            params = jax.lax.with_sharding_constraint(params, layout.replicated(self.mesh))
        return self.objective.loss(params, *arguments)

    def source(self, split: str, progress: bool = True) -> text.TokenSource:
        """Returns the tokens of a split. Raises: InputError as `data.text.token_source`."""
        return token_source(self.config, self.tokenizer, split, progress)

    def batches(self, first: int) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        """Yields (step, global batch) from a step on, read ahead in the background."""
        config = self.config
        source = self.source("train")
        train = loader.TrainLoader(
            loader.windows(source.tokens, config.data.length), batch_size=config.batch_size, seed=config.seed,
            host_index=jax.process_index(), host_count=jax.process_count(),
        )  # fmt: skip
        for step, batch in train.prefetch(first):
            yield step, layout.to_global(self.mesh, batch)

    @functools.cached_property
    def _signal(self) -> Callable[[Params, Shape], Any]:
        def signal(params: Params, shape: Shape) -> Any:
            positions_PLA = grid(jnp.zeros(len(shape), jnp.int32), shape)[None]
            return self.objective.signal(params, positions_PLA, shape)

        return jax.jit(signal, static_argnums=1)

    @functools.cached_property
    def _token_losses(self) -> Callable[..., jax.Array]:
        return jax.jit(self.objective.token_losses, out_shardings=layout.replicated(self.mesh))

    def evaluate(
        self, params: Params, length: int, split: str, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, Any]:
        """Returns the result of one length (see `evaluation.perplexity`); the signal is computed once.

        Raises:
          InputError: the length needs positions that there are none of, or is longer than the split.
        """
        config = self.config
        check_positions(config.encoding, length, "evaluation length")
        source = self.source(split)
        batch = max(1, config.eval.batch_tokens // length)
        batch = -(-batch // self.mesh.size) * self.mesh.size
        windows = loader.evaluation_windows(source.tokens, length, batch, max_tokens=config.eval.tokens)
        total = windows.examples
        signal = self._signal(params, (length,))
        return perplexity(
            functools.partial(self._token_losses, params, signal),
            windows,
            length=length,
            tokens_of_split=len(source.tokens),
            bytes_of_split=source.bytes,
            words_of_split=source.words if self.tokenizer.name != "bytes" else None,
            put=functools.partial(layout.whole_to_global, self.mesh),
            progress=lambda done: progress(done, total),
        )

    def similarity(self, params: Params, length: int, pivots: int = 5, columns: int = 512) -> dict[str, np.ndarray] | None:
        """Returns {"pivots" [n], "positions" [m], "cosine" [n, m]} over a window, or None without vectors."""
        if not self.objective.has_vectors:
            return None
        positions = np.unique(np.linspace(0, length - 1, min(columns, length)).astype(np.int32))
        chosen = np.unique(np.linspace(0, len(positions) - 1, pivots + 2).astype(np.int32)[1:-1])
        variables = {"params": params["encoding"]}
        vectors_RE = jax.jit(functools.partial(self.objective.encoding.apply, method="vectors"))(
            variables, jnp.asarray(positions)[:, None]
        )
        return {
            "pivots": positions[chosen],
            "positions": positions,
            "cosine": np.asarray(cosine(vectors_RE, chosen), np.float32),
        }

    def keep_tokenizer(self, workdir: str | pathlib.Path) -> None:
        """Puts the tokenizer's file beside the checkpoints, so that it travels with them; bytes need none."""
        if self.tokenizer.name != "bytes":
            self.tokenizer.save(workdir)

    def check_tokenizer(self, workdir: str | pathlib.Path) -> None:
        """Refuses to go on with another tokenizer than the run began with. Raises: InputError."""
        kept = pathlib.Path(workdir) / TOKENIZER
        if kept.exists() and load_tokenizer(kept).fingerprint != self.tokenizer.fingerprint:
            raise InputError(
                f"data.tokenizer={self.config.data.tokenizer} is not the tokenizer that the run of {workdir} began with, "
                f"which lies there as {TOKENIZER}: use that file or a new --workdir"
            )

    def check_lengths(self, lengths: tuple[int, ...], split: str) -> None:
        """Refuses lengths that cannot be evaluated, before anything is compiled. Raises: InputError."""
        source = self.source(split)
        for length in lengths:
            check_positions(self.config.encoding, length, "evaluation length")
            if len(source.tokens) < length + 1:
                raise InputError(
                    f"evaluation length {length} is longer than the {split} split of {self.config.data.name} "
                    f"({len(source.tokens)} tokens): choose a length below {len(source.tokens)}"
                )


def build(config: Config, devices: list[jax.Device] | None = None) -> Run:
    """Returns the linked parts of a run on all devices, or on those given.

    Raises:
      InputError: fields contradict each other or the machine; found before anything is compiled.
    """
    mesh = layout.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    part = config.batch_size // config.optimizer.accumulate
    if part % mesh.size:
        raise InputError(
            f"batch_size={config.batch_size} (in {config.optimizer.accumulate} part(s)) does not divide over "
            f"{mesh.size} devices: make it a multiple of {mesh.size * config.optimizer.accumulate}"
        )
    tokenizer = load_tokenizer(config.data.tokenizer)
    objective = make_objective(config, tokenizer.vocabulary_size, mesh)
    optimizer = optimizers.make_optimizer(config.optimizer, config.steps)
    shapes = jax.eval_shape(_initial(objective, optimizer, config.seed))
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.state_sharding(mesh, leaf)), shapes
    )
    return Run(config, mesh, tokenizer, objective, optimizer, shapes)


def with_kept_tokenizer(config: Config, workdir: str | pathlib.Path) -> Config:
    """Returns a run's config with the tokenizer that lies beside its checkpoints."""
    kept = pathlib.Path(workdir) / TOKENIZER
    if not kept.exists():
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(kept)))


def make_objective(config: Config, vocabulary: int, mesh: jax.sharding.Mesh) -> Objective:
    """Returns model, encoding and terms of a config for a vocabulary."""
    model, encoding = config.model, config.encoding
    dtype = jnp.dtype(config.precision.compute)
    gpt2 = GPT2(
        vocabulary=vocabulary, layers=model.layers, width=model.width, heads=model.heads, mlp_width=model.mlp_width,
        dropout=model.dropout, attention_dropout=model.attention_dropout, embedding_dropout=model.embedding_dropout,
        activation=model.activation, layer_norm_epsilon=model.layer_norm_epsilon, init_std=model.init_std, dtype=dtype,
        remat=model.remat, attention_block=model.attention_block,
    )  # fmt: skip
    offered = dataclasses.asdict(encoding) | {
        "digits": digits_of(encoding), "layers_model": model.layers, "width_model": model.width,
        "heads_model": model.heads, "axes": 1, "table_shape": (config.data.length,),
    }  # fmt: skip
    kind = ENCODINGS[encoding.kind]
    fields = {field.name for field in dataclasses.fields(kind)} - {"name", "parent"}
    module = kind(**{name: value for name, value in offered.items() if name in fields})
    return Objective(
        model=gpt2,
        encoding=module,
        shape=(config.data.length,),
        max_position=encoding.max_position,
        base=encoding.base,
        heads=model.heads if encoding.per_head else None,
        settings=config.objective,
        has_vectors=encoding.kind == "seqpe",
        constrain_rows=functools.partial(layout.constrain_rows, mesh) if mesh.size > 1 else lambda rows: rows,
        row_multiple=mesh.size,
    )


def token_source(config: Config, tokenizer: Tokenizer, split: str, progress: bool = True) -> text.TokenSource:
    """Returns the tokens of a split of the configured data. Raises: InputError."""
    return text.token_source(
        config.data.name, split=split, tokenizer=tokenizer, paths=config.data.paths, cache_dir=config.data.cache_dir,
        progress=progress,
    )  # fmt: skip


def _initial(objective: Objective, optimizer: Any, seed: int) -> Callable[[], TrainState]:
    def initial() -> TrainState:
        key = jax.random.PRNGKey(seed)
        return create(objective.init(key), optimizer, key)

    return initial
