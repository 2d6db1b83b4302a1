"""Text from a language model: one pass over the prompts fills a cache, then each new token reads only that.

Prompts of different lengths stand side by side from place 0 on, padded at their ends. A new token takes the place after
its own prompt, so the padding is overwritten before any token could see it, and a place is a position for every encoding.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax import axes
from seqpe_jax.encodings.base import PositionSignal
from seqpe_jax.errors import InputError
from seqpe_jax.models.attention import KVCache

MIN_BUCKET = 32  # places of the shortest prompts; longer ones are padded to the next power of two
TOKENS_PER_SYNC = 8  # tokens between two looks of the host


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How many tokens are generated, and how each is chosen.

    Attributes:
      new_tokens: at most, for each prompt.
      temperature: 0 = the likeliest token; else the logits are divided by it.
      top_p: a token is drawn from the likeliest ones that together reach this probability (Holtzman et al. 2020), and
        from those as likely as the last of them.
      seed: of the draws; a prompt's draws depend on it and on the prompt's index alone.
      end: token that ends a text, or None.

    Raises:
      InputError: a value out of its range.
    """

    new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    end: int | None = None

    def __post_init__(self):
        if self.new_tokens < 1:
            raise InputError(f"the number of new tokens must be at least 1, got {self.new_tokens}")
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
            raise InputError(f"temperature must be 0 (the likeliest token) or from 1e-6 to 1e6, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p must be above 0 and at most 1 (1 = draw from all tokens), got {self.top_p}")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed must be at least 0 and below {2**31}, got {self.seed}")


@dataclasses.dataclass(frozen=True)
class Generation:
    """What followed a prompt.

    Attributes:
      tokens: int32[n], with the end token where there is one; log_probs: of each under the model itself, float32[n], nats.
      ended: the last token is the end token.
      logits: the model's own, float32[n, V], at each token, if they were asked for.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    ended: bool
    logits: np.ndarray | None = None

    @property
    def content(self) -> np.ndarray:
        """The tokens without the end token."""
        return self.tokens[:-1] if self.ended else self.tokens


@flax.struct.dataclass
class DecodeState:
    """A batch between two tokens; N is the number of new tokens there is room for."""

    cache: tuple[KVCache, ...]
    lengths_B: jax.Array  # int32, of the prompts; 0 marks a padding row
    index_B: jax.Array  # int32, of the prompts among all
    token_B: jax.Array  # int32, chosen last
    done_B: jax.Array  # bool
    step: jax.Array  # int32, tokens chosen so far
    count_B: jax.Array  # int32, tokens of each sample so far
    tokens_BN: jax.Array  # int32
    log_probs_BN: jax.Array  # float32
    logits_BNV: jax.Array | None  # float32


class SamplingArgs(NamedTuple):
    """The parts of `Sampling` that need no new compilation."""

    key: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    end: jax.Array  # -1 = none
    known_V: jax.Array  # bool, ids that are tokens; a model may have more rows than its tokenizer has tokens


class SamplingStatic(NamedTuple):
    """The parts that do."""

    new_tokens: int
    greedy: bool
    all_tokens: bool  # top_p = 1
    keep_logits: bool
    limit: int | None = None  # tokens of prompt and text together, where the window ends; None = as many as there are

    def places(self, prompt: int) -> int:
        """Returns the tokens of a padded prompt and what follows it, at most."""
        return min(prompt + self.new_tokens, self.limit or prompt + self.new_tokens)


class DecodeFunctions(NamedTuple):
    """The compiled-on-first-call halves of generation: `prefill`, and `decode_loop` with its state donated."""

    prefill: Callable[..., DecodeState]
    decode_loop: Callable[..., DecodeState]


@functools.lru_cache
def decode_functions(model: nn.Module, static: SamplingStatic, layout: axes.ShardingRules) -> DecodeFunctions:
    """Returns the programs of a model whose arrays are laid out like that; the host reads whole ones."""
    split, whole = layout.sharding(axes.BATCH), layout.sharding()
    state = DecodeState(
        cache=layout.sharding(axes.BATCH, None, axes.HEADS),
        lengths_B=split,
        index_B=split,
        token_B=split,
        done_B=whole,
        step=whole,
        count_B=whole,
        tokens_BN=whole,
        log_probs_BN=whole,
        logits_BNV=whole,
    )

    def start(params: Any, *arguments: Any) -> DecodeState:
        with axes.use_sharding(layout):
            return prefill(model, layout.all_gather_params(params, "model"), *arguments, static=static)

    def go_on(params: Any, *arguments: Any) -> DecodeState:
        with axes.use_sharding(layout):
            return decode_loop(model, layout.all_gather_params(params, "model"), *arguments, static=static)

    return DecodeFunctions(jax.jit(start, out_shardings=state), jax.jit(go_on, out_shardings=state, donate_argnums=2))


def prefill(
    model: nn.Module,
    params: Any,
    signal: PositionSignal,
    tokens_BL: jax.Array,
    lengths_B: jax.Array,
    index_B: jax.Array,
    sampling_args: SamplingArgs,
    *,
    static: SamplingStatic,
) -> DecodeState:
    """Reads the prompts and returns the state after the first new token.

    Args:
      model: has `forward_cached`, `logits` and `init_cache` (`models.gpt2.GPT2`).
      signal: of a window of L + N positions (`SamplingStatic.places`), one position set.
      tokens_BL: int32, each prompt followed by padding; lengths_B, index_B: see `DecodeState`.
    """
    batch, length = tokens_BL.shape
    cache = model.init_cache(batch, static.places(length), signal)
    hidden_BLD, cache = model.apply(
        {"params": params}, tokens_BL, signal, cache, jnp.arange(length)[None], method="forward_cached"
    )
    last_B1D = jnp.take_along_axis(hidden_BLD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)
    logits_BV = model.apply({"params": params}, last_B1D, method="logits")[:, 0]
    zeros_BN = jnp.zeros((batch, static.new_tokens), jnp.int32)
    state = DecodeState(
        cache,
        lengths_B,
        index_B,
        token_B=zeros_BN[:, 0],
        done_B=lengths_B == 0,
        step=jnp.int32(0),
        count_B=zeros_BN[:, 0],
        tokens_BN=zeros_BN,
        log_probs_BN=zeros_BN.astype(jnp.float32),
        logits_BNV=jnp.zeros((*zeros_BN.shape, logits_BV.shape[-1])) if static.keep_logits else None,
    )
    return _take(state, logits_BV, sampling_args, static)


def decode_loop(
    model: nn.Module,
    params: Any,
    signal: PositionSignal,
    state: DecodeState,
    sampling_args: SamplingArgs,
    until: jax.Array,
    *,
    static: SamplingStatic,
) -> DecodeState:
    """Returns the state after `until` new tokens, or as soon as every sample is done."""

    def going(state: DecodeState) -> jax.Array:
        return (state.step < until) & ~state.done_B.all()

    def one(state: DecodeState) -> DecodeState:
        places_B1 = (state.lengths_B + state.step - 1)[:, None]
        if static.limit is not None:  # rows that are done stay inside of the window
            places_B1 = jnp.minimum(places_B1, static.limit - 1)
        hidden_B1D, cache = model.apply(
            {"params": params}, state.token_B[:, None], signal, state.cache, places_B1, method="forward_cached"
        )
        logits_BV = model.apply({"params": params}, hidden_B1D, method="logits")[:, 0]
        return _take(state.replace(cache=cache), logits_BV, sampling_args, static)

    return jax.lax.while_loop(going, one, state)


def _take(state: DecodeState, logits_BV: jax.Array, sampling_args: SamplingArgs, static: SamplingStatic) -> DecodeState:
    """Chooses a token for each sample and writes it down for those that are not done."""
    live_B, step = ~state.done_B, state.step
    possible_BV = jnp.where(sampling_args.known_V, logits_BV, -jnp.inf)
    if static.greedy:
        token_B = possible_BV.argmax(axis=-1).astype(jnp.int32)
    else:
        keys_B = jax.vmap(lambda index: jax.random.fold_in(jax.random.fold_in(sampling_args.key, index), step))(
            state.index_B
        )
        token_B = sample(
            keys_B, possible_BV, sampling_args.temperature, None if static.all_tokens else sampling_args.top_p
        )
    log_prob_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], axis=-1)[:, 0]
    written = None if state.logits_BNV is None else state.logits_BNV.at[:, step].set(logits_BV)
    done_B = state.done_B | (token_B == sampling_args.end)
    if static.limit is not None:
        done_B |= state.lengths_B + step + 1 >= static.limit
    return state.replace(
        token_B=token_B,
        done_B=done_B,
        step=step + 1,
        count_B=state.count_B + live_B,
        tokens_BN=state.tokens_BN.at[:, step].set(jnp.where(live_B, token_B, 0)),
        log_probs_BN=state.log_probs_BN.at[:, step].set(jnp.where(live_B, log_prob_B, 0)),
        logits_BNV=written,
    )


def sample(keys_B: jax.Array, logits_BV: jax.Array, temperature: jax.Array, top_p: jax.Array | None) -> jax.Array:
    """Returns one token for each sample, int32[B], drawn as `Sampling` says; top_p None = from all tokens."""
    logits_BV = (
        logits_BV - logits_BV.max(axis=-1, keepdims=True)
    ) / temperature  # the largest stays 0 at any temperature
    if top_p is not None:
        ordered_BV = -jnp.sort(-logits_BV)
        probabilities_BV = jax.nn.softmax(ordered_BV)
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        # The likeliest is always kept, even where rounding would leave none.
        last_B1 = jnp.where(before_BV < top_p, ordered_BV, 0.0).min(axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= last_B1, logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


class PromptBatch(NamedTuple):
    """Prompts that are read together: their indices, the places each is padded to, the rows of the batch."""

    indices: list[int]
    places: int
    rows: int


def batches(
    lengths: Sequence[int], *, new_tokens: int, window: int, batch_tokens: int, multiple: int
) -> list[PromptBatch]:
    """Returns the batches of prompts with these lengths, the shortest first, of few static shapes.

    Args:
      new_tokens: for each prompt; window: of the longest prompt, and of its new tokens where it has room for them.
      batch_tokens: places of a batch at most, unless `multiple` rows have more; multiple: of which rows must be one.
    """
    by_places: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        places = min(max(MIN_BUCKET, _next_power(lengths[index])), window - new_tokens)
        if places < lengths[index]:  # one shape for all prompts whose new tokens end with the window
            places = window
        by_places.setdefault(places, []).append(index)
    found = []
    for places, indices in by_places.items():
        room = max(1, batch_tokens // (places + new_tokens) // multiple)
        rows = multiple * min(room, -(-_next_power(len(indices)) // multiple))
        found += [PromptBatch(indices[first : first + rows], places, rows) for first in range(0, len(indices), rows)]
    return found


def _next_power(number: int) -> int:
    return 1 << (number - 1).bit_length()


def decode(
    compiled: DecodeFunctions,
    params: Any,
    signal: PositionSignal,
    batch: PromptBatch,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    known_V: np.ndarray,
    *,
    put: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]],
) -> Iterator[list[Generation]]:
    """Yields what followed the prompts of a batch so far, after a few more tokens each time; at last the whole.

    Args:
      compiled: of `decode_functions`; signal: of batch.places + new tokens positions; put: lays host arrays out over the devices.
      known_V: bool, ids that may be generated.
    """
    tokens_BL = np.zeros((batch.rows, batch.places), np.int32)
    lengths_B, index_B = np.zeros((2, batch.rows), np.int32)
    for row, index in enumerate(batch.indices):
        prompt = prompts[index]
        tokens_BL[row, : len(prompt)], lengths_B[row], index_B[row] = prompt, len(prompt), index
    placed = put({"tokens": tokens_BL, "lengths": lengths_B, "index": index_B})
    sampling_args = SamplingArgs(
        jax.random.PRNGKey(sampling.seed),
        np.float32(max(sampling.temperature, np.finfo(np.float32).tiny)),
        np.float32(sampling.top_p),
        np.int32(-1 if sampling.end is None else sampling.end),
        known_V,
    )
    state = compiled.prefill(params, signal, placed["tokens"], placed["lengths"], placed["index"], sampling_args)
    step, done = 1, False
    while not done and step < sampling.new_tokens:
        step = min(step + TOKENS_PER_SYNC, sampling.new_tokens)
        state = compiled.decode_loop(params, signal, state, sampling_args, np.int32(step))
        done = bool(np.asarray(state.done_B).all())
        if not done and step < sampling.new_tokens:
            yield _so_far(state, batch, sampling)
    yield _so_far(state, batch, sampling)


def _so_far(state: DecodeState, batch: PromptBatch, sampling: Sampling) -> list[Generation]:
    fields = (state.tokens_BN, state.log_probs_BN, state.count_B)
    tokens_BN, log_probs_BN, count_B = (np.asarray(field) for field in fields)
    logits_BNV = None if state.logits_BNV is None else np.asarray(state.logits_BNV)
    found = []
    for row, _ in enumerate(batch.indices):
        count = int(count_B[row])
        tokens = tokens_BN[row, :count].copy()
        logits = None if logits_BNV is None else logits_BNV[row, :count].copy()
        ended = sampling.end is not None and bool(tokens[-1] == sampling.end)
        found.append(Generation(tokens, log_probs_BN[row, :count].copy(), ended, logits))
    return found
