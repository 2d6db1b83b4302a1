"""Times a dropout mask of the generator that the chip has against one of threefry's, in turns (docs/performance.md).

python benchmarks/random_bits.py
"""

import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from flax import linen as nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from seqpe_jax.models.build import dropout_key

TURNS, SHAPE = 40, (8, 512, 1024)


def masked(bits):
    """Returns a program that draws a mask and uses it; called once, so that it is compiled."""
    drop, values = nn.Dropout(0.1, deterministic=False), jnp.ones(SHAPE)
    program = jax.jit(lambda key: drop.apply({}, values, rngs={"dropout": dropout_key(key, bits)}).sum())
    program(jax.random.PRNGKey(0)).block_until_ready()
    return program


def main():
    """Prints the median of rbg's time over threefry's, and the quartiles."""
    programs, ratios = [masked("threefry"), masked("rbg")], []
    for turn in range(TURNS):
        times = [time.perf_counter()]
        for program in programs:
            program(jax.random.PRNGKey(turn)).block_until_ready()
            times.append(time.perf_counter())
        ratios.append((times[2] - times[1]) / (times[1] - times[0]))
    low, middle, high = statistics.quantiles(ratios)
    print(f"rbg takes {middle:.2f} of threefry's time (quartiles {low:.2f} and {high:.2f}, {TURNS} turns)")


if __name__ == "__main__":
    main()
