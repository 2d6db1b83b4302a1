"""How long a training step, an evaluation or a new token takes, and what of it the position encoding is.

Several encodings take turns, so that what else the machine does falls on all of them alike. Inputs are random; nothing is
read or written. Times are of whole calls that have been waited for, the first ones (compilation) left out.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.config import Config
from seqpe_jax.distributed import hardware
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.errors import InputError
from seqpe_jax.inference import decode
from seqpe_jax.inference.decode import Sampling
from seqpe_jax.inference.generate import check_generation
from seqpe_jax.models.build import model_flops
from seqpe_jax.profiling.hlo import HloModule
from seqpe_jax.profiling.roofline import roofline
from seqpe_jax.training.trainer import Trainer

WARM_UP = 2  # calls
DECODED = 32  # tokens of a call in mode decode


@dataclasses.dataclass(frozen=True)
class TimedProgram:
    """One thing to time.

    Attributes:
      call: does it once and returns arrays to wait for; units: tokens or images of a call.
      flops: of a call (see `flops_per_call`), 0 where no utilisation is told.
      compiled: the program of a call; turns: of its loop, where these are not in its text; mesh: of it.
      encoding: does the encoding's part alone, or None where it has nothing to compute.
    """

    call: Callable[[], Any]
    units: int
    flops: dict[str, float]
    compiled: Any
    mesh: jax.sharding.Mesh
    turns: int = 1
    encoding: Callable[[], Any] | None = None

    @property
    def bytes(self) -> int:
        """What the program holds at once: arguments, results and temporaries."""
        found = self.compiled.memory_analysis()
        held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        return held + found.temp_size_in_bytes

    def bound(self, chip: hardware.Chip) -> dict[str, Any]:
        """Returns the roofline of a call, or of one turn of its loop."""
        return roofline(
            HloModule(self.compiled.as_text()),
            self.mesh,
            chip,
            model_flops={name: flops / self.turns for name, flops in self.flops.items()},
            units=self.units // self.turns,
        )


def benchmark(
    settings: Mapping[str, Config],
    mode: str,
    steps: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Returns {"runs": [one of each config], "ratios": {"first/other": {"time", "memory"}}}.

    A run is {"encoding" (its name), "mode", "length" (or "size"), "batch", "median_s", "p10_s", "p90_s" (of a step, an
    evaluated batch, or one new token of every sample), "per_second" (tokens or images), "mfu" and "mfu_full_attention" (see
    `models.build.model_flops`; None on an unknown device), "peak_bytes", "encoding_share" (of the time; None where the
    encoding computes nothing of its own), "roofline" (of the same: see `profiling.roofline`; on a device whose peaks are
    not known, arithmetic alone, at a rate measured at the end), "reached" (the shortest time possible as a share of the
    median)}.

    Args:
      settings: by name; they differ in the encoding; mode: "train", "eval", "decode", or "encode" (forward and backward
        pass of all positions of a training step alone); steps: timed calls of each.

    Raises:
      InputError: a mode that these configs cannot run.
    """
    for config in settings.values():  # before any data are read
        if mode == "decode" and config.is_image:
            raise InputError("--mode=decode generates text: give a config of text")
        if mode == "encode" and config.encoding.kind != "seqpe":
            raise InputError("--mode=encode times SeqPE's encoder: give encoding.kind=seqpe alone")
    made = [_timed(Trainer.of(config), mode) for config in settings.values()]
    seconds: list[list[float]] = [[] for _ in made]
    shares: list[list[float]] = [[] for _ in made]
    for turn in range(WARM_UP + steps):
        for one, times, share in zip(made, seconds, shares, strict=True):
            took = _seconds(one.call)
            if turn >= WARM_UP:
                times.append(took)
            if one.encoding is not None:
                alone = _seconds(one.encoding)
                if turn >= WARM_UP:
                    share.append(alone)
        progress(turn + 1, WARM_UP + steps)
    runs, chip = [], hardware.find_chip(jax.devices()[0].device_kind) or hardware.measure_chip()
    for (name, config), one, times, share in zip(settings.items(), made, seconds, shares, strict=True):
        per = DECODED if mode == "decode" else 1
        median, bound = statistics.median(times), one.bound(chip)
        runs.append(
            {
                "encoding": name,
                "mode": mode,
                **({"size": list(config.data.size)} if config.is_image else {"length": config.data.length}),
                "batch": config.batch_size,
                "median_s": median / per,
                "p10_s": float(np.quantile(times, 0.1)) / per,
                "p90_s": float(np.quantile(times, 0.9)) / per,
                "per_second": one.units / median,
                **{name: hardware.utilisation(flops, median) if flops else None for name, flops in one.flops.items()},
                "peak_bytes": one.bytes,
                "encoding_share": statistics.median(share) / median if share else None,
                "roofline": bound,
                "reached": bound["seconds"] * per / median,
            }
        )
    return {"device": jax.devices()[0].device_kind, "runs": runs, "ratios": _ratios(runs, seconds)}


def _ratios(runs: list[dict[str, Any]], seconds: list[list[float]]) -> dict[str, dict[str, float]]:
    """Of the first run to each other one; of time, the median over turns."""
    first, ratios = runs[0], {}
    for other, times in zip(runs[1:], seconds[1:], strict=True):
        turns = [mine / theirs for mine, theirs in zip(seconds[0], times, strict=True)]
        ratios[f"{first['encoding']}/{other['encoding']}"] = {
            "time": statistics.median(turns),
            "memory": first["peak_bytes"] / other["peak_bytes"],
        }
    return ratios


def flops_per_call(trainer: Trainer, mode: str) -> dict[str, float]:
    """Returns the floating-point operations of a call (see `models.build.model_flops`)."""
    config = trainer.config
    tokens = config.batch_size * (DECODED if mode == "decode" else trainer.model_spec.num_positions)
    return model_flops(config, trainer.task.data_spec.vocabulary, tokens=tokens, training=mode == "train")


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _timed(trainer: Trainer, mode: str) -> TimedProgram:
    config = trainer.config
    if mode == "encode":
        call, rows, compiled = _encode(trainer)
        return TimedProgram(call, rows, dict.fromkeys(flops_per_call(trainer, "train"), 0.0), compiled, trainer.mesh)
    make = {"train": _train, "eval": _evaluate, "decode": _decode}[mode]
    call, compiled = make(trainer)
    turns = DECODED if mode == "decode" else 1
    units = config.batch_size * (1 if config.is_image else DECODED if mode == "decode" else config.data.length)
    return TimedProgram(
        call, units, flops_per_call(trainer, mode), compiled, trainer.mesh, turns, _encoding(trainer, mode)
    )


def _batch(trainer: Trainer) -> dict[str, jax.Array]:
    rng, sizes = np.random.default_rng(0), trainer.task.data_spec

    def drawn(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        shape = (trainer.config.batch_size, *leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.integer):  # tokens or labels
            return rng.integers(0, sizes.vocabulary or sizes.classes, shape).astype(leaf.dtype)
        return rng.uniform(size=shape).astype(leaf.dtype)  # pixels or weights

    return layout.from_full_batch(trainer.mesh, {name: drawn(leaf) for name, leaf in trainer.task.example.items()})


def _train(trainer: Trainer) -> tuple[Callable[[], Any], Any]:
    batch = _batch(trainer)
    state = trainer.init_state()
    compiled = trainer.train_step().lower(state, batch).compile()

    def call() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    return call, compiled


def _evaluate(trainer: Trainer) -> tuple[Callable[[], Any], Any]:
    params, batch = trainer.init_state().params, _batch(trainer)
    signal = trainer.compiled.signal(params, trainer.config.grid)  # once for all batches, as evaluation does
    compiled = trainer.compiled.eval_step(trainer.task.task_loss).lower(params, signal, batch).compile()
    return lambda: compiled(params, signal, batch), compiled


def _decode(trainer: Trainer) -> tuple[Callable[[], Any], Any]:
    length = trainer.config.data.length
    window = length + DECODED + 1
    own = window if trainer.config.encoding.window_dependence else None
    check_generation(trainer.config, [length], Sampling(DECODED + 1), own)
    params, batch = trainer.init_state().params, _batch(trainer)
    static = decode.SamplingStatic(DECODED + 1, greedy=True, all_tokens=True, keep_logits=False)
    functions = decode.decode_functions(trainer.model_spec.network, static, layout.MeshSharding(trainer.mesh))
    signal = trainer.compiled.signal(params, (window,))
    draw = decode.SamplingArgs(jax.random.PRNGKey(0), np.float32(1), np.float32(1), np.int32(-1), trainer.task.known_V)
    rows = trainer.config.batch_size
    put = layout.from_full_batch(
        trainer.mesh, {"lengths": np.full(rows, length, np.int32), "index": np.arange(rows, dtype=np.int32)}
    )
    prompts = (batch["tokens"][:, :-1], put["lengths"], put["index"], draw)
    state = functions.prefill(params["model"], signal, *prompts)
    # The cache is not donated here, so that every call begins with the same one.
    decode_loop = jax.jit(functools.partial(decode.decode_loop, trainer.model_spec.network, static=static))
    compiled = decode_loop.lower(params["model"], signal, state, draw, np.int32(DECODED + 1)).compile()
    return lambda: compiled(params["model"], signal, state, draw, np.int32(DECODED + 1)), compiled


def _encoding(trainer: Trainer, mode: str) -> Callable[[], Any] | None:
    """What the encoding of a call costs alone; None for encodings without parameters, and where a table is read."""
    if mode == "decode" or not trainer.model_spec.has_vectors:
        return None
    if mode == "eval":
        params = trainer.init_state().params
        return lambda: trainer.compiled.signal(params, trainer.config.grid)
    return _encode(trainer)[0]


def _encode(trainer: Trainer) -> tuple[Callable[[], Any], int, Any]:
    """Forward and backward pass of a training step's positions, with their number and the program."""
    train_loss, key = trainer.train_loss, jax.random.PRNGKey(0)
    sampled, rows = jax.eval_shape(train_loss.sample, key, jnp.int32(0)), 0
    for part in (
        sampled[:1],
        sampled.contrastive and sampled.contrastive[:2],
        sampled.distillation and sampled.distillation[1:],
    ):
        rows += sum(positions.size // positions.shape[-1] for positions in part or ())
    params = trainer.init_state().params["encoding"]

    def summed(encoding: Any, key: jax.Array) -> jax.Array:
        sampled = train_loss.sample(key, jnp.int32(0))
        signal, terms = train_loss.signal_and_terms(encoding, sampled, key, False)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves((signal, terms)))

    compiled = jax.jit(jax.grad(summed)).lower(params, key).compile()
    return lambda: compiled(params, key), rows, compiled
