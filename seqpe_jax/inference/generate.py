"""Prompts of any lengths -> what follows each: checks, batches of few shapes, one signal for each shape."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from seqpe_jax.config import Config, check_positions
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.errors import InputError
from seqpe_jax.inference import decode as decoding
from seqpe_jax.inference.compiled import CompiledModel, Progress, no_progress
from seqpe_jax.inference.decode import Generation, Sampling
from seqpe_jax.models.build import Params, Shape


def check_generation(
    config: Config,
    lengths: Sequence[int],
    sampling: Sampling,
    window: int | None = None,
    *,
    cut: bool = False,
    max_grid: Shape | None = None,
) -> int:
    """Returns the length of the window whose position signal prompts of these lengths and their new tokens read.

    Where the signal depends on the length of the window (`EncodingConfig.window_dependence`), it is that of training, or
    `window`, so that neither other prompts nor the number of new tokens change a text; else the least that holds them.

    Args:
      lengths: tokens of the prompts.
      window: tokens; longer than the training length, for an encoding whose signal depends on it.
      cut: a text ends where its window does; else a window that does not hold all new tokens is refused.
      max_grid: of an export (`ModelSpec.max_grid`); else None.

    Raises:
      InputError: not a run on text, no prompt, an empty one, a window that is too small, missing, not read by the encoding
        or beyond its reach.
    """
    if config.is_image:
        raise InputError("a run on images generates no text: give a run on text")
    if not lengths:
        raise InputError("there is no prompt to go on from: give at least one")
    if not all(lengths):
        which = f"prompt {lengths.index(0) + 1} of {len(lengths)}" if len(lengths) > 1 else "the prompt"
        raise InputError(f"{which} is empty: a prompt must hold at least one token")
    field, trained = config.encoding.window_dependence, config.data.length
    if window is not None and not field:
        raise InputError(
            f"--window={window} (Python: window=) is read by encodings whose positions depend on the length of the window ("
            "encoding.kind='learned', encoding.scaling, encoding.resize='interpolate'), not by the encoding.kind="
            f"'{config.encoding.kind}' of this run: leave it out"
        )
    longest = max(lengths)
    needed = longest if cut else longest + sampling.new_tokens
    check_positions(config, max(needed, window or 0), "the length of prompt and new tokens")
    size = f"the longest prompt ({longest} tokens)" + f" and {sampling.new_tokens} new tokens" * (not cut)
    if max_grid is not None and needed > max_grid[0]:
        raise InputError(
            f"{size} are beyond the exported range, up to {max_grid[0]}: ask for less, or export the run again with "
            f"--max-length={needed}"
        )
    if window is not None and window < needed:
        raise InputError(f"a window of {window} does not hold {size}: make it at least {needed}")
    if not field:
        return needed
    if window is None and needed > trained:
        raise InputError(
            f"the training window of {trained} tokens does not hold {size}, and with {field} a text depends on the length "
            f"of a longer window: choose it, --window={needed} or more (Python: window=), or ask for fewer new tokens"
        )
    return max(window or 0, trained)


def generate(
    programs: CompiledModel,
    config: Config,
    params: Params,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    known_V: np.ndarray,
    *,
    window: int | None = None,
    cut: bool = False,
    keep_logits: bool = False,
    progress: Progress = no_progress,
    on_update: Callable[[int, Generation], None] = lambda index, generation: None,
) -> list[Generation]:
    """Returns what follows each prompt: equal to the uncached forward of the same tokens, whatever else is generated.

    Prompts are sorted by length into batches of few shapes, of eval.batch_tokens tokens each; the signal is computed
    once for each shape.

    Args:
      prompts: token ids, each int[n].
      known_V: bool, ids that may be generated.
      window, cut: as in `check_generation`; the text is that of a forward under the signal of the whole window.
      keep_logits: return the logits too.
      progress: called with the new tokens done and those possible at most.
      heard: called now and then with a prompt's index and what has followed it so far.

    Raises:
      InputError: as `check_generation`, or a token that the model does not know.
    """
    network, max_grid = programs.model_spec.network, programs.model_spec.max_grid
    window = check_generation(config, [len(prompt) for prompt in prompts], sampling, window, cut=cut, max_grid=max_grid)
    for prompt in prompts:
        if not 0 <= int(np.min(prompt)) <= int(np.max(prompt)) < network.vocabulary:
            raise InputError(f"a prompt has tokens outside of the vocabulary (0 .. {network.vocabulary - 1})")
    static = decoding.SamplingStatic(
        sampling.new_tokens,
        sampling.temperature == 0,
        sampling.top_p == 1,
        keep_logits=keep_logits,
        limit=window if config.encoding.window_dependence else None,
    )
    compiled = decoding.decode_functions(network, static, layout.MeshSharding(programs.mesh))
    work = decoding.batches(
        [len(prompt) for prompt in prompts],
        new_tokens=sampling.new_tokens,
        window=window,
        batch_tokens=config.eval.batch_tokens,
        multiple=layout.batch_shards(programs.mesh),
    )
    found: dict[int, Generation] = {}
    places, signal, done, total = 0, None, 0, len(prompts) * sampling.new_tokens
    put = functools.partial(layout.from_full_batch, programs.mesh)
    for batch in work:
        if batch.places != places:
            places = batch.places
            signal = programs.signal(params, (window,), places + sampling.new_tokens)
        for results in decoding.decode(compiled, params["model"], signal, batch, prompts, sampling, known_V, put=put):
            for index, result in zip(batch.indices, results, strict=True):
                on_update(index, result)
            done = len(found) * sampling.new_tokens + sum(len(result.tokens) for result in results)
            progress(done, total)
        found |= zip(batch.indices, results, strict=True)
    if done < total:
        progress(total, total)
    return [found[index] for index in range(len(prompts))]
