"""Text generation over a KV cache: `prefill` reads the prompts, `decode_loop` adds one token per sample at a time.

Prompts of different lengths begin at token index 0 of a common window and are padded at the end. A new token is written at
the index after its own prompt, so that padding is overwritten before any token attends to it. The rings that layers with a
window have (`models.attention.KVCache`) never hold padding, which would overwrite tokens.
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
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.errors import InputError
from seqpe_jax.models.attention import KVCache

MIN_BUCKET = 32  # padded length of the shortest prompts; longer ones are padded to the next power of two
TOKENS_PER_SYNC = 8  # tokens that the device generates between two looks of the host


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Number of new tokens, and the rule by which each is chosen.

    Attributes:
      new_tokens: maximum for each prompt.
      temperature: 0 = the most likely token; else logits are divided by it.
      top_p: nucleus sampling (Holtzman et al. 2020): the most likely tokens that together reach this probability, and those
        as likely as the last of them.
      seed: seed of the random draws, which depend on it and on the prompt's index alone.
      end: token that ends a text, or None.
      top_k: draw from so many of the most likely tokens, and those as likely as the last of them; 0 = all. top_p is then of
        these.

    Raises:
      InputError: a value out of its range, or a limit of draws where the temperature is 0.
    """

    new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    end: int | None = None
    top_k: int = 0

    def __post_init__(self):
        if self.new_tokens < 1:
            raise InputError(f"the number of new tokens must be at least 1, got {self.new_tokens}")
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
            raise InputError(f"temperature must be 0 (the likeliest token) or from 1e-6 to 1e6, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p must be above 0 and at most 1 (1 = draw from all tokens), got {self.top_p}")
        if not 0 <= self.top_k < 2**31:
            raise InputError(f"top-k must be at least 0 (0 = draw from all tokens), got {self.top_k}")
        if self.temperature == 0 and (self.top_k or self.top_p != 1):
            raise InputError(
                "top-k and top-p limit random draws, and at temperature 0 the likeliest token is always taken: set a "
                "temperature such as 0.8, or leave them out"
            )
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed must be at least 0 and below {2**31}, got {self.seed}")

    def static(self, limit: int | None, keep_logits: bool) -> "SamplingStatic":
        """Returns the settings that need a compilation of their own."""
        return SamplingStatic(
            self.new_tokens, self.temperature == 0, self.top_p == 1 and not self.top_k, keep_logits, limit
        )

    def arguments(self, known_V: np.ndarray) -> "SamplingArgs":
        """Returns the settings that are arguments of the compiled functions; known_V: see `SamplingArgs`."""
        return SamplingArgs(
            jax.random.PRNGKey(self.seed),
            np.float32(max(self.temperature, np.finfo(np.float32).tiny)),
            np.float32(self.top_p),
            np.int32(self.top_k or np.iinfo(np.int32).max),
            np.int32(-1 if self.end is None else self.end),
            known_V,
        )


class SamplingArgs(NamedTuple):
    """Settings of `Sampling` that are arguments of the compiled functions.

    Attributes:
      key: PRNG key.
      temperature: float32[].
      top_p: float32[].
      top_k: int32[], at least 1.
      end: int32[], token that ends a text; -1 = none.
      known_V: bool, ids that the tokenizer has; a model may have more rows.
    """

    key: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    end: jax.Array
    known_V: jax.Array


class SamplingStatic(NamedTuple):
    """Settings of `Sampling` that need a compilation of their own.

    Attributes:
      new_tokens: maximum for each prompt.
      greedy: take the most likely token.
      all_tokens: top_p is 1, and there is no top_k.
      keep_logits: return the logits of each new token.
      limit: tokens of prompt and text together, at which the window ends; None = no limit.
    """

    new_tokens: int
    greedy: bool
    all_tokens: bool
    keep_logits: bool
    limit: int | None = None

    def window(self, prompt_length: int) -> int:
        """Returns the tokens of a padded prompt and its text, at most."""
        tokens = prompt_length + self.new_tokens
        return min(tokens, self.limit or tokens)


@dataclasses.dataclass(frozen=True)
class Generation:
    """The text generated after a prompt.

    Attributes:
      tokens: int32[n], the end token included.
      log_probs: float32[n], log probability of each token under the model, without temperature, top_k or top_p, nats.
      ended: the last token is the end token.
      logits: float32[n, V], logits that each token was chosen from, if asked for.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    ended: bool
    logits: np.ndarray | None = None

    @property
    def content(self) -> np.ndarray:
        """The tokens without the end token, int32[n]."""
        return self.tokens[:-1] if self.ended else self.tokens


@flax.struct.dataclass
class DecodeState:
    """Loop state of a batch; N is the maximum number of new tokens.

    Attributes:
      cache: KV cache of each layer.
      lengths_B: int32, tokens of each prompt; 0 marks a padding row.
      index_B: int32, index of each prompt among all.
      token_B: int32, the newest token.
      done_B: bool, the text has ended.
      step: int32[], tokens chosen so far.
      count_B: int32, tokens of each text so far.
      tokens_BN: int32, the texts.
      log_probs_BN: float32, log probabilities of the tokens.
      logits_BNV: float32, logits of the tokens, or None.
    """

    cache: tuple[KVCache, ...]
    lengths_B: jax.Array
    index_B: jax.Array
    token_B: jax.Array
    done_B: jax.Array
    step: jax.Array
    count_B: jax.Array
    tokens_BN: jax.Array
    log_probs_BN: jax.Array
    logits_BNV: jax.Array | None


class DecodeFunctions(NamedTuple):
    """`prefill` and `decode_loop` of a model, compiled at their first call; `decode_loop` donates its state."""

    prefill: Callable[..., DecodeState]
    decode_loop: Callable[..., DecodeState]


@functools.lru_cache
def decode_functions(
    model: nn.Module, static: SamplingStatic, sharding: Any, gather_once: bool = True
) -> DecodeFunctions:
    """Returns the compiled functions of a model under sharding rules; arrays that the host reads are replicated.

    Args:
      model: see `prefill`.
      static: see `prefill`.
      sharding: a `distributed.sharding.MeshSharding`.
      gather_once: all-gather the parameters before the loop over tokens; else in each turn, layer by layer, so that no device
        holds all of them.
    """
    by_batch, replicated = sharding.sharding(axes.BATCH), sharding.sharding()
    heads = sharding.sharding(axes.BATCH, None, axes.HEADS)
    key_heads = heads if model.config.kv_heads % sharding.shards(axes.HEADS) == 0 else by_batch
    out_shardings = DecodeState(
        cache=(KVCache(key_heads, key_heads, heads if model.config.gate else None),) * model.config.layers,
        lengths_B=by_batch,
        index_B=by_batch,
        token_B=by_batch,
        done_B=replicated,
        step=replicated,
        count_B=replicated,
        tokens_BN=replicated,
        log_probs_BN=replicated,
        logits_BNV=replicated,
    )

    def compile_sharded(function: Callable[..., DecodeState], **options: Any) -> Callable[..., DecodeState]:
        def sharded(params: Any, *arguments: Any) -> DecodeState:
            with axes.use_sharding(sharding):
                params = sharding.all_gather_params(params, "model") if gather_once else params
                return function(model, params, *arguments, static=static)

        return jax.jit(sharded, out_shardings=out_shardings, **options)

    loop = functools.partial(decode_loop, gather_each_turn=not gather_once)
    return DecodeFunctions(compile_sharded(prefill), compile_sharded(loop, donate_argnums=2))


def prefill(
    model: nn.Module,
    params: Any,
    signal: PositionSignal,
    tokens_BL: jax.Array,
    lengths_B: jax.Array,
    index_B: jax.Array,
    sampling: SamplingArgs,
    *,
    static: SamplingStatic,
) -> DecodeState:
    """Returns the state after the prompts and the first new token.

    Args:
      model: has `forward_cached`, `logits` and `init_cache` (`models.decoder.Decoder`).
      params: parameters of the model.
      signal: PositionSignal of the whole window (`SamplingStatic.window`), one position set.
      tokens_BL: int32, prompts padded at the end.
      lengths_B: int32, tokens of each prompt.
      index_B: int32, index of each prompt among all.
      sampling: dynamic settings.
      static: static settings.
    """
    batch, length = tokens_BL.shape
    cache = model.init_cache(batch, static.window(length), signal)
    hidden_BLD, cache = model.apply(
        {"params": params}, tokens_BL, signal, cache, jnp.arange(length)[None], lengths_B, method="forward_cached"
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
    return _append_token(state, logits_BV, sampling, static)


def decode_loop(
    model: nn.Module,
    params: Any,
    signal: PositionSignal,
    state: DecodeState,
    sampling: SamplingArgs,
    until: jax.Array,
    *,
    static: SamplingStatic,
    gather_each_turn: bool = False,
) -> DecodeState:
    """Returns the state after `until` new tokens, or as soon as every text has ended; other arguments as in `prefill`.

    With `gather_each_turn`, sharded parameters are gathered for each token anew.
    """

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.step < until) & ~state.done_B.all()

    def decode_token(state: DecodeState) -> DecodeState:
        own = params
        if gather_each_turn:  # tied to the state, else a compiler may gather them before the loop
            own, step = jax.lax.optimization_barrier((params, state.step))
            state = state.replace(step=step)
        token_index_B1 = (state.lengths_B + state.step - 1)[:, None]
        if static.limit is not None:  # rows that are done stay inside the window
            token_index_B1 = jnp.minimum(token_index_B1, static.limit - 1)
        hidden_B1D, cache = model.apply(
            {"params": own}, state.token_B[:, None], signal, state.cache, token_index_B1, method="forward_cached"
        )
        logits_BV = model.apply({"params": own}, hidden_B1D, method="logits")[:, 0]
        return _append_token(state.replace(cache=cache), logits_BV, sampling, static)

    return jax.lax.while_loop(unfinished, decode_token, state)


def _append_token(
    state: DecodeState, logits_BV: jax.Array, sampling: SamplingArgs, static: SamplingStatic
) -> DecodeState:
    """Chooses a token for each sample, and appends it to the texts that have not ended."""
    live_B, step = ~state.done_B, state.step
    allowed_BV = jnp.where(sampling.known_V, logits_BV, -jnp.inf)
    if static.greedy:
        token_B = allowed_BV.argmax(axis=-1).astype(jnp.int32)
    else:
        keys_B = jax.vmap(lambda index: jax.random.fold_in(jax.random.fold_in(sampling.key, index), step))(
            state.index_B
        )
        limits = None if static.all_tokens else (sampling.top_k, sampling.top_p)
        token_B = sample_tokens(keys_B, allowed_BV, sampling.temperature, limits)
    log_prob_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], axis=-1)[:, 0]
    logits_BNV = None if state.logits_BNV is None else state.logits_BNV.at[:, step].set(logits_BV)
    done_B = state.done_B | (token_B == sampling.end)
    if static.limit is not None:
        done_B |= state.lengths_B + step + 1 >= static.limit
    return state.replace(
        token_B=token_B,
        done_B=done_B,
        step=step + 1,
        count_B=state.count_B + live_B,
        tokens_BN=state.tokens_BN.at[:, step].set(jnp.where(live_B, token_B, 0)),
        log_probs_BN=state.log_probs_BN.at[:, step].set(jnp.where(live_B, log_prob_B, 0)),
        logits_BNV=logits_BNV,
    )


def sample_tokens(
    keys_B: jax.Array, logits_BV: jax.Array, temperature: jax.Array, limits: tuple[jax.Array, jax.Array] | None
) -> jax.Array:
    """Returns one random token per sample, int32[B].

    Args:
      keys_B: PRNG keys.
      logits_BV: float32; -inf = never.
      temperature: float32[], see `Sampling`.
      limits: (top_k, int32[] of at least 1; top_p, float32[]), see `Sampling`; None = all tokens.
    """
    # The largest logit stays 0 at any temperature.
    logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature
    if limits is not None:
        top_k, top_p = limits
        sorted_BV = -jnp.sort(-logits_BV)
        among_top_V = jnp.arange(sorted_BV.shape[-1]) < top_k
        sorted_BV = jnp.where(among_top_V, sorted_BV, -jnp.inf)
        probabilities_BV = jax.nn.softmax(sorted_BV)
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        # The most likely token stays, even where rounding would leave none.
        threshold_B1 = jnp.where((before_BV < top_p) & among_top_V, sorted_BV, 0.0).min(axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


class PromptBatch(NamedTuple):
    """Prompts that are decoded together.

    Attributes:
      indices: indices of these prompts among all prompts.
      length: tokens that each prompt is padded to.
      rows: rows of the batch; those beyond the prompts are padding.
    """

    indices: list[int]
    length: int
    rows: int


def batch_prompts(
    lengths: Sequence[int], *, new_tokens: int, window: int, batch_tokens: int, multiple: int
) -> list[PromptBatch]:
    """Returns batches of prompts, the shortest first, with few different shapes.

    Args:
      lengths: tokens of each prompt.
      new_tokens: maximum for each prompt.
      window: tokens of the longest prompt, and of its new tokens where there is room for them.
      batch_tokens: maximum of rows * (length + new tokens), unless `multiple` rows exceed it.
      multiple: divides the number of rows.
    """
    by_length: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        padded = min(max(MIN_BUCKET, _next_power(lengths[index])), window - new_tokens)
        if padded < lengths[index]:  # one shape for all prompts whose text ends with the window
            padded = window
        by_length.setdefault(padded, []).append(index)
    batches = []
    for padded, indices in by_length.items():
        max_multiples = max(1, batch_tokens // (padded + new_tokens) // multiple)
        rows = multiple * min(max_multiples, -(-_next_power(len(indices)) // multiple))
        batches += [PromptBatch(indices[first : first + rows], padded, rows) for first in range(0, len(indices), rows)]
    return batches


def _next_power(number: int) -> int:
    """The smallest power of two that is at least a number."""
    return 1 << (number - 1).bit_length()


def decode(
    functions: DecodeFunctions,
    params: Any,
    signal: PositionSignal,
    batch: PromptBatch,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    known_V: np.ndarray,
    *,
    to_devices: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]],
) -> Iterator[list[Generation]]:
    """Yields the texts of a batch so far, after every `TOKENS_PER_SYNC` tokens and at the end.

    Args:
      functions: result of `decode_functions`.
      params: parameters of the model.
      signal: PositionSignal of batch.length + new tokens positions.
      batch: batch of these prompts.
      prompts: all prompts, int[n] each.
      sampling: settings.
      known_V: bool, ids that may be generated.
      to_devices: shards host arrays over the devices.
    """
    tokens_BL = np.zeros((batch.rows, batch.length), np.int32)
    lengths_B, index_B = np.zeros((2, batch.rows), np.int32)
    for row, index in enumerate(batch.indices):
        prompt = prompts[index]
        tokens_BL[row, : len(prompt)], lengths_B[row], index_B[row] = prompt, len(prompt), index
    arrays = to_devices({"tokens": tokens_BL, "lengths": lengths_B, "index": index_B})
    arguments = sampling.arguments(known_V)
    state = functions.prefill(params, signal, arrays["tokens"], arrays["lengths"], arrays["index"], arguments)
    step, done = 1, False
    while not done and step < sampling.new_tokens:
        step = min(step + TOKENS_PER_SYNC, sampling.new_tokens)
        state = functions.decode_loop(params, signal, state, arguments, np.int32(step))
        done = bool(np.asarray(state.done_B).all())
        if not done and step < sampling.new_tokens:
            yield _texts(state, batch, sampling)
    yield _texts(state, batch, sampling)


def _texts(state: DecodeState, batch: PromptBatch, sampling: Sampling) -> list[Generation]:
    """The texts of a state, one for each prompt of the batch."""
    fields = (state.tokens_BN, state.log_probs_BN, state.count_B)
    tokens_BN, log_probs_BN, count_B = (np.asarray(field) for field in fields)
    logits_BNV = None if state.logits_BNV is None else np.asarray(state.logits_BNV)
    texts = []
    for row, _ in enumerate(batch.indices):
        count = int(count_B[row])
        tokens = tokens_BN[row, :count].copy()
        logits = None if logits_BNV is None else logits_BNV[row, :count].copy()
        ended = sampling.end is not None and bool(tokens[-1] == sampling.end)
        texts.append(Generation(tokens, log_probs_BN[row, :count].copy(), ended, logits))
    return texts
