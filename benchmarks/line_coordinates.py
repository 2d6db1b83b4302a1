"""Whether SeqPE gains from more coordinates of text than an index: the column of a byte and the indentation of its line.

    python benchmarks/line_coordinates.py index 1     trains and evaluates a row with a seed: index, or lines
    python benchmarks/line_coordinates.py lines 1

Stores bits per byte of the row in docs/results/line_coordinates.json; tables of docs/ are written by results.py. The model is
that of configs/sweeps/extrapolation_larger.py (four layers of width 192, 1000 steps of 8 windows of 256 bytes) with SeqPE's
gates and rotary pairs, without the contrastive and the distillation loss. The rotary pairs read the index in both rows.
A byte's coordinates depend on it and on the bytes before it in its window, so that no prediction sees what it predicts.
Hardware: one CPU core for each of two rows at once; about 17 minutes a row.
"""

import dataclasses
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from seqpe_jax import config
from seqpe_jax.encodings.seqpe import SeqPE
from seqpe_jax.files import atomic_write
from seqpe_jax.models.build import stream
from seqpe_jax.training import optimizer as optimizers
from seqpe_jax.training.trainer import Trainer

ROOT = pathlib.Path(__file__).resolve().parents[1]
STORED = ROOT / "docs" / "results" / "line_coordinates.json"
ROWS = {"index": 1, "lines": 3}  # number of coordinates
STEPS, LENGTH, MAX_POSITION = 1000, 256, 5000
EVALUATED_LENGTHS, EVALUATED_BYTES = (256, 1024, 4096), 65536  # of windows; of each split
NEWLINE, SPACE = 10, 32
FIELDS = {
    "steps": STEPS,
    "batch_size": 8,
    "data.length": LENGTH,
    "eval.lengths": (LENGTH,),
    "model.layers": 4,
    "model.width": 192,
    "optimizer.learning_rate": 2.8e-3,
    "encoding.max_position": MAX_POSITION,
    "encoding.width": 96,
    "encoding.feature_width": 16,
    "encoding.rotary_pairs": 10,
    "objective.contrastive.weight": 0.0,
    "objective.distillation.weight": 0.0,
}


def coordinates(tokens: jax.Array, first: jax.Array, axes: int) -> jax.Array:
    """Returns int32[batch, length, axes]: the index, and with three axes the column and the indentation.

    Args:
      tokens: bytes, int32[batch, length].
      first: index of the first byte of each window, int32[batch].
      axes: 1 or 3.
    """
    batch, length = tokens.shape
    at = jnp.arange(length)
    index = at + first[:, None]
    if axes == 1:
        return index[..., None]
    begins = jnp.pad(tokens[:, :-1] == NEWLINE, ((0, 0), (1, 0)))
    line = jax.lax.cummax(jnp.where(begins, at, 0), axis=1)  # where the line of a byte begins

    def next_depth(carry, here):
        text, line_before = carry  # where a line's text began, -1 = not yet; where the line of the byte before began
        token, line, at = here
        text = jnp.where(line != line_before, -1, text)
        text = jnp.where((text < 0) & (token != SPACE), at, text)
        return (text, line), jnp.where(text >= 0, text - line, at - line + 1)

    start = jnp.full(batch, -1), jnp.full(batch, -1)
    _, depth = jax.lax.scan(next_depth, start, (tokens.T, line.T, at))
    columns = [index, jnp.minimum(at - line, 999), jnp.minimum(depth.T, 99)]
    return jnp.stack(columns, -1).astype(jnp.int32)


def measure(row: str, seed: int) -> dict[str, float]:
    """Trains a row and returns its bits per byte by split and length, as "SPLIT@LENGTH"."""
    axes, key = ROWS[row], jax.random.key(seed)
    settings = config.load(str(ROOT / "configs" / "stdlib_lm.py:seqpe"), FIELDS | {"seed": seed})
    trainer = Trainer.of(settings, devices=jax.devices()[:1])
    network, dims = trainer.model_spec.network, settings.dims
    seqpe = SeqPE(settings.encoding, dataclasses.replace(dims, grid=(LENGTH,) * axes))
    rotary = settings.encoding.rotary_part().make_module(dims)

    def position_signal(params, positions):
        batch, length, _ = positions.shape
        own = {"params": params}
        vectors = seqpe.apply(own, positions.reshape(-1, axes), method="vectors").reshape(batch, length, -1)
        signal = seqpe.apply(own, vectors, positions, per_sample=False, method="signal")
        return signal.joined(rotary.apply({}, positions[..., :1], shape=(length,)))

    def losses(params, tokens, first):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        signal = position_signal(params["encoding"], coordinates(inputs, first, axes))
        logits = network.apply({"params": params["model"]}, inputs, signal, True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    optimizer = optimizers.make_optimizer(settings.optimizer, settings.steps)

    @jax.jit
    def step(params, state, tokens, number):
        own = jax.random.fold_in(key, number)
        first = jax.random.randint(jax.random.fold_in(own, 1), (tokens.shape[0],), 0, MAX_POSITION - LENGTH)
        first *= jax.random.bernoulli(own, settings.objective.shift.rate)
        loss, gradients = jax.value_and_grad(lambda params: losses(params, tokens, first).mean())(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    encoding = seqpe.init(stream(key, "encoding"), jnp.zeros((1, LENGTH, axes), jnp.int32))["params"]
    signal = position_signal(encoding, jnp.zeros((1, LENGTH, axes), jnp.int32))
    model = network.init(stream(key, "model"), jnp.zeros((1, LENGTH), jnp.int32), signal)["params"]
    params = {"encoding": encoding, "model": model}
    state, batches = optimizer.init(params), trainer.batches(0)
    for number in range(STEPS):
        params, state, loss = step(params, state, next(batches)[1]["tokens"], number)
        if (number + 1) % 50 == 0:
            print(f"step {number + 1} of {STEPS}: {float(loss) / math.log(2):.3f} bits per byte", flush=True)

    total = jax.jit(lambda params, tokens: losses(params, tokens, jnp.zeros(len(tokens), jnp.int32)).sum())
    found = {}
    for split in ("validation", "test"):
        text = np.asarray(trainer.task.sample_tokens((EVALUATED_BYTES + 1,), split))
        for length in EVALUATED_LENGTHS:
            windows = np.stack([text[at : at + length + 1] for at in range(0, EVALUATED_BYTES, length)])
            parts = windows.reshape(-1, max(EVALUATED_LENGTHS) // length, length + 1)
            bits = sum(float(total(params, jnp.asarray(part))) for part in parts) / math.log(2)
            found[f"{split}@{length}"] = bits / (windows.shape[0] * length)
    return found


def main(row: str, seed: str) -> None:
    """Measures a row and stores it with the others."""
    found = measure(row, int(seed))
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    atomic_write(STORED, json.dumps(stored | {f"{row}-{seed}": found}, indent=1) + "\n")
    print(found)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ROWS or not sys.argv[2].isdigit():
        print(f"error: {' '.join(sys.argv[1:])}: give a row, {' or '.join(ROWS)}, and a seed", file=sys.stderr)
        sys.exit(2)
    main(*sys.argv[1:])
