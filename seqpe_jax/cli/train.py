"""Trains a model; executed again, it resumes an interrupted run.

python -m seqpe_jax.train --config=configs/stdlib_lm.py --workdir=runs/first
python -m seqpe_jax.train --config=configs/stdlib_lm.py:rotary --workdir=runs/rotary --config.steps=500
python -m seqpe_jax.train --config=configs/stdlib_lm.py --workdir=runs/tuned --init-from=runs/first
python -m seqpe_jax.train --config=runs/first:alibi --workdir=runs/other --init-from=runs/first

A finished run is continued with more steps: --config.steps=3000, and --extend=true where the schedule depends on them.
--change=optimizer.learning_rate,optimizer.schedule lets a resumed run change these fields, which its folder records.
Exit code 75: after SIGTERM, SIGINT or SIGHUP; the state is saved, and the same command resumes. 1: a failure; 2: bad input.
On several hosts the same command runs on each, with a workdir that they share (launch/: Slurm, GKE, TPU VMs).
"""

import dataclasses

from absl import flags

from seqpe_jax.cli import common, config_flags
from seqpe_jax.config import Config, split_folder
from seqpe_jax.errors import InputError
from seqpe_jax.run_dir import RunDir

config_flags.define_config()
_WORKDIR = common.define_path("workdir", "folder of the run: config, metrics, checkpoints", writes="folder")
_INIT_FROM = common.define_path("init-from", "run or converted checkpoint whose parameters the training starts from")
_IGNORE_FIELDS = common.define_ignore_fields()
_EXTEND = flags.DEFINE_bool(
    "extend", False, "allow more steps although the learning rate of the steps so far depends on their number"
)
_CHANGE = flags.DEFINE_list(
    "change",
    [],
    "fields that a resumed run may change, such as optimizer.learning_rate; their values are given as ever",
)
common.define_process_flags()


def main() -> None:
    """Starts the processes, and trains."""
    from seqpe_jax.distributed import processes
    from seqpe_jax.training.loop import train_and_evaluate

    processes.configure_gpu_memory()
    settings, workdir = common.start_processes(_settings), _WORKDIR.value
    processes.enable_compilation_cache(workdir)
    train_and_evaluate(settings, workdir, extend=_EXTEND.value, change=tuple(_CHANGE.value))


def _settings() -> Config:
    settings = config_flags.read_config()
    if _INIT_FROM.value is not None:
        settings = dataclasses.replace(settings, init_from=_INIT_FROM.value)
    folder, _ = split_folder(config_flags.config_path())
    sources = [path for path in (folder, settings.init_from) if path]
    if settings.ignore_fields and all(RunDir(path).is_model() for path in sources):
        raise InputError(
            "--ignore-fields is for the config.json of a Hugging Face folder, and neither --config nor --init-from names one: "
            "leave it out"
        )
    return settings


def run_command() -> None:
    """Runs the command with the arguments of the process, and exits with its code on an error."""
    flags.mark_flags_as_required(["config", "workdir"])
    common.run(main)
