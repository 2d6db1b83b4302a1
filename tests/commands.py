"""Commands as a user starts them: each in a process of its own, with real exit codes and real stderr.

Importing JAX takes seconds, so `Commands` keeps one process that has imported everything and forks it for each command.
"""

import dataclasses
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = "tests/tiny_text.py"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished command left."""

    code: int
    out: str
    err: str


def environment(cache: pathlib.Path) -> dict[str, str]:
    """Returns the environment of a command: one CPU device, data caches in a folder of the test."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*flags, "--xla_force_host_platform_device_count=1"]),
        "SEQPE_JAX_CACHE": str(cache),
    }


def train_arguments(workdir: pathlib.Path, text: pathlib.Path, config: str = CONFIG, **overrides: object) -> list[str]:
    """Returns the options of `train` on a tiny config; overrides with `__` for the dot."""
    fields = {"data.paths": str(text)} | {name.replace("__", "."): value for name, value in overrides.items()}
    options = [f"--config.{name}={value}" for name, value in fields.items()]
    return [f"--config={config}", f"--workdir={workdir}", *options]


class Commands:
    """Runs `python -m seqpe_jax.NAME` quickly, many times."""

    def __init__(self, cache: pathlib.Path):
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.commands"],
            cwd=ROOT, env=environment(cache), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, name: str, *arguments: str) -> Result:
        """Runs a command to its end."""
        print(json.dumps([f"seqpe_jax.{name}", *arguments]), file=self._server.stdin, flush=True)
        return Result(*json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        """Ends the waiting process."""
        self._server.stdin.close()
        self._server.wait(timeout=60)


def serve() -> None:
    """Runs the command of each line of stdin in a fork, and answers [code, stdout, stderr]."""
    from seqpe_jax import build, command, training  # noqa: F401  imported once, for all forks
    from seqpe_jax.runtime import checkpoint, progress  # noqa: F401

    for line in iter(sys.stdin.readline, ""):
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if child == 0:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.argv = json.loads(line)
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
                return  # to the end of this process, as the command's own would end
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out.seek(0)
            err.seek(0)
            print(json.dumps([code, out.read(), err.read()]), flush=True)


if __name__ == "__main__":
    serve()
