"""Benchmark of training steps, evaluation batches or new tokens, with the share of the position encoding.

Several encodings are timed in turns, so that other load of the machine affects all of them alike. Inputs are random; nothing
is read or written. Times are of complete calls, without the first ones, which compile.
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
from seqpe_jax.training.trainer import Trainer, attention_backend

WARM_UP = 2  # calls
DECODED = 32  # tokens of a call in mode decode


@dataclasses.dataclass(frozen=True)
class TimedProgram:
    """A compiled program with its inputs, to be timed.

    Attributes:
      call: function that executes it once and returns arrays to wait for.
      units: tokens or images of a call.
      flops: FLOPs of a call, by the name of the utilisation (`flops_per_call`); 0 = no utilisation is reported.
      compiled: program of a call.
      mesh: mesh of the program.
      turns: iterations of its loop, where the program's text does not have them.
      encoding: function that executes the position encoding alone; None where it computes nothing.
      attention: name of the attention backend of a training step; "" in other modes.
    """

    call: Callable[[], Any]
    units: int
    flops: dict[str, float]
    compiled: Any
    mesh: jax.sharding.Mesh
    turns: int = 1
    encoding: Callable[[], Any] | None = None
    attention: str = ""

    @property
    def bytes(self) -> int:
        """Memory of the program in bytes: arguments, results and temporaries."""
        found = self.compiled.memory_analysis()
        held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        return held + found.temp_size_in_bytes

    def roofline(self, chip: hardware.Chip) -> dict[str, Any]:
        """Returns the roofline of a call, or of one iteration of its loop."""
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
    """Returns timings of several configs.

    Args:
      settings: {name: config}, which differ in the encoding.
      mode: "train", "eval", "decode", or "encode" (forward and backward pass of all positions of a training step alone).
      steps: timed calls of each config.
      progress: function of (calls done, all calls).

    Returns:
      {"device", "runs": [one of each config], "ratios": {"first/other": {"time", "memory"}}}. A run has
      - "encoding" (its name), "mode", "length" or "size", "batch", "attention" (backend of a training step, else "");
      - "median_s", "p10_s", "p90_s": of a step, an evaluated batch, or one new token of every sample;
      - "per_second": tokens or images; "mfu" and "mfu_full_attention" (`models.build.model_flops`; None on an unknown device);
      - "peak_bytes"; "encoding_share": of the time; None where the encoding computes nothing of its own;
      - "roofline": see `profiling.roofline`; on a device with unknown peaks, arithmetic alone, at a rate measured at the end;
      - "reached": the bound of the roofline as a share of the median.

    Raises:
      InputError: a mode that these configs cannot run.
    """
    for config in settings.values():  # before any data are read
        if mode == "decode" and config.is_image:
            raise InputError("--mode=decode generates text: give a config of text")
        if mode == "encode" and config.encoding.kind != "seqpe":
            raise InputError("--mode=encode times SeqPE's encoder: give encoding.kind=seqpe alone")
    programs = [_timed_program(Trainer.of(config), mode) for config in settings.values()]
    seconds, encoding_seconds = _time_in_turns(programs, steps, progress)
    chip = hardware.find_chip(jax.devices()[0].device_kind) or hardware.measure_chip()
    runs = [
        _run(name, config, mode, program, times, encoding_times, chip)
        for (name, config), program, times, encoding_times in zip(
            settings.items(), programs, seconds, encoding_seconds, strict=True
        )
    ]
    return {"device": jax.devices()[0].device_kind, "runs": runs, "ratios": _ratios(runs, seconds)}


def _time_in_turns(
    programs: list[TimedProgram], steps: int, progress: Callable[[int, int], None]
) -> tuple[list[list[float]], list[list[float]]]:
    """Returns, for each program, (seconds of each call, seconds of each call of its encoding alone)."""
    seconds: list[list[float]] = [[] for _ in programs]
    encoding_seconds: list[list[float]] = [[] for _ in programs]
    for turn in range(WARM_UP + steps):
        for program, times, encoding_times in zip(programs, seconds, encoding_seconds, strict=True):
            times.append(_seconds(program.call))
            if program.encoding is not None:
                encoding_times.append(_seconds(program.encoding))
        progress(turn + 1, WARM_UP + steps)
    return [times[WARM_UP:] for times in seconds], [times[WARM_UP:] for times in encoding_seconds]


def _run(
    name: str,
    config: Config,
    mode: str,
    program: TimedProgram,
    times: list[float],
    encoding_times: list[float],
    chip: hardware.Chip,
) -> dict[str, Any]:
    """Returns the entry of one config in `benchmark`'s runs."""
    new_tokens = DECODED if mode == "decode" else 1
    median, bound = statistics.median(times), program.roofline(chip)
    return {
        "encoding": name,
        "mode": mode,
        **({"size": list(config.data.size)} if config.is_image else {"length": config.data.length}),
        "batch": config.batch_size,
        "attention": program.attention,
        "median_s": median / new_tokens,
        "p10_s": float(np.quantile(times, 0.1)) / new_tokens,
        "p90_s": float(np.quantile(times, 0.9)) / new_tokens,
        "per_second": program.units / median,
        **{name: hardware.utilisation(flops, median) if flops else None for name, flops in program.flops.items()},
        "peak_bytes": program.bytes,
        "encoding_share": statistics.median(encoding_times) / median if encoding_times else None,
        "roofline": bound,
        "reached": bound["seconds"] * new_tokens / median,
    }


def _ratios(runs: list[dict[str, Any]], seconds: list[list[float]]) -> dict[str, dict[str, float]]:
    """Returns the ratios of the first run to each other one; of time, the median over turns."""
    first, ratios = runs[0], {}
    for other, times in zip(runs[1:], seconds[1:], strict=True):
        by_turn = [mine / theirs for mine, theirs in zip(seconds[0], times, strict=True)]
        ratios[f"{first['encoding']}/{other['encoding']}"] = {
            "time": statistics.median(by_turn),
            "memory": first["peak_bytes"] / other["peak_bytes"],
        }
    return ratios


def flops_per_call(trainer: Trainer, mode: str) -> dict[str, float]:
    """Returns the floating-point operations of a call by the name of the utilisation (`models.build.model_flops`)."""
    config = trainer.config
    tokens = config.batch_size * (DECODED if mode == "decode" else trainer.model_spec.num_positions)
    return model_flops(config, trainer.task.data_spec.vocabulary, tokens=tokens, training=mode == "train")


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _timed_program(trainer: Trainer, mode: str) -> TimedProgram:
    config = trainer.config
    if mode == "encode":
        call, rows, compiled = _encode(trainer)
        return TimedProgram(call, rows, dict.fromkeys(flops_per_call(trainer, "train"), 0.0), compiled, trainer.mesh)
    make = {"train": _train, "eval": _evaluate, "decode": _decode}[mode]
    call, compiled = make(trainer)
    turns = DECODED if mode == "decode" else 1
    units = config.batch_size * (1 if config.is_image else DECODED if mode == "decode" else config.grid[0])
    attention = attention_backend(config, trainer.model_spec, trainer.mesh) if mode == "train" else ""
    return TimedProgram(
        call, units, flops_per_call(trainer, mode), compiled, trainer.mesh, turns, _encoding(trainer, mode), attention
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
    compiled = trainer.jit_train_step().lower(state, batch).compile()

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
    length = trainer.config.grid[0]
    window = length + DECODED + 1
    own = window if trainer.config.encoding.window_dependence else None
    check_generation(trainer.config, [length], Sampling(DECODED + 1), own)
    params, batch = trainer.init_state().params, _batch(trainer)
    static = decode.SamplingStatic(DECODED + 1, greedy=True, all_tokens=True, keep_logits=False)
    functions = decode.decode_functions(trainer.model_spec.network, static, layout.MeshSharding(trainer.mesh))
    signal = trainer.compiled.signal(params, (window,))
    draw = decode.Sampling(DECODED + 1).arguments(trainer.task.known_V)
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
    """Returns a function that executes the encoding of a call alone; None where it has no encoder, or a table is read."""
    if mode == "decode" or not trainer.model_spec.has_vectors:
        return None
    if mode == "eval":
        params = trainer.init_state().params
        return lambda: trainer.compiled.signal(params, trainer.config.grid)
    return _encode(trainer)[0]


def _encode(trainer: Trainer) -> tuple[Callable[[], Any], int, Any]:
    """Returns (forward and backward pass of a training step's positions, their number, the program)."""
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
