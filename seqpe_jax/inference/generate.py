"""Text generation for prompts of any lengths: checks, batches of few shapes, one position signal per shape."""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from seqpe_jax.config import Config, check_positions
from seqpe_jax.distributed import sharding
from seqpe_jax.distributed.hardware import find_chip
from seqpe_jax.errors import InputError
from seqpe_jax.inference import decode
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
    """Returns the tokens of the window whose position signal these prompts and their texts use.

    Where the signal depends on the length of the window (`window_dependence` of the encoding), it is the training length or
    `window`, so that neither other prompts nor the number of new tokens change a text; else the smallest that holds them.

    Args:
      config: config of the run.
      lengths: tokens of the prompts.
      sampling: settings.
      window: tokens; more than the training length, for an encoding whose signal depends on it.
      cut: end texts at the end of the window; else a window that does not hold all new tokens is an error.
      max_grid: positions that an export serves (`ModelSpec.max_grid`); else None.

    Raises:
      InputError: not a run on text, no prompt, an empty one, a window that is too small, missing, unused by the encoding or
        beyond its positions.
    """
    _check_prompts(config, lengths)
    dependence, trained = config.encoding.window_dependence, config.encoding.one_signal_until(config.grid[0])
    if window is not None and not dependence:
        raise InputError(
            f"--window={window} (Python: window=) is read by encodings whose positions depend on the length of the window ("
            "encoding.kind='learned', encoding.scaling, encoding.resize='interpolate'), not by the encoding.kind="
            f"'{config.encoding.kind}' of this run: leave it out"
        )
    longest = max(lengths)
    needed = longest if cut else longest + sampling.new_tokens
    check_positions(config, max(needed, window or 0), "the length of prompt and new tokens")
    size = f"the longest prompt ({longest} tokens)" + f" and {sampling.new_tokens} new tokens" * (not cut)
    trained = min(trained, max_grid[0]) if max_grid else trained
    if max_grid is not None and needed > max_grid[0]:
        raise InputError(
            f"{size} are beyond the exported range, up to {max_grid[0]}: ask for less, or export the run again with "
            f"--max-length={needed}"
        )
    if window is not None and window < needed:
        raise InputError(f"a window of {window} does not hold {size}: make it at least {needed}")
    if not dependence:
        return needed
    if window is None and needed > trained:
        raise InputError(
            f"a window of {trained} tokens does not hold {size}, and with {dependence} a text depends on the length "
            f"of a longer window: choose it, --window={needed} or more (Python: window=), or ask for fewer new tokens"
        )
    return max(window or 0, trained)


def _check_prompts(config: Config, lengths: Sequence[int]) -> None:
    """Raises: InputError: not a run on text, no prompt, or an empty one."""
    if config.is_image:
        raise InputError("a run on images generates no text: give a run on text")
    if not config.is_causal:
        raise InputError(
            "data.form='encoder' reads outputs at blanks, and generates no text: give a run of data.form='decoder'"
        )
    if not lengths:
        raise InputError("there is no prompt to continue: give at least one")
    if not all(lengths):
        which = f"prompt {lengths.index(0) + 1} of {len(lengths)}" if len(lengths) > 1 else "the prompt"
        raise InputError(f"{which} is empty: a prompt must hold at least one token")


def _fit_gathered(mesh: jax.sharding.Mesh, params: Params) -> bool:
    """Returns whether parameters, gathered over fsdp, take at most half of a device's memory, as far as that is known."""
    chip = find_chip(mesh.devices.flat[0].device_kind)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)) / mesh.shape["tensor"]
    return chip is None or size <= chip.memory / 2


def generate(
    compiled: CompiledModel,
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
    """Returns the text after each prompt; it equals the uncached forward of the same tokens, whatever else is generated.

    Prompts are sorted by length into batches of few shapes, of about eval.batch_tokens tokens each; the signal is computed
    once per shape.

    Args:
      compiled: the model's compiled functions.
      config: config of the run.
      params: {"encoding": ..., "model": ...}.
      prompts: token ids, int[n] each.
      sampling: settings.
      known_V: bool, ids that may be generated.
      window, cut: see `check_generation`; texts are those of a forward under the signal of the whole window.
      keep_logits: return the logits too.
      progress: called with the new tokens done and their maximum.
      on_update: called with a prompt's index and its text so far.

    Raises:
      InputError: see `check_generation`; or a token outside the vocabulary.
    """
    network, max_grid = compiled.model_spec.network, compiled.model_spec.max_grid
    lengths = [len(prompt) for prompt in prompts]
    window = check_generation(config, lengths, sampling, window, cut=cut, max_grid=max_grid)
    for prompt in prompts:
        if not 0 <= int(np.min(prompt)) <= int(np.max(prompt)) < network.vocabulary:
            raise InputError(f"a prompt has tokens outside of the vocabulary (0 .. {network.vocabulary - 1})")
    static = sampling.static(window if config.encoding.window_dependence else None, keep_logits)
    functions = decode.decode_functions(
        network, static, sharding.MeshSharding(compiled.mesh), gather_once=_fit_gathered(compiled.mesh, params["model"])
    )
    batches = decode.batch_prompts(
        lengths,
        new_tokens=sampling.new_tokens,
        window=window,
        batch_tokens=config.eval.batch_tokens,
        multiple=sharding.batch_shards(compiled.mesh),
    )
    to_devices = functools.partial(sharding.from_full_batch, compiled.mesh)
    generations: dict[int, Generation] = {}
    length, signal, done, total = 0, None, 0, len(prompts) * sampling.new_tokens
    for batch in batches:
        if batch.length != length:
            length = batch.length
            signal = compiled.signal(params, (window,), length + sampling.new_tokens)
        for texts in decode.decode(
            functions, params["model"], signal, batch, prompts, sampling, known_V, to_devices=to_devices
        ):
            for index, text in zip(batch.indices, texts, strict=True):
                on_update(index, text)
            done = len(generations) * sampling.new_tokens + sum(len(text.tokens) for text in texts)
            progress(done, total)
        generations |= zip(batch.indices, texts, strict=True)
    if done < total:
        progress(total, total)
    return [generations[index] for index in range(len(prompts))]
