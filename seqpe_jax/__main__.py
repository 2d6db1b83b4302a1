"""All commands under one name.

    seqpe_jax train --config=configs/stdlib_lm.py --workdir=runs/first
    seqpe_jax evaluate --checkpoint=runs/first

`seqpe_jax NAME ...` is `python -m seqpe_jax.NAME ...`; `seqpe_jax NAME --help` says what it takes.
"""

import runpy
import sys

COMMANDS = (
    "train",
    "evaluate",
    "report",
    "generate",
    "predict",
    "export",
    "convert",
    "sweep",
    "prepare",
    "benchmark",
    "aot",
)


HARNESS = "lm_eval"  # with the models of this package, where it is installed


def main() -> None:
    """Runs the command named by the first argument; exits with code 2 if there is no such command."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\nCommands: {', '.join(COMMANDS)}; {HARNESS}: lm-evaluation-harness")
        sys.exit(0 if arguments else 2)
    if arguments[0] not in (*COMMANDS, HARNESS):
        print(f"error: there is no command '{arguments[0]}': choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"seqpe_jax {arguments[0]}", *arguments[1:]]
    runpy.run_module(f"seqpe_jax.{arguments[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
