"""A model of this package for `lm-evaluation-harness`: `lm_eval`'s model "seqpe_jax" (`python -m seqpe_jax.lm_eval`).

Its model_args:

    checkpoint     a workdir of `train`, an export, or a folder of a Hugging Face decoder (`seqpe_jax.load`)
    which          checkpoint of a run: latest (default) or best
    max_length     tokens that the model reads at most (default: the longest that its config trains on or evaluates)
    add_bos_token  begin every text with the start token (default: as the tokenizer of a Hugging Face folder does; a run: False)
    fsdp, tensor, context   devices that the parameters are split over (config.mesh)
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from seqpe_jax import loading
from seqpe_jax.config import check_positions
from seqpe_jax.distributed import processes, sharding
from seqpe_jax.distributed.progress import ProgressLine
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.errors import InputError, encode_utf8
from seqpe_jax.inference.decode import Sampling
from seqpe_jax.losses.task import NetworkCall
from seqpe_jax.models.build import Shape

NAME = "seqpe_jax"
DEFAULT_NEW_TOKENS = 256  # that a task which names no number generates, as with lm_eval's other models
MIN_LENGTH = 32  # of a padded batch; longer ones are padded to the next power of two
MAX_LOGITS = 1 << 27  # of a batch, in float32 half a gigabyte

Scored = tuple[tuple[str, str], list[int], list[int]]  # texts; token ids of the context; of the continuation
Score = tuple[float, bool]  # log probability of the continuation in nats; whether greedy decoding writes it


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Log probability of each token, and whether it is the likeliest; for `CompiledModel.eval_step`."""

    def eval_step(
        self, network: nn.Module, variables: Any, signal: PositionSignal, batch: dict[str, Any]
    ) -> dict[str, jax.Array]:
        """Returns {"log_prob": float32[B, L] in nats, "greedy": bool[B, L]} of the targets of tokens int32[B, L + 1]."""
        call, targets_BL = NetworkCall(network, variables, signal), batch["tokens"][:, 1:]
        logits_BLV = call.logits(call.hidden(batch["tokens"][:, :-1])).astype(jnp.float32)
        target_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
        return {
            "log_prob": target_BL - jax.nn.logsumexp(logits_BLV, axis=-1),
            "greedy": logits_BLV.argmax(axis=-1) == targets_BL,
        }


class SeqPEModel(TemplateLM):
    """A decoder for `lm_eval`: log likelihoods of continuations and of whole texts, and generation up to a text.

    Args:
      checkpoint: see the module's docstring, as the other model_args.
      which: see there.
      max_length: see there.
      add_bos_token: see there.
      batch_size: rows of a batch at most, or "auto", which takes eval.batch_tokens of the model's config.
      max_batch_size: unused, given by `lm_eval`.
      device: unused, given by `lm_eval`; JAX's devices are used.
      fsdp: see there.
      tensor: see there.
      context: see there.

    Raises:
      InputError: as `loading.load`; a model of images; a length beyond the positions; a tokenizer without a start token.
    """

    def __init__(
        self,
        checkpoint: str,
        which: str = "latest",
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        fsdp: int | None = None,
        tensor: int | None = None,
        context: int | None = None,
    ):
        super().__init__()
        del max_batch_size, device
        processes.enable_compilation_cache()
        mesh = {name: int(value) for name, value in (("fsdp", fsdp), ("tensor", tensor), ("context", context)) if value}
        if loading.folder_config(checkpoint).is_image:
            raise InputError(f"{checkpoint} is a model of images, which lm_eval does not evaluate: give one of text")
        self._model = loading.load(checkpoint, which, mesh)
        self._tokens = self._model.tokenizer
        if self._tokens.start_id is None:
            raise InputError(
                f"tokenizer '{self._tokens.name}' has no token that texts begin with: name bos_token or eos_token in its "
                "tokenizer_config.json"
            )
        settings = self._model.config
        self._max_length = int(max_length or max(settings.data.length, *(length for (length,) in settings.eval_sizes)))
        check_positions(settings, self._max_length, "max_length")
        begins = self._tokens.adds_start and not self._model.folder  # runs are trained without
        self._begins = begins if add_bos_token is None else str(add_bos_token).lower() in ("true", "1")
        rows = str(batch_size or "auto").partition(":")[0]
        self._max_rows = None if rows == "auto" else int(rows)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; the start token where the tokenizer has none."""
        return self._tokens.start_id if self._tokens.eos_id is None else self._tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without context is scored after."""
        return self._tokens.start_id

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self._max_length

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the caches of requests."""
        return self._tokens.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the token ids of a text.

        Args:
          string: the text.
          add_special_tokens: begin with the start token; None = as `add_bos_token` says.
        """
        begins = self._begins if add_special_tokens is None else add_special_tokens and self._begins
        start = [self._tokens.start_id] if begins else []
        return start + self._tokens.encode(encode_utf8(string)).tolist()

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log probability of each text in nats, in windows that predict each token once."""
        texts = [request.args[0] for request in requests]
        windows: list[Scored] = []
        owners: list[int] = []
        for number, text in enumerate(texts):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append((("", text), context, continuation))
                owners.append(number)
        totals = [0.0] * len(texts)
        for owner, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows, partial=False), strict=True):
            totals[owner] += log_prob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the text after each context, up to the first of its stop texts."""
        arguments = [normalize_gen_kwargs(request.args[1], DEFAULT_NEW_TOKENS) for request in requests]
        groups: dict[Sampling, list[int]] = {}
        for number, options in enumerate(arguments):
            groups.setdefault(self._sampling(options), []).append(number)
        texts = [""] * len(requests)
        for sampling, numbers in groups.items():
            prompts = [self._prompt(requests[number].args[0], sampling.new_tokens) for number in numbers]
            line = ProgressLine(len(prompts) * sampling.new_tokens, label="token")
            found = self._model.continuations(
                prompts, sampling, window=self._window(), progress=functools.partial(_show, line)
            )
            line.close()
            for number, prompt, one in zip(numbers, prompts, found, strict=True):
                text = self._model.task.decode_continuation(prompt, one.content)
                texts[number] = _until(text, arguments[number].get("until") or ())
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
        return texts

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        """Returns the rule that tokens are chosen by. Raises: InputError: options that are not read here."""
        known = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "seed"}
        if unknown := sorted(options.keys() - known):
            raise InputError(
                f"generation_kwargs has {', '.join(unknown)}, and only {', '.join(sorted(known))} are read here"
            )
        draws = bool(options.get("do_sample"))
        return Sampling(
            options["max_gen_toks"],
            temperature=float(options.get("temperature") or 1.0) if draws else 0.0,
            top_p=float(options.get("top_p", 1.0)) if draws else 1.0,
            seed=int(options.get("seed", 0)),
            end=self._tokens.eos_id,
            top_k=int(options.get("top_k", 0)) if draws else 0,
        )

    def _prompt(self, context: str, new_tokens: int) -> np.ndarray:
        """Returns the tokens of a context, the last ones that leave room for the new tokens."""
        room = self.max_length - new_tokens
        if room < 1:
            raise InputError(
                f"{new_tokens} new tokens leave no room for a context in max_length={self.max_length}: set a larger "
                "max_length in model_args, or max_gen_toks in the task's generation_kwargs"
            )
        return np.array((self.tok_encode(context) or [self.prefix_token_id])[-room:], np.int32)

    def _window(self) -> int | None:
        """Returns the tokens of the window where the positions depend on them; else None."""
        return self.max_length if self._model.config.encoding.window_dependence else None

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, partial: bool = True, **_: Any
    ) -> list[Score]:
        """Returns the log probability of each continuation, and whether it is the greedy one.

        Args:
          requests: (texts, tokens of the context, tokens of the continuation).
          disable_tqdm: unused.
          partial: the results are those of whole requests, which `lm_eval` may cache.
        """
        order = sorted(range(len(requests)), key=lambda number: len(requests[number][1]) + len(requests[number][2]))
        scores: list[Score] = [(0.0, False)] * len(requests)
        line, done = ProgressLine(len(requests), label="request"), 0
        while done < len(order):
            length = self._padded(requests[order[done]])
            count = 0
            while done + count < len(order) and self._padded(requests[order[done + count]]) == length:
                count += 1
            count = min(count, self._rows(length))
            chosen = order[done : done + count]
            for number, score in zip(chosen, self._scores([requests[one] for one in chosen], length), strict=True):
                scores[number] = score
                if partial:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], score)
            done += count
            line.update(done)
        line.close()
        return scores

    def _padded(self, request: Scored) -> int:
        """Returns the tokens that a request is padded to: few different numbers, at most max_length."""
        inputs = min(len(request[1]) + len(request[2]) - 1, self.max_length)
        return min(max(MIN_LENGTH, 1 << (inputs - 1).bit_length()), self.max_length)

    def _rows(self, length: int) -> int:
        """Returns the rows of a batch."""
        vocabulary = self._model.data_spec.vocabulary
        rows = max(1, min(self._model.config.eval.batch_tokens, MAX_LOGITS // vocabulary) // length)
        shards = sharding.batch_shards(self._model.mesh)
        return math.ceil(min(rows, self._max_rows or rows) / shards) * shards

    def _scores(self, requests: Sequence[Scored], length: int) -> list[Score]:
        """Returns the scores of a batch of requests, padded to one length."""
        model, rows = self._model, self._rows(length)
        tokens_BL = np.full((rows, length + 1), self.prefix_token_id, np.int32)
        spans = []
        for row, (_, context, continuation) in enumerate(requests):
            if not continuation:
                raise InputError("a continuation without a token cannot be scored: change the task's choices")
            ids = [*context, *continuation][-(length + 1) :]
            if len(continuation) >= len(ids):
                raise InputError(
                    f"a continuation of {len(continuation)} tokens does not fit max_length={self.max_length}: set a larger "
                    "max_length in model_args"
                )
            tokens_BL[row, : len(ids)] = ids
            spans.append(slice(len(ids) - 1 - len(continuation), len(ids) - 1))
        window: Shape = (self._window() or length,)
        signal = model.compiled.signal(model.params, window, length)
        batch = sharding.from_full_batch(model.mesh, {"tokens": tokens_BL})
        found = model.compiled.eval_step(TokenScores())(model.params, signal, batch)
        log_prob_BL, greedy_BL = np.asarray(found["log_prob"], np.float64), np.asarray(found["greedy"])
        return [
            (float(log_prob_BL[row, span].sum()), bool(greedy_BL[row, span].all())) for row, span in enumerate(spans)
        ]


def _show(line: ProgressLine, done: int, total: int) -> None:
    line.update(done, total=total)


def _until(text: str, stops: Sequence[str]) -> str:
    """Returns a text up to the first of some stop texts."""
    for stop in stops:
        if stop:
            text = text.partition(stop)[0]
    return text
