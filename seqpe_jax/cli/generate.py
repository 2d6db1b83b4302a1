"""Goes on from a prompt, or from each line of a file, with the model of a run on text.

    python -m seqpe_jax.generate --checkpoint=runs/first --prompt="import " --max-new-tokens=200
    python -m seqpe_jax.generate --checkpoint=runs/first --prompts-file=prompts.txt --temperature=0.8 --output=texts.jsonl

What follows the prompt is printed as it comes. What follows the lines of a file is printed or stored as a JSON object
each: prompt, text, tokens (ids), log_prob (of all of them, nats, at temperature 1), ended (by the tokenizer's end of text).
A learned table, encoding.scaling and encoding.resize='interpolate' read other positions in each window longer than that of
training, so that a text depends on its length: past the training length they need --window=TOKENS, which no other encoding
reads. Neither --max-new-tokens nor other prompts change a text.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from seqpe_jax.cli import common
from seqpe_jax.errors import InputError, encode_utf8
from seqpe_jax.files import as_path, atomic_write

if TYPE_CHECKING:
    from seqpe_jax.inference.decode import Generation


def run(
    checkpoint: str,
    prompts: Sequence[str],
    new_tokens: int,
    *,
    which: str = "latest",
    window: int | None = None,
    stream: bool = False,
    **choice: float,
) -> list[dict[str, Any]]:
    """Returns what a checkpoint of a run says after each prompt, in the form that `--output` stores.

    Args:
      checkpoint: a workdir of `train`; which: of its checkpoints, "latest" or "best" (`loading.open_model`).
      new_tokens: at most, for each prompt; choice: temperature, top_p and seed of `inference.decoding.Sampling`.
      window: length of the window, in tokens, where positions depend on it (`inference.generate.check_generation`).
      stream: print the text of the one prompt as it comes; else a line of progress tells the tokens done.

    Raises:
      InputError: not a run on text, no or a damaged checkpoint, another tokenizer than the model was trained with, an
        empty prompt, values out of range, a prompt that with its new tokens is beyond the encoding's reach, a window that
        is needed or not read.
    """
    from seqpe_jax import loading
    from seqpe_jax.distributed import processes
    from seqpe_jax.distributed.progress import ProgressLine
    from seqpe_jax.inference.decode import Sampling
    from seqpe_jax.inference.generate import check_generation

    processes.keep_compiled_programs()
    Sampling(new_tokens, **choice)  # refuses bad values before a run is opened
    if loading.load_run_config(checkpoint).is_image:
        raise InputError(f"{checkpoint} is a run on images, which generates no text: give a run on text")
    model = loading.open_model(checkpoint, which)
    printed = ""
    tokens = model.task.prompts([encode_utf8(prompt) for prompt in prompts])
    sampling = Sampling(new_tokens, end=model.tokenizer.eos_id, **choice)
    check_generation(
        model.config, [len(prompt) for prompt in tokens], sampling, window, max_grid=model.model_spec.max_grid
    )

    def say(index: int, generation: "Generation") -> None:
        """Prints what is new; a character may lack its last bytes, so those are waited for."""
        nonlocal printed
        text = model.task.decode_continuation(tokens[index], generation.content).rstrip("\ufffd")
        if processes.is_main_process() and text.startswith(printed):
            print(text[len(printed) :], end="", flush=True)
            printed = text

    if stream:
        found = model.continuations(tokens, sampling, window=window, on_update=say)
        if processes.is_main_process():
            print(model.task.decode_continuation(tokens[0], found[0].content)[len(printed) :], flush=True)
    else:
        line = ProgressLine(len(prompts) * new_tokens, label="token")
        found = model.continuations(
            tokens, sampling, window=window, progress=lambda done, total: line.update(done, total=total)
        )
        line.close()
    return [
        {
            "prompt": prompt,
            "text": model.task.decode_continuation(ids, generation.content),
            "tokens": generation.tokens.tolist(),
            "log_prob": float(generation.log_probs.sum(dtype="float64")),
            "ended": generation.ended,
        }
        for prompt, ids, generation in zip(prompts, tokens, found, strict=True)
    ]


_CHECKPOINT = common.define_path("checkpoint", "workdir of a run on text")
_WHICH = common.define_checkpoint_choice()
_PROMPT = flags.DEFINE_string("prompt", None, "text to go on from")
_FILE = common.define_path("prompts-file", "UTF-8 file with a prompt on each line, instead of --prompt")
_NEW_TOKENS = flags.DEFINE_integer("max-new-tokens", 64, "tokens at most after each prompt", upper_bound=2**24)
_WINDOW = flags.DEFINE_integer(
    "window",
    None,
    "tokens of the window, where positions depend on its length and the text is longer than in training",
    lower_bound=1,
    upper_bound=2**24,
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 = always the likeliest token; larger = more varied text")
_TOP_P = flags.DEFINE_float("top-p", 1.0, "draw from the likeliest tokens that together reach this probability")
_SEED = flags.DEFINE_integer("seed", 0, "of the draws, where the temperature is above 0")
_OUTPUT = common.define_path("output", "file to write, one JSON object per prompt and line", writes="file")
common.define_process_flags()


PROMPT_BYTES = 64 << 20


def _text(argument: str) -> str:
    """Returns an argument as UTF-8, also where the locale knows ASCII alone; other bytes stay as they are."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def read_prompts(path: str) -> list[str]:
    """Returns the lines of a file. Raises: InputError: it cannot be read, is too large or no UTF-8 text, or holds none."""
    from seqpe_jax.tasks.language_modeling import prompt_lines

    try:
        with as_path(path).open("rb") as file:
            content = file.read(PROMPT_BYTES + 1)  # a device may have no end
        if len(content) > PROMPT_BYTES:
            raise InputError(f"--prompts-file={path} has more than {PROMPT_BYTES >> 20} MiB: give fewer lines")
        lines = prompt_lines(content, f"--prompts-file={path}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts-file={path} cannot be read ({error}): give a UTF-8 text file") from None
    if "" in lines:
        raise InputError(f"line {lines.index('') + 1} of --prompts-file={path} is empty: every line is a prompt")
    return lines


def main() -> None:
    """The command."""
    from seqpe_jax.distributed import processes

    common.start_processes()
    if (_PROMPT.value is None) == (_FILE.value is None):
        raise InputError("give either --prompt=TEXT or --prompts-file=FILE")
    output = as_path(_OUTPUT.value) if _OUTPUT.value else None
    if output and output.is_dir():
        raise InputError(f"--output={output} is a directory: give the name of a file")
    results = run(
        _CHECKPOINT.value,
        [_text(_PROMPT.value)] if _FILE.value is None else read_prompts(_FILE.value),
        _NEW_TOKENS.value,
        which=_WHICH.value,
        window=_WINDOW.value,
        stream=_FILE.value is None,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
    )
    lines = "".join(json.dumps(result) + "\n" for result in results)
    if output and processes.is_main_process():
        atomic_write(output, lines)
        print(f"written: {output}")
    elif _FILE.value is not None and processes.is_main_process():
        print(lines, end="")


def run_command() -> None:
    """Runs the command with the arguments of the process; never returns where it fails."""
    flags.mark_flag_as_required("checkpoint")
    common.run(main)
