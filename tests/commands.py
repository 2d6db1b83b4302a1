"""Commands as a user starts them: each in a process of its own, with real exit codes and real stderr.

Importing JAX takes seconds, so one process that has imported everything is forked for each command of all tests.
"""

import atexit
import dataclasses
import functools
import gc
import importlib
import json
import os
import pathlib
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = "tests/tiny_text.py"
STDIN = "STDIN_OF_THE_TEST"  # environment variable with the file that is a command's standard input


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished command left."""

    code: int
    out: str
    err: str
    peak: int = 0  # bytes of memory that it held at most, with those of the process it was forked from


def environment(cache: pathlib.Path) -> dict[str, str]:
    """Returns the environment of a command: one CPU device, data caches in a folder of the test."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*flags, "--xla_force_host_platform_device_count=1"]),
        "SEQPE_JAX_CACHE": str(cache),
    }


def train_arguments(
    workdir: pathlib.Path, text: pathlib.Path | None, config: str = CONFIG, **overrides: object
) -> list[str]:
    """Returns the options of `train` on a tiny config; overrides with `__` for the dot. The config names its text if none is given."""
    fields = {} if text is None else {"data.paths": str(text)}
    fields |= {name.replace("__", "."): value for name, value in overrides.items()}
    options = [f"--config.{name}={value}" for name, value in fields.items()]
    return [f"--config={config}", f"--workdir={workdir}", *options]


def with_defaults(given: list[str], **defaults: object) -> list[str]:
    """Returns options, after those defaults that they do not name: commands refuse one that is given twice."""
    named = {option.partition("=")[0] for option in given}
    return [*(f"--{name}={value}" for name, value in defaults.items() if f"--{name}" not in named), *given]


def hosts(port: int, count: int, process: int) -> list[str]:
    """Returns the options of one of several processes on this machine."""
    return [f"--coordinator=localhost:{port}", f"--num-processes={count}", f"--process-id={process}"]


def free_port() -> int:
    """Returns a port that is free, as the one below it is."""
    while True:
        port = random.randrange(20000, 30000)
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("localhost", port))
                other.bind(("localhost", port - 1))
                return port
            except OSError:
                continue


@dataclasses.dataclass(frozen=True)
class Running:
    """A command under way; what it has said so far can be read."""

    process: int
    folder: pathlib.Path

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()


class _Server:
    """A process that has imported everything, and forks itself for each command."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.commands"],
            cwd=ROOT,
            env=environment(pathlib.Path(os.devnull)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._close)

    def ask(self, request: list) -> Any:
        """Returns the answer to a request (see `serve`)."""
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def _close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)


_server = functools.cache(_Server)  # one for all tests of a process: it takes as long to start as many commands


class Commands:
    """Runs `python -m seqpe_jax.NAME` quickly, many times.

    Args:
      cache: folder of the data caches.
      before: a module of the tests whose `install` changes what commands do.
      variables: environment variables of all commands.
    """

    def __init__(self, cache: pathlib.Path, before: str = "", **variables: str):
        self._folder = tempfile.TemporaryDirectory()
        self._count, self._before, self._variables = 0, before, {"SEQPE_JAX_CACHE": str(cache)} | variables

    def __call__(self, name: str, *arguments: str) -> Result:
        """Runs a command to its end."""
        return self.wait(self.start(name, *arguments))

    def start(self, name: str, *arguments: str, **variables: str) -> Running:
        """Begins a command, with environment variables of its own."""
        self._count += 1
        folder = pathlib.Path(self._folder.name) / str(self._count)
        folder.mkdir()
        for stream in ("out", "err"):  # a process may be killed before it has said anything
            (folder / stream).touch()
        words = [f"seqpe_jax.{name}", *arguments]
        return Running(_server().ask([words, self._variables | variables, str(folder), self._before]), folder)

    def wait(self, running: Running, seconds: float = 600.0) -> Result:
        """Returns what a command left when it ended; one that takes longer is killed."""
        code, peak = _server().ask([running.process, seconds])
        return Result(code, running.out, running.err, peak)

    def close(self) -> None:
        """Removes what commands printed."""
        self._folder.cleanup()


class Forked:
    """Stands for Popen where a forked sweep starts `python -m NAME ...`: a fork of it, which has imported everything."""

    defined: frozenset[str] = frozenset()  # flags that no command has defined

    def __init__(self, words: list[str], *, stdout, env: dict[str, str], **_: object):
        from jax._src import xla_bridge

        assert not xla_bridge.backends_are_initialized(), "the sweep holds the devices that its runs need"
        self.returncode = None
        self._process = os.fork()
        if self._process == 0:
            os.setsid()
            for number in (1, 2):
                os.dup2(stdout.fileno(), number)
            os.environ.clear()
            os.environ.update(env)
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _as_if_alone(words[2:])

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self._process, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self._process, number)


def _as_if_alone(words: list[str]) -> None:
    """Runs a command to its end and ends this process, without a way back into the one that it was forked from."""
    from absl import flags

    code = 1
    try:
        for name in set(flags.FLAGS) - Forked.defined:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    sys.stdout.flush()
    os._exit(code)


def serve() -> None:
    """Begins the command of a line of stdin in a fork and answers its process, or awaits one and answers its exit code."""
    import sklearn.datasets  # noqa: F401
    import tokenizers  # noqa: F401
    from absl import flags

    from seqpe_jax import loading  # noqa: F401  imported once, for all forks, as what follows
    from seqpe_jax.distributed import progress  # noqa: F401
    from seqpe_jax.reporting import plots  # noqa: F401
    from seqpe_jax.sweeps import run
    from seqpe_jax.training import checkpoint  # noqa: F401
    from tests import interleaved_mesh, small_models, without_compiling  # noqa: F401

    run.Popen, Forked.defined = Forked, frozenset(flags.FLAGS)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as a terminal leaves them, whatever started the tests
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.collect()
    gc.freeze()  # else each fork looks through all of it, and so copies it, when it ends

    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if len(request) == 4:
            child = os.fork()
            if child == 0:
                sys.argv, variables, folder, before = request
                os.environ.update(variables)
                sys.path += filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
                os.dup2(os.open(variables.get(STDIN, os.devnull), os.O_RDONLY), 0)
                for number, name in ((1, "out"), (2, "err")):
                    os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
                if before:
                    importlib.import_module(before).install()
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
                return  # to the end of this process, as the command's own would end
            print(child, flush=True)
        else:
            print(json.dumps(_end_of(*request)), flush=True)


def _end_of(child: int, seconds: float) -> tuple[int, int]:
    """Awaits a process and returns (exit code, most bytes of memory)."""
    deadline = time.monotonic() + seconds
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


if __name__ == "__main__":
    serve()
