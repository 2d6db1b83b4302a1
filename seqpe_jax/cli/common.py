"""What every command shares: flags, `--help`, one clear line and exit code 2 for bad input; starting on several hosts.

Commands import what they work with inside their functions, and so does this module: JAX and what stands on it take seconds,
which `--help` need not wait for.
"""

import ast
import math
import os
import sys
import traceback
from collections.abc import Callable

import ml_collections
from absl import flags
from ml_collections import config_flags

from seqpe_jax import config
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


def config_from_flags(page: ml_collections.ConfigDict) -> Config:
    """Returns the validated config of --config and of the options --config.FIELD=VALUE.

    Args:
      page: value of the flag.

    Raises:
      InputError: as `config.parse`; an option that the config does not read.
    """
    settings = config.parse(page, config_overrides())
    config.check_overrides_used(settings, config_overrides())
    return settings


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


def config_overrides() -> dict[str, object]:
    """Returns the fields of the config that the command line sets, by their dotted names."""
    return config_flags.get_override_values(flags.FLAGS["config"])


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
    from seqpe_jax.distributed import processes

    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: names of files may be any bytes
    try:
        _check_config_arguments(sys.argv[1:])
        keeps, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # of config files (see `config.scripts`)
        earlier = _occurrences()
        rest = flags.FLAGS(_with_texts(sys.argv))[1:]
        sys.dont_write_bytecode = keeps
        _check_given_once(earlier)
        if rest:
            raise InputError(f"unexpected argument '{rest[0]}': options look like --name=value (see --help)")
        processes.configure_malloc()
        main()
        processes.shutdown()
    except (InputError, flags.Error) as error:
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


def _check_config_arguments(arguments: list[str]) -> None:
    """Says in one line what `config_flags` would tell as a traceback: no such file, variant or field, or two files."""
    files = 0
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        name, given, value = argument.lstrip("-").partition("=")
        if name == "config" and argument.startswith("-"):
            files += 1
            if files > 1:
                raise _given_again(name)
            config.load(value if given else following)
        elif name.startswith("config."):
            field = name.removeprefix("config.")
            if field not in config.field_names():
                raise InputError(config.unknown_field_message(field))


def _with_texts(arguments: list[str]) -> list[str]:
    """Returns the arguments with what is said of fields that hold texts quoted: a path such as 2024 is no number."""
    texts = {f"config.{name}" for name, kind in config.field_types().items() if kind == tuple[str, ...]}
    written, follows = [], ""  # the name of the flag whose value comes next
    for argument in arguments:
        flag, given, value = argument.partition("=")
        if follows:
            written.append(_config_file(argument) if follows == "config" else _quoted(argument))
        elif given and flag.lstrip("-") in texts:
            written.append(f"{flag}={_quoted(value)}")
        elif given and flag.lstrip("-") == "config":
            written.append(f"{flag}={_config_file(value)}")
        else:
            written.append(argument)
        named = flag.lstrip("-") if flag.startswith("-") and not given and not follows else ""
        follows = named if named in texts | {"config"} else ""
    return written


def _config_file(value: str) -> str:
    return config.resolve_config_path(expand_path(value, local=config.LOCAL))


def _quoted(value: str) -> str:
    """Returns a text, or several in Python's notation for tuples and lists, as `config_flags` reads it as texts."""
    try:
        written = ast.parse(value.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        return repr(value)
    if isinstance(written, ast.Constant) and isinstance(written.value, str):
        return value
    if not isinstance(written, (ast.Tuple, ast.List)) or not all(
        isinstance(item, ast.Constant) for item in written.elts
    ):
        return repr(value)
    source = value.strip()
    return repr(
        tuple(
            item.value if isinstance(item.value, str) else ast.get_source_segment(source, item) for item in written.elts
        )
    )
