"""What every command shares: flags, `--help`, one clear line and exit code 2 for bad input; starting on several hosts.

Commands import what they work with inside their functions, and so does this module: JAX and what stands on it take seconds,
which `--help` need not wait for.
"""

import math
import os
import re
import sys
import traceback
from collections.abc import Callable

from absl import flags

from seqpe_jax import config
from seqpe_jax.cli import config_flags
from seqpe_jax.config import Config
from seqpe_jax.errors import Failure, InputError
from seqpe_jax.files import check_readable, check_writable, expand_path
from seqpe_jax.run_dir import check_output_path
from seqpe_jax.trees import flat

flags.disclaim_key_flags()  # the flags of `define_process_flags` are those of the command that calls it
_COMMAND = ["__main__"]  # name of the module whose flags are those of the command; `run` sets it
PROCESS_FLAGS = ("coordinator", "num-processes", "process-id", "start-timeout")


class _Path(flags.ArgumentParser):
    """Reads a path that a user gives: `files.expand_path`, and where something is to be written, whether it can be."""

    syntactic_help = "a path, ~ is the home folder; or gs://BUCKET/NAME"

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
    """Gives a command an option that is a path.

    Args:
      writes: "file" or "folder" where the command writes one there; it is refused at the start if it cannot.
      local: why it must be of this machine's file system, in words; "" = it may be in a store.
      allowed: names that a run's folder keeps and this option is meant to write (`run_dir.OUTPUT_FILES`); others are refused.
    """
    return flags.DEFINE(_Path(name, writes, local, allowed), name, None, help)


def define_checkpoint_choice() -> flags.FlagHolder:
    """Gives a command the option that says which checkpoint of a run it reads."""
    told = "checkpoint of a run: its newest, or the best by the metric that its config names as checkpoint.best"
    return flags.DEFINE_enum("which", "latest", ["latest", "best"], told)


def define_process_flags() -> None:
    """Gives a command the options of a run of several processes."""
    told = "; not needed alone, nor where Slurm, a TPU pod or Kubernetes tells it"
    flags.DEFINE_string(
        "coordinator", None, f"HOST:PORT of process 0, the same on every host (PORT - 1 is used too){told}"
    )
    flags.DEFINE_integer("num-processes", None, f"processes of the run{told}", lower_bound=1, upper_bound=2**16)
    flags.DEFINE_integer("process-id", None, f"number of this process, from 0{told}", lower_bound=0)
    flags.DEFINE_float(
        "start-timeout", 300.0, "seconds to wait for the other processes", lower_bound=1.0, upper_bound=1e6
    )


def start_processes(read: Callable[[], Config | None] = lambda: None) -> Config | None:
    """Starts the run's processes together (`processes.initialize`), and returns the config.

    Args:
      read: gives the config; all processes must have the same fields of it, and the same options. One that it refuses is
        refused after the start, so that the lead says it once for all.
    """
    from seqpe_jax.distributed import processes

    values = {name: flags.FLAGS[name].value for name in PROCESS_FLAGS}
    if math.isnan(values["start-timeout"]):  # which no bound of a flag keeps out
        raise InputError("--start-timeout must be a number of seconds, got nan")
    own = flags.FLAGS.get_key_flags_for_module(_COMMAND[0])
    facts = {
        f"--{flag.name}": flag.value
        for flag in own
        if flag.name not in PROCESS_FLAGS and not flag.name.startswith("config")
    }
    settings = refused = None
    try:
        settings = read()
        facts |= flat({"config": config.to_dict(settings)}, ".") if settings is not None else {}
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


def run(main: Callable[[], None]) -> None:
    """Parses the flags and calls `main`; exits with 0, with 2 on bad input (one line), with a `Failure`'s code on that."""
    for name in ("stdout", "stderr"):  # closed by who started the command, as `>&-` does: what is said goes nowhere
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    module = sys.modules[main.__module__]
    _COMMAND[:] = [module.__name__]
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((module.__doc__ or "").strip())
        print(flags.FLAGS.module_help(module.__name__))
        sys.exit(0)
    if "config" in flags.FLAGS and (asked := [a for a in sys.argv[1:] if re.fullmatch("--help(full|=.+)", a)]):
        _print_fields(asked[0].partition("=")[2])
    from seqpe_jax.distributed import processes

    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: names of files may be any bytes
    try:
        earlier = _occurrences()
        rest = flags.FLAGS(sys.argv)[1:]
        _check_given_once(earlier)
        if rest:
            raise InputError(f"unexpected argument '{rest[0]}': options look like --name=value (see --help)")
        processes.configure_malloc()
        main()
        processes.shutdown()
    except (InputError, flags.Error) as error:
        if isinstance(error, flags.UnrecognizedFlagError):
            error = config_flags.unknown_flag(error.flagname) or error
        processes.abort(
            2, "error: " + _line(error)
        )  # at once: libraries cut short in their work would say more than this line
    except Failure as error:
        processes.abort(error.code, _line(error))
    except KeyboardInterrupt:
        processes.abort(130, "interrupted")
    except Exception as error:
        if not processes.is_multiprocess():
            raise
        processes.wait_for_abort()
        traceback.print_exc()
        processes.abort(1, _line(f"failed: {type(error).__name__}: {error}"))


def _print_fields(section: str) -> None:
    """Prints the fields of a config, or of one section, and ends the command."""
    try:
        print(config_flags.help_on_fields(section))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _occurrences() -> dict[str, int]:
    """Returns how often each option has been given; those that collect the values of each time are left out."""
    return {name: flag.present for name in flags.FLAGS if not isinstance(flag := flags.FLAGS[name], flags.MultiFlag)}


def _check_given_once(earlier: dict[str, int]) -> None:
    """Refuses an option that is given again, of which absl would take the last value.

    Args:
      earlier: `_occurrences` before the command line was read.

    Raises:
      InputError: names the option.
    """
    for name, count in _occurrences().items():
        if count - earlier.get(name, 0) > 1:
            raise _given_again(name)


def _given_again(name: str) -> InputError:
    return InputError(f"--{name} is given more than once, and only the last would count: give it once (a list as a,b)")


def _line(words: object) -> str:
    return " ".join(str(words).split()).encode("utf-8", "backslashreplace").decode()
