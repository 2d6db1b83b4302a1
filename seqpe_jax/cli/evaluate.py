"""Evaluates a checkpoint at any lengths or image sizes, also beyond those of training.

python -m seqpe_jax.evaluate --checkpoint=runs/first --lengths=64,128,256,512,1024 --output=runs/first/evaluation.json
python -m seqpe_jax.evaluate --checkpoint=runs/first --contexts=64,256,1024 --output=runs/first/evaluation.json
python -m seqpe_jax.evaluate --checkpoint=runs/digits --sizes=8,12,16,24x32 --output=runs/digits/evaluation.json
python -m seqpe_jax.evaluate --checkpoint=downloads/SmolLM2-135M --data=text_files --paths=notes.txt --lengths=512,2048
python -m seqpe_jax.evaluate --checkpoint=runs/digits --sizes=8 --predictions=predictions.jsonl
python -m seqpe_jax.evaluate --checkpoint=runs/large --config.mesh.fsdp=8 --output=runs/large/evaluation.json
python -m seqpe_jax.evaluate --checkpoint=downloads/SmolLM2-135M --suite=passkey,ruler --lengths=512,2048 --output=probes.json
"""

import contextlib
import typing

from absl import flags

from seqpe_jax.cli import common, config_flags
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path
from seqpe_jax.run_dir import EVALUATION_FILE, RunDir

if typing.TYPE_CHECKING:
    from seqpe_jax.tasks.suites import SuiteRequest

_CHECKPOINT = common.define_path(
    "checkpoint", "workdir of a run, an export, or a folder of Hugging Face or the PyTorch reference"
)
_WHICH = common.define_checkpoint_choice()
_WEIGHTS = common.define_weights_choice()
_LENGTHS = flags.DEFINE_list("lengths", [], "window lengths, e.g. 512,1024 (default: eval.lengths of the run's config)")
_CONTEXTS = flags.DEFINE_list(
    "contexts", [], "score the same tokens with so many tokens of context, e.g. 64,1024 (default: eval.contexts)"
)
_SIZES = flags.DEFINE_list(
    "sizes", [], "image sizes, e.g. 224,384x512, of videos also 16x32x32 (default: those of the run's config)"
)
_SPLIT = flags.DEFINE_enum("split", "test", ["validation", "test"], "which split to read")
_DATA = flags.DEFINE_string("data", None, "read that data set instead of the run's, e.g. text (a data.name)")
_PATHS = flags.DEFINE_list("paths", [], "with --data: its data.paths")
_TOKENS = flags.DEFINE_integer("tokens", None, "score at most that many tokens per length (default: eval.tokens)")
_TARGETS = flags.DEFINE_integer(
    "targets", None, "with contexts: score at most that many tokens (default: eval.targets)"
)
_STRIDE = flags.DEFINE_integer(
    "stride", None, "with contexts: tokens that each window scores, its last ones (default: half the smallest context)"
)
_EXAMPLES = flags.DEFINE_integer(
    "examples", None, "ask at most that many questions per length (default: eval.examples)"
)
_NEW_TOKENS = flags.DEFINE_integer("new-tokens", None, "tokens of an answer at most (default: eval.new_tokens)")
_LOSSY = flags.DEFINE_bool("lossy-tokenizer", False, "accept text that does not come back from the tokenizer's tokens")
_BIT_DEPTH = flags.DEFINE_integer(
    "bit-depth", None, "of grey values in an image folder's files of 16 bits (default: data.bit_depth)", 1, 16
)
_TEXT_KEY = flags.DEFINE_string("text-key", None, "field of a record that holds its text (default: data.text_key)")
_SUITE = flags.DEFINE_list(
    "suite",
    [],
    "ask probes of long contexts instead: passkey, ruler, mqar, induction (with --paths, ruler asks on SQuAD too)",
)
_DEPTHS = flags.DEFINE_list("depths", [], "with --suite: where in the text it is, 0 to 1 (default: 0,0.25,0.5,0.75,1)")
_SUITE_SEED = flags.DEFINE_integer("suite-seed", 0, "with --suite: seed of the prompts", 0, 2**63 - 1)
_EFFECTIVE_SCORE = flags.DEFINE_float(
    "effective-score", 85.6, "with --suite: percent of an effective length (RULER's by default)", 0.0, 100.0
)
_INSTRUCTIONS = flags.DEFINE_bool("instructions", True, "with --suite: prompts begin with what they are about")
_IGNORE_FIELDS = common.define_ignore_fields()
_OUTPUT = common.define_path(
    "output",
    "JSON file to write; arrays and answers go into the same folder",
    writes="file",
    allowed=(EVALUATION_FILE,),
)
_PREDICTIONS = common.define_path(
    "predictions",
    "JSON lines to write, one for each example: losses by token, answers, or the likeliest classes (docs/training.md)",
    writes="file",
)
common.define_mesh_flags()
common.define_process_flags()


SUITE_FLAGS = {"depths": _DEPTHS, "suite-seed": _SUITE_SEED, "effective-score": _EFFECTIVE_SCORE}
SUITE_FLAGS |= {"instructions": _INSTRUCTIONS}
OTHER_FLAGS = {"data": _DATA, "contexts": _CONTEXTS, "sizes": _SIZES, "tokens": _TOKENS, "targets": _TARGETS}
OTHER_FLAGS |= {"stride": _STRIDE, "bit-depth": _BIT_DEPTH, "text-key": _TEXT_KEY}


def _refuse_suite_flags() -> None:
    """Refuses flags of probes without --suite. Raises: InputError."""
    for name, flag in SUITE_FLAGS.items():
        if flag.value != flag.default:
            raise InputError(f"--{name} is for --suite: give both, e.g. --suite=passkey")


def _suite_request(lengths: tuple[tuple[int, ...], ...]) -> "SuiteRequest":
    """Returns the probes that the flags ask for. Raises: InputError: a flag does not fit."""
    from seqpe_jax.tasks.suites import EXAMPLES, SuiteRequest

    for name, flag in OTHER_FLAGS.items():
        if flag.value != flag.default:
            raise InputError(f"--{name} is not read with --suite, which asks questions of its own: leave it out")
    if not lengths:
        raise InputError("--suite needs --lengths, the tokens of its prompts, e.g. --lengths=512,1024,2048")
    try:
        depths = tuple(map(float, _DEPTHS.value))
    except ValueError:
        raise InputError(
            f"--depths must be numbers from 0 to 1 separated by commas, got {','.join(_DEPTHS.value)}"
        ) from None
    return SuiteRequest(
        tuple(dict.fromkeys(_SUITE.value)),
        tuple(sorted({length for (length,) in lengths})),
        examples=EXAMPLES if _EXAMPLES.value is None else _EXAMPLES.value,
        depths=depths,
        seed=_SUITE_SEED.value,
        effective_score=_EFFECTIVE_SCORE.value,
        new_tokens=_NEW_TOKENS.value,
        paths=tuple(_PATHS.value),
        instructions=_INSTRUCTIONS.value,
    )


def main() -> None:
    """Evaluates the checkpoint, and writes the results."""
    from seqpe_jax import loading
    from seqpe_jax.distributed import processes
    from seqpe_jax.tasks.evaluate import EvalRequest, check_request, evaluate, write
    from seqpe_jax.tasks.predictions import check_predictions_path, predictions_file

    common.start_processes()
    lengths = common.parse_sizes(_LENGTHS.value, "--lengths", f"0*{common.NUMBER}", "positive whole numbers")
    contexts = tuple(
        c for (c,) in common.parse_sizes(_CONTEXTS.value, "--contexts", f"0*{common.NUMBER}", "positive whole numbers")
    )
    wanted = "sides in pixels, 224 or 384x512, or 16x32x32 for 16 frames of a video,"
    sizes = common.parse_sizes(_SIZES.value, "--sizes", f"0*{common.NUMBER}(x0*{common.NUMBER}){{0,2}}", wanted)
    sizes = tuple(size * 2 if len(size) == 1 else size for size in sizes)
    if _PATHS.value and not (_DATA.value or _SUITE.value):
        raise InputError("--paths is the path of --data: give both, e.g. --data=text --paths=notes.txt")
    processes.enable_compilation_cache()
    folder = _CHECKPOINT.value
    request = EvalRequest(
        lengths=lengths,
        sizes=sizes,
        split=_SPLIT.value,
        data=_DATA.value,
        paths=tuple(_PATHS.value),
        tokens=_TOKENS.value,
        examples=_EXAMPLES.value,
        new_tokens=_NEW_TOKENS.value,
        contexts=contexts,
        stride=_STRIDE.value,
        targets=_TARGETS.value,
        lossy=_LOSSY.value,
        text_key=_TEXT_KEY.value,
        bit_depth=_BIT_DEPTH.value,
        suites=_suite_request(lengths) if _SUITE.value else None,
    )
    if not _SUITE.value:
        _refuse_suite_flags()
    run = RunDir(folder)
    if request.suites is None:
        check_request(loading.folder_config(run, _IGNORE_FIELDS.value), folder, request)
    if not (run.is_model() or request.data or request.suites):
        raise InputError(f"{folder} has no data set of its own: name one, such as --data=text_files --paths=FILE")
    if _PREDICTIONS.value:
        check_predictions_path(_PREDICTIONS.value, folder)
    options = config_flags.mesh_overrides(), _IGNORE_FIELDS.value, _WEIGHTS.value or ""
    model = loading.open_folder(run, _WHICH.value, *options)
    with contextlib.ExitStack() as stack:
        write_prediction = None
        if _PREDICTIONS.value and processes.is_main_process():
            write_prediction = stack.enter_context(predictions_file(_PREDICTIONS.value, folder, model.step))
        report, arrays = evaluate(model, request, write_prediction)
    if write_prediction is not None:
        print(f"written: {_PREDICTIONS.value}")
    if _OUTPUT.value and processes.is_main_process():
        for file in write(report, arrays, as_path(_OUTPUT.value)):
            print(f"written: {file}")


def run_command() -> None:
    """Runs the command with the arguments of the process, and exits with its code on an error."""
    flags.mark_flag_as_required("checkpoint")
    common.run(main, reads_checkpoints=True)
