"""Trains a model; the same command goes on where a run was stopped.

python -m seqpe_jax.train --config=configs/stdlib_lm.py --workdir=runs/first
python -m seqpe_jax.train --config=configs/stdlib_lm.py:rotary --workdir=runs/rotary --config.steps=500
python -m seqpe_jax.train --config=configs/stdlib_lm.py --workdir=runs/tuned --init-from=runs/first

A finished run goes on with more steps: --config.steps=3000, and --extend=true where the schedule depends on their number.
Exit code 75: SIGTERM, SIGINT or SIGHUP came, the state is saved and the same command goes on; 1: a failure; 2: bad input.
On several hosts the same command runs on each, with a workdir that they share (launch/: Slurm, GKE, TPU VMs).
"""

import dataclasses

from absl import flags

from seqpe_jax.cli import common, config_flags
from seqpe_jax.config import Config

config_flags.define_config()
_WORKDIR = common.define_path("workdir", "folder of the run: config, metrics, checkpoints", writes="folder")
_INIT_FROM = common.define_path("init-from", "begin with the parameters of that run or converted checkpoint")
_EXTEND = flags.DEFINE_bool(
    "extend", False, "go on to more steps although the learning rate that the run had so far depends on their number"
)
common.define_process_flags()


def main() -> None:
    """The command."""
    from seqpe_jax.distributed import processes
    from seqpe_jax.training.loop import train_and_evaluate

    settings, workdir = common.start_processes(_settings), _WORKDIR.value
    processes.exit_on_signal()
    processes.keep_compiled_programs()
    train_and_evaluate(settings, workdir, extend=_EXTEND.value)


def _settings() -> Config:
    settings = config_flags.read_config()
    return settings if _INIT_FROM.value is None else dataclasses.replace(settings, init_from=_INIT_FROM.value)


def run_command() -> None:
    """Runs the command with the arguments of the process; never returns where it fails."""
    flags.mark_flags_as_required(["config", "workdir"])
    common.run(main)
