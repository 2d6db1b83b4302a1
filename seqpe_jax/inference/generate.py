"""Prompts of any lengths -> what follows each: checks, batches of few shapes, one signal for each shape."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from seqpe_jax.architecture import Params
from seqpe_jax.config import Config, check_positions
from seqpe_jax.errors import InputError
from seqpe_jax.inference import decoding
from seqpe_jax.inference.decoding import Generation, Sampling
from seqpe_jax.inference.programs import Programs, Progress, silent
from seqpe_jax.runtime import mesh as layout


def check_generation(config: Config, lengths: Sequence[int], sampling: Sampling, window: int | None = None) -> int:
    """Returns the window that prompts of these lengths and their new tokens stand in: `window`, or the least.

    Raises:
      InputError: not a run on text, no prompt, an empty one, or a window too small or beyond the encoding's reach.
    """
    if config.reads_images:
        raise InputError("a run on images generates no text: give a run on text")
    if not lengths:
        raise InputError("there is no prompt to go on from: give at least one")
    if not all(lengths):
        which = f"prompt {lengths.index(0) + 1} of {len(lengths)}" if len(lengths) > 1 else "the prompt"
        raise InputError(f"{which} is empty: a prompt must hold at least one token")
    needed = max(lengths) + sampling.new_tokens
    check_positions(config, max(needed, window or 0), "the length of prompt and new tokens")
    if window and window < needed:
        raise InputError(
            f"a window of {window} does not hold the longest prompt ({max(lengths)} tokens) and {sampling.new_tokens} "
            f"new tokens: make it at least {needed}"
        )
    return window or needed


def generate(
    programs: Programs,
    config: Config,
    params: Params,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    known_V: np.ndarray,
    *,
    window: int | None = None,
    keep_logits: bool = False,
    progress: Progress = silent,
    heard: Callable[[int, Generation], None] = lambda index, generation: None,
) -> list[Generation]:
    """Returns what follows each prompt: equal to the uncached forward of the same tokens, whatever else is generated.

    Prompts are sorted by length into batches of few shapes, of eval.batch_tokens tokens each; the signal is computed
    once for each shape.

    Args:
      prompts: token ids, each int[n].
      known_V: bool, ids that may be generated.
      window: positions of which the signal is computed; None = the longest prompt and its new tokens. It matters to
        a learned table and under encoding.resize='stretch' alone, which a longer window than that of training
        stretches to its length: the text is that of a forward under the signal of the whole window.
      keep_logits: return the logits too.
      progress: called with the new tokens done and those possible at most.
      heard: called now and then with a prompt's index and what has followed it so far.

    Raises:
      InputError: as `check_generation`, or a token that the model does not know.
    """
    window = check_generation(config, [len(prompt) for prompt in prompts], sampling, window)
    network = programs.architecture.network
    for prompt in prompts:
        if not 0 <= int(np.min(prompt)) <= int(np.max(prompt)) < network.vocabulary:
            raise InputError(f"a prompt has tokens outside of the vocabulary (0 .. {network.vocabulary - 1})")
    static = decoding.Static(sampling.new_tokens, sampling.temperature == 0, sampling.top_p == 1, keep_logits=keep_logits)
    compiled = decoding.halves(network, static, layout.Layout(programs.mesh))
    work = decoding.batches(
        [len(prompt) for prompt in prompts], new_tokens=sampling.new_tokens, window=window,
        batch_tokens=config.eval.batch_tokens, multiple=layout.batch_shards(programs.mesh),
    )  # fmt: skip
    found: dict[int, Generation] = {}
    places, signal, done, total = 0, None, 0, len(prompts) * sampling.new_tokens
    put = functools.partial(layout.whole_to_global, programs.mesh)
    for batch in work:
        if batch.places != places:
            places = batch.places
            signal = programs.signal(params, (window,), places + sampling.new_tokens)
        for results in decoding.decode(compiled, params["model"], signal, batch, prompts, sampling, known_V, put=put):
            for index, result in zip(batch.indices, results, strict=True):
                heard(index, result)
            done = len(found) * sampling.new_tokens + sum(len(result.tokens) for result in results)
            progress(done, total)
        found |= zip(batch.indices, results, strict=True)
    if done < total:
        progress(total, total)
    return [found[index] for index in range(len(prompts))]
