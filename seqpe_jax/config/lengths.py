"""Lengths of the baselines, as shares of the training length.

A constant that an author chose as a number of tokens belongs to the author's training length. Where a field of
`EncodingConfig` is 0, its value here is the same share of the training length of the config.
"""

import dataclasses
import math
from typing import Any

from seqpe_jax.config.schema import Config

T5_BUCKETS = 32  # Raffel et al. 2020 (arXiv 1910.10683, section 2.1)
T5_SHARE = 128 / 512  # distances up to 128 at a training length of 512 (the same, sections 2.1 and 3.1.2)
FIRE_SHARE = 512 / 2048  # threshold 512 at a training length of 2048 (Li et al. 2024, arXiv 2310.04418)
FIRE_SCALE = 0.1 * 2048  # c = 0.1 per token at that length
YARN_BETA_FAST = 32.0  # turns in the training window (Peng et al. 2023, arXiv 2309.00071, section 3.2)
DIRECTED_FRACTION = 8 / 12  # of the heads (Fuller et al. 2024, arXiv 2405.13985)


def resolve_lengths(config: Config) -> dict[str, Any]:
    """Returns the fields of the encoding whose 0 stands for a share of the training length, with that share's value.

    The training length is that of a window in tokens, or the diagonal of a grid in patches. Values depend on the grid and
    the model that a config trains, not on what is evaluated later.

    - `t5_max_distance` is at least the number of buckets, so that each may have a distance of its own; at the quickstart's
      64 tokens that is 32, which one run of 400 steps found better than the authors' 128 at all of 64 to 1024 tokens.
    - `fire_threshold` and `fire_scale` scale together, so that FIRE's network reads what its authors' reads at the same
      share of the window. At the quickstart's 64 tokens that was worse than the authors' own numbers, which its page sets.
    - `rotary_pairs` of `scale_invariant` are its authors' half of the pairs, of those with a period within the training
      window; at their own 4096 tokens all of that half are. At 64 tokens 4 pairs of 12 were far better than 6.
    - `kerple_scale` is not among them: drawn below 8 per token at 64 tokens, its authors' share (1 at 512; Chi et al. 2022,
      arXiv 2205.09921), KERPLE was worse than below 1, by 0.06 to 0.08 bits in one run of 400 steps.
    - `yarn_beta_fast` is at most the turns of the fastest pair in training, so that one pair stays as it was.
    """
    encoding, model = config.encoding, config.model
    length = math.hypot(*config.grid)
    buckets = encoding.t5_buckets or min(T5_BUCKETS, max(2, math.floor(length)))
    fastest = math.prod(config.grid) / (2 * math.pi)  # RoPE numbers the patches of a grid one after the other
    return {
        "t5_buckets": buckets,
        "t5_max_distance": encoding.t5_max_distance or max(buckets, round(T5_SHARE * length)),
        "fire_threshold": encoding.fire_threshold or FIRE_SHARE * length,
        "fire_scale": encoding.fire_scale or FIRE_SCALE / length,
        "yarn_beta_fast": encoding.yarn_beta_fast or min(YARN_BETA_FAST, fastest),
        "directed_heads": encoding.directed_heads or round(DIRECTED_FRACTION * model.heads),
    } | ({"rotary_pairs": _seen_pairs(config, length)} if encoding.kind == "scale_invariant" else {})


def with_resolved_lengths(config: Config) -> Config:
    """Returns a config in which every length of the encoding is written out."""
    return dataclasses.replace(config, encoding=dataclasses.replace(config.encoding, **resolve_lengths(config)))


def _seen_pairs(config: Config, length: float) -> int:
    """Rotary pairs of scale-invariant attention: as set, or of the faster half those with a period within the window."""
    encoding, width = config.encoding, config.model.width // config.model.heads
    if encoding.rotary_pairs:
        return encoding.rotary_pairs
    periods = (2 * math.pi * encoding.theta ** (2.0 * pair / max(1, width)) for pair in range(width // 4))
    return max(1, sum(period <= length for period in periods))
