"""Shared parts of the commands: flags, `--help`, exit codes with one line on bad input, and the start on several hosts.

Modules that import JAX are imported inside functions, here and in the commands, since that takes seconds and `--help` does
not need it.
"""

import math
import os
import re
import sys
import traceback
import types
from collections.abc import Callable

from absl import flags

from seqpe_jax import config, start_signals
from seqpe_jax.cli import config_flags
from seqpe_jax.config import Config
from seqpe_jax.errors import Failure, InputError, look_again
from seqpe_jax.files import check_readable, check_writable, expand_path
from seqpe_jax.run_dir import LOOKS, check_output_path
from seqpe_jax.trees import flatten_dict

flags.disclaim_key_flags()  # the flags of `define_process_flags` belong to the command that calls it
_COMMAND = ["__main__"]  # name of the command's module; `run` sets it
MAX_MESSAGE = 2000  # characters of a line about an error
NUMBER = "[1-9][0-9]{0,17}"  # pattern of a positive number
PROCESS_FLAGS = ("coordinator", "num-processes", "process-id", "start-timeout")


class _PathParser(flags.ArgumentParser):
    """Parser of a path, which must be readable, or writable where the command writes there."""

    syntactic_help = "a path, ~ is the home folder; or gs://BUCKET/NAME, s3://BUCKET/NAME"

    def __init__(self, name: str, writes: str, local: str, allowed: tuple[str, ...]):
        self._name, self._writes, self._local, self._allowed = name, writes, local, allowed

    def parse(self, argument: str) -> str:
        path = expand_path(argument, local=self._local)
        if self._writes:
            check_writable(path, self._writes == "folder", f"--{self._name}")
            check_output_path(path, f"--{self._name}", self._allowed)
        else:
            check_readable(path, f"--{self._name}")
        return path

    def flag_type(self) -> str:
        return "path"


def define_path(
    name: str, help: str, *, writes: str = "", local: str = "", allowed: tuple[str, ...] = ()
) -> flags.FlagHolder:
    """Defines a flag whose value is a path.

    Args:
      name: name of the flag.
      help: its line in `--help`.
      writes: "file" or "folder" that the command writes there; "" = it reads there.
      local: reason why the path must be on a local disk; "" = it may be in a bucket.
      allowed: file names of a run folder that this flag may overwrite (`run_dir.OUTPUT_FILES`); others are refused.
    """
    return flags.DEFINE(_PathParser(name, writes, local, allowed), name, None, help)


def parse_sizes(items: list[str], flag: str, pattern: str, wanted: str) -> tuple[tuple[int, ...], ...]:
    """Returns the numbers of a flag's items.

    Args:
      items: texts such as "224" or "384x512".
      flag: name of the flag, for the message.
      pattern: regular expression that each item must match.
      wanted: description of such an item, for the message.

    Raises:
      InputError: an item does not match.
    """
    for item in items:
        if not re.fullmatch(pattern, item):
            raise InputError(f"{flag} must be {wanted} separated by commas, got '{item}'")
    return tuple(tuple(map(int, item.split("x"))) for item in items)


def define_checkpoint_choice() -> flags.FlagHolder:
    """Defines the flag `--which`: the checkpoint of a run that the command reads."""
    help = "checkpoint of a run: its newest, or the best by the metric that its config names as checkpoint.best"
    return flags.DEFINE_enum("which", "latest", ["latest", "best"], help)


def define_weights_choice() -> flags.FlagHolder:
    """Defines the flag `--weights`: the parameters of a run, or their average."""
    help = (
        "parameters of a run: as they are trained, or their average (optimizer.ema, schedule_free_adamw); by default the "
        "average of schedule_free_adamw, and trained ones of the others"
    )
    return flags.DEFINE_enum("weights", None, ["trained", "averaged"], help)


def define_ignore_fields() -> flags.FlagHolder:
    """Defines the flag `--ignore-fields`: fields of a Hugging Face folder that are unknown here and passed over."""
    help = "fields of a Hugging Face folder's config.json that are unknown here and passed over, e.g. a,b"
    return flags.DEFINE_list("ignore-fields", [], help)


def define_mesh_flags() -> None:
    """Defines the flags --config.mesh.*, for commands that open a trained model; the rest of its config is stored."""
    for name, field in config.model_mesh_fields().items():
        flag, help = config_flags.MESH + name, f"{field.doc} (default: {field.default})"
        if field.choices:
            flags.DEFINE_enum(flag, None, field.choices, help)
        else:
            flags.DEFINE_integer(flag, None, help)


def define_process_flags() -> None:
    """Defines the flags of a run of several processes."""
    when = "; not needed alone, nor where Slurm, a TPU pod or Kubernetes sets it"
    flags.DEFINE_string(
        "coordinator", None, f"HOST:PORT of process 0, the same on every host (PORT - 1 is used too){when}"
    )
    flags.DEFINE_integer("num-processes", None, f"processes of the run{when}", lower_bound=1, upper_bound=2**16)
    flags.DEFINE_integer("process-id", None, f"number of this process, from 0{when}", lower_bound=0)
    flags.DEFINE_float(
        "start-timeout", 300.0, "seconds to wait for the other processes", lower_bound=1.0, upper_bound=1e6
    )


def start_processes(read: Callable[[], Config | None] = lambda: None) -> Config | None:
    """Starts the processes of a run together (`processes.initialize`), and returns the config.

    Args:
      read: function that returns the config. All processes must have the same config and the same flags. A config that it
        refuses is refused after the start, so that the main process prints one line for all.

    Raises:
      InputError: raised by `read`; or the processes differ.
    """
    from seqpe_jax.distributed import compiler_options, processes

    values = {name: flags.FLAGS[name].value for name in PROCESS_FLAGS}
    if math.isnan(values["start-timeout"]):  # which no bound of a flag refuses
        raise InputError("--start-timeout must be a number of seconds, got nan")
    own = flags.FLAGS.get_key_flags_for_module(_COMMAND[0])
    facts = {f"--{flag.name}": flag.value for flag in own if flag.name not in PROCESS_FLAGS and flag.name != "config"}
    # Processes that compile a step differently would wait for each other's collectives.
    facts |= compiler_options.environment_facts()
    settings = refused = None
    try:
        settings = read()
        facts |= flatten_dict({"config": config.to_dict(settings)}, ".") if settings is not None else {}
    except InputError as error:
        facts["bad input"], refused = str(error), error
    processes.initialize(
        facts,
        coordinator=values["coordinator"],
        num_processes=values["num-processes"],
        process_id=values["process-id"],
        seconds=values["start-timeout"],
    )
    if refused is not None:
        raise refused
    return settings


def run(main: Callable[[], None], *, reads_checkpoints: bool = False) -> None:
    """Parses the flags, calls `main`, and exits with 0, 2 on bad input (one line), or the code of a `Failure`.

    Args:
      main: function of the command's module, whose docstring and flags `--help` prints.
      reads_checkpoints: call it again where a run that trains has removed the checkpoint that it read.
    """
    _replace_closed_streams()
    start_signals.repeat_dropped_signals()
    start_signals.release_interrupt()
    module = sys.modules[main.__module__]
    _COMMAND[:] = [module.__name__]
    _answer_help(module, sys.argv[1:])
    from seqpe_jax.distributed import processes

    try:
        _parse_flags(sys.argv)
        processes.configure_malloc()
        look_again(main, LOOKS if reads_checkpoints and not processes.is_multiprocess() else 1)
        sys.stdout.flush()
        processes.shutdown()
    except (InputError, flags.Error) as error:
        # At once: libraries that are cut short in their work would print more than this line.
        processes.abort(2, f"error: {_one_line(error)}")
    except Failure as error:
        processes.abort(error.code, _one_line(error))
    except BrokenPipeError:  # the reader of the output has ended, e.g. `| head`
        processes.abort(1, "")
    except OSError as error:  # a full disk, no permission, ...
        processes.wait_for_abort()  # another process may be the cause
        processes.abort(1, f"failed: {_describe(error)}")
    except KeyboardInterrupt:
        processes.abort(130, "interrupted")
    except Exception as error:
        if _is_interrupted(error):
            processes.abort(130, "interrupted")
        if not processes.is_multiprocess():
            raise
        processes.wait_for_abort()
        traceback.print_exc()
        processes.abort(1, _one_line(f"failed: {type(error).__name__}: {error}"))


def _is_interrupted(error: BaseException | None) -> bool:
    """Returns whether SIGINT caused an error: an extension module that is being imported reports another than it got."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _replace_closed_streams() -> None:
    """Supports closed stdout and stderr (`>&-`), and file names of any bytes in the output."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is


def _answer_help(module: types.ModuleType, arguments: list[str]) -> None:
    """Prints the help that the arguments ask for, on the command or on fields of the config, and exits."""
    if {"-h", "--help"} & set(arguments):
        print((module.__doc__ or "").strip())
        print(flags.FLAGS.module_help(module.__name__))
        if "config" in flags.FLAGS:
            print(config_flags.help_on_config())
        sys.exit(0)
    chosen = [argument for argument in arguments if re.fullmatch("--help(full|=.+)", argument)]
    if "config" not in flags.FLAGS or not chosen:
        return
    try:
        print(config_flags.help_on_fields(chosen[0].partition("=")[2]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _parse_flags(argv: list[str]) -> None:
    """Parses the command line.

    Raises:
      InputError: an unknown field of the config, a flag that is given twice, or an argument that is no flag.
      flags.Error: an unknown flag, or a value that does not fit.
    """
    earlier = _occurrences()
    try:
        rest = flags.FLAGS(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise config_flags.unknown_flag(error.flagname) or error from error
    except flags.IllegalFlagValueError as error:
        raise _missing_flag(error) or error from error
    for name, count in _occurrences().items():
        if count - earlier.get(name, 0) > 1:
            raise InputError(
                f"--{name} is given more than once, and only the last would count: give it once (a list as a,b)"
            )
    if rest:
        raise InputError(f"unexpected argument '{rest[0]}': options look like --name=value (see --help)")


def _missing_flag(error: flags.IllegalFlagValueError) -> InputError | None:
    """Returns the error for a flag that must be given and is not; None for other errors."""
    found = re.search(r"Flag --(\S+) must have a value other than None", str(error))
    return InputError(f"--{found[1]} is missing: {flags.FLAGS[found[1]].help}") if found else None


def _occurrences() -> dict[str, int]:
    """Returns how often each flag was given, without those that collect the values of each time."""
    return {name: flag.present for name in flags.FLAGS if not isinstance(flag := flags.FLAGS[name], flags.MultiFlag)}


def _describe(error: OSError) -> str:
    """Returns where an error of the operating system occurred, and which."""
    names = [str(name) for name in (error.filename, error.filename2) if name]
    reason = error.strerror or error
    return _one_line(f"{' -> '.join(names)}: {reason}" if names else reason)


def _one_line(message: object) -> str:
    """Returns a message in one line; of one that is very long, as with a path of 4 kB in it, the middle is left out."""
    text = " ".join(str(message).split()).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE // 2]} [...] {text[-MAX_MESSAGE // 2 :]}"
