"""Continues a prompt, or each line of a file, with the model of a run on text.

    python -m seqpe_jax.generate --checkpoint=runs/first --prompt="import " --max-new-tokens=200
    python -m seqpe_jax.generate --checkpoint=runs/first --prompt="" --temperature=0.8 --top-k=40
    python -m seqpe_jax.generate --checkpoint=runs/first --print-prompt < prompt.txt
    python -m seqpe_jax.generate --checkpoint=runs/first --prompts-file=prompts.txt --temperature=0.8 --output=texts.jsonl

Without --prompt and --prompts-file, standard input is the prompt, without its last line break; --prompts-file=- reads a
prompt from each of its lines. An empty prompt begins at the tokenizer's start token (bytes: a line break).
The continuation of a prompt is printed while it grows. The continuations of a file's lines are printed or stored as a JSON
object each: prompt, text, tokens (ids), log_prob (of all of them, nats, at temperature 1), ended (by the end-of-text token).
With a learned table, encoding.scaling or encoding.resize='interpolate', the positions in a window longer than that of
training depend on its length: past the training length these need --window=TOKENS, which no other encoding uses. Neither
--max-new-tokens nor other prompts change a text.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from seqpe_jax.cli import common, config_flags
from seqpe_jax.errors import InputError, encode_utf8
from seqpe_jax.files import as_path, atomic_write

if TYPE_CHECKING:
    import numpy as np

    from seqpe_jax.inference.decode import Generation, Sampling
    from seqpe_jax.model import Model


_CHECKPOINT = common.define_path("checkpoint", "workdir of a run on text, or a folder of a Hugging Face decoder")
_WHICH = common.define_checkpoint_choice()
_WEIGHTS = common.define_weights_choice()
_PROMPT = flags.DEFINE_string("prompt", None, "text to continue (default: standard input)")
_FILE = common.define_path(
    "prompts-file", "UTF-8 file with a prompt on each line, instead of --prompt; - = standard input"
)
_PRINT_PROMPT = flags.DEFINE_bool("print-prompt", False, "print the prompt before its continuation")
_NEW_TOKENS = flags.DEFINE_integer("max-new-tokens", 64, "tokens at most after each prompt", upper_bound=2**24)
_WINDOW = flags.DEFINE_integer(
    "window",
    None,
    "tokens of the window, where positions depend on its length and the text is longer than in training",
    lower_bound=1,
    upper_bound=2**24,
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 = always the most likely token; larger = more varied text")
_TOP_P = flags.DEFINE_float("top-p", 1.0, "sample from the most likely tokens that together reach this probability")
_TOP_K = flags.DEFINE_integer("top-k", 0, "sample from so many of the most likely tokens; 0 = all")
_SEED = flags.DEFINE_integer("seed", 0, "of the sampling, where the temperature is above 0")
_IGNORE_FIELDS = common.define_ignore_fields()
_OUTPUT = common.define_path("output", "file to write, one JSON object per prompt and line", writes="file")
common.define_mesh_flags()
common.define_process_flags()


MAX_PROMPTS_BYTES = 64 << 20
STDIN = "-"  # stands for standard input as a file


def _as_utf8(argument: str) -> str:
    """Returns an argument as UTF-8, also in an ASCII locale; other bytes stay unchanged."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def read_prompts(path: str) -> list[str]:
    """Returns the lines of a file.

    Args:
      path: path of the file; "-" = standard input.

    Raises:
      InputError: the file cannot be read, is too large, is no UTF-8 text, or has no line or an empty one.
    """
    from seqpe_jax.tasks.language_modeling import prompt_text

    lines = prompt_text(_read_bytes(path, f"--prompts-file={path}"), f"--prompts-file={path}").split("\n")
    if "" in lines:
        raise InputError(f"line {lines.index('') + 1} of --prompts-file={path} is empty: every line is a prompt")
    return lines


def read_prompt() -> str:
    """Returns standard input, without its last line break. Raises: InputError: it is empty, too large, or no UTF-8 text."""
    from seqpe_jax.tasks.language_modeling import prompt_text

    content = _read_bytes(STDIN, "standard input")
    if not content:
        raise InputError(
            "there is no prompt: give --prompt=TEXT, --prompts-file=FILE, or a text on standard input (--prompt= begins at "
            "the start token)"
        )
    return prompt_text(content, "standard input")


def _read_bytes(path: str, name: str) -> bytes:
    """Returns the content of a file, or of standard input. Raises: InputError: it cannot be read, or is too large."""
    from seqpe_jax.distributed import processes

    if path == STDIN:
        if processes.is_multiprocess():
            raise InputError("standard input is that of one process: give --prompt=TEXT or --prompts-file=FILE")
        if sys.stdin is None:  # closed
            return b""
        if sys.stdin.isatty():
            print("reading standard input, up to Ctrl-D", file=sys.stderr, flush=True)
    try:
        with sys.stdin.buffer if path == STDIN else as_path(path).open("rb") as file:
            content = file.read(MAX_PROMPTS_BYTES + 1)  # a device such as /dev/zero never ends
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error}): give a UTF-8 text file") from None
    if len(content) > MAX_PROMPTS_BYTES:
        raise InputError(f"{name} has more than {MAX_PROMPTS_BYTES >> 20} MiB: give fewer lines")
    return content


def generate_texts(
    checkpoint: str,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    which: str = "latest",
    weights: str = "",
    window: int | None = None,
    stream: bool = False,
    print_prompt: bool = False,
    mesh: Mapping[str, Any] | None = None,
    ignore_fields: Sequence[str] = (),
    **options: float,
) -> list[dict[str, Any]]:
    """Returns the continuation of each prompt, as an object of `--output`.

    Args:
      checkpoint: path of a workdir of `train`, or of another folder that `loading.load` takes.
      prompts: texts to continue.
      max_new_tokens: tokens at most after each prompt.
      which: checkpoint of the run, "latest" or "best" (`loading.open_model`).
      weights: its parameters or their average, likewise.
      window: tokens of the window, where positions depend on its length (`inference.generate.check_generation`).
      stream: print the continuation of the one prompt while it grows; else a progress line counts the tokens.
      print_prompt: print that prompt before it.
      mesh: fields of the config's mesh section (`loading.open_model`).
      ignore_fields: fields of a Hugging Face folder's config.json that are passed over.
      **options: temperature, top_p, top_k and seed of `inference.decode.Sampling`.

    Raises:
      InputError: not a run on text, no checkpoint or a damaged one, a tokenizer other than that of training, an empty prompt
        where the tokenizer has no start token, values out of range, a prompt that with its new tokens exceeds the encoding's positions, a window that is missing or
        not used.
    """
    from seqpe_jax import loading
    from seqpe_jax.distributed import processes
    from seqpe_jax.inference.decode import Sampling
    from seqpe_jax.inference.generate import check_generation
    from seqpe_jax.run_dir import RunDir

    processes.enable_compilation_cache()
    Sampling(max_new_tokens, **options)  # refuses bad values before a run is opened
    run = RunDir(checkpoint)
    if loading.folder_config(run, ignore_fields).is_image:
        raise InputError(f"{checkpoint} is a run on images, which generates no text: give a run on text")
    model = loading.open_folder(run, which, mesh, ignore_fields, weights)
    tokens = model.task.prompts([encode_utf8(prompt) for prompt in prompts])
    sampling = Sampling(max_new_tokens, end=model.tokenizer.eos_id, **options)
    check_generation(
        model.config, [len(prompt) for prompt in tokens], sampling, window, max_grid=model.model_spec.max_grid
    )
    if print_prompt and processes.is_main_process():
        print(prompts[0], end="", flush=True)
    generations = (_generate_with_stream if stream else _generate_with_progress)(model, tokens, sampling, window)
    return [
        {
            "prompt": prompt,
            "text": model.task.decode_continuation(ids, generation.content),
            "tokens": generation.tokens.tolist(),
            "log_prob": float(generation.log_probs.sum(dtype="float64")),
            "ended": generation.ended,
        }
        for prompt, ids, generation in zip(prompts, tokens, generations, strict=True)
    ]


def _generate_with_stream(
    model: "Model", tokens: "list[np.ndarray]", sampling: "Sampling", window: int | None
) -> "list[Generation]":
    """Generates after one prompt, and prints the text while it grows."""
    from seqpe_jax.distributed import processes

    printed = ""

    def print_rest(generation: "Generation", complete: bool) -> None:
        nonlocal printed
        text = model.task.decode_continuation(tokens[0], generation.content)
        if not complete:
            text = text.rstrip("\ufffd")  # a character whose last bytes are still missing
        if processes.is_main_process() and (complete or text.startswith(printed)):
            print(text[len(printed) :], end="\n" if complete else "", flush=True)
            printed = text

    generations = model.continuations(
        tokens, sampling, window=window, on_update=lambda _, generation: print_rest(generation, complete=False)
    )
    print_rest(generations[0], complete=True)
    return generations


def _generate_with_progress(
    model: "Model", tokens: "list[np.ndarray]", sampling: "Sampling", window: int | None
) -> "list[Generation]":
    """Generates after each prompt, with a progress line that counts tokens."""
    from seqpe_jax.distributed.progress import ProgressLine

    line = ProgressLine(len(tokens) * sampling.new_tokens, label="token")
    generations = model.continuations(
        tokens, sampling, window=window, progress=lambda done, total: line.update(done, total=total)
    )
    line.close()
    return generations


def main() -> None:
    """Generates the texts, and writes or prints them."""
    from seqpe_jax.distributed import processes

    common.start_processes()
    if _FILE.value is not None and (_PROMPT.value is not None or _PRINT_PROMPT.value):
        other = "--print-prompt (each line of the result has its prompt)" if _PROMPT.value is None else "--prompt"
        raise InputError(f"give either --prompts-file or {other}, not both")
    output = as_path(_OUTPUT.value) if _OUTPUT.value else None
    if output and output.is_dir():
        raise InputError(f"--output={output} is a directory: give the name of a file")
    if _FILE.value is not None:
        prompts = read_prompts(_FILE.value)
    else:
        prompts = [read_prompt() if _PROMPT.value is None else _as_utf8(_PROMPT.value)]
    results = generate_texts(
        _CHECKPOINT.value,
        prompts,
        _NEW_TOKENS.value,
        which=_WHICH.value,
        weights=_WEIGHTS.value or "",
        window=_WINDOW.value,
        stream=_FILE.value is None,
        print_prompt=_PRINT_PROMPT.value,
        mesh=config_flags.mesh_overrides(),
        ignore_fields=_IGNORE_FIELDS.value,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        top_k=_TOP_K.value,
        seed=_SEED.value,
    )
    lines = "".join(json.dumps(result) + "\n" for result in results)
    if output and processes.is_main_process():
        atomic_write(output, lines)
        print(f"written: {output}")
    elif _FILE.value is not None and processes.is_main_process():
        print(lines, end="")


def run_command() -> None:
    """Runs the command with the arguments of the process, and exits with its code on an error."""
    flags.mark_flag_as_required("checkpoint")
    common.run(main, reads_checkpoints=True)
