"""Trains a model; the same command goes on where a run was stopped.

python -m seqpe_jax.train --config=configs/stdlib_lm.py --workdir=runs/first
python -m seqpe_jax.train --config=configs/stdlib_lm.py:rotary --workdir=runs/rotary --config.steps=500
python -m seqpe_jax.train --config=configs/stdlib_lm.py --workdir=runs/tuned --init-from=runs/first

On several hosts the same command runs on each, with a workdir that they share (launch/: Slurm, GKE, TPU VMs).
"""

import dataclasses
import json
import pathlib

import jax
from absl import flags
from ml_collections import config_flags

from seqpe_jax import build, command, config
from seqpe_jax.build import saved
from seqpe_jax.build.benchmarks import flops_of_run
from seqpe_jax.config import Config
from seqpe_jax.errors import InputError, check_utf8_name
from seqpe_jax.runtime import hosts
from seqpe_jax.runtime import mesh as layout
from seqpe_jax.runtime.checkpoint import Checkpoints, read_config, saved_step, write_config
from seqpe_jax.runtime.progress import LOG, MetricsWriter
from seqpe_jax.training import loop


def run(settings: Config, workdir: str | pathlib.Path) -> None:
    """Trains, or goes on training, the run of a workdir until `steps`.

    Raises:
      InputError: bad data, a workdir of another config, a damaged checkpoint.
    """
    workdir = pathlib.Path(workdir)
    hosts.keep_compiled_programs()
    first = saved_step(workdir)
    _check_same_run(settings, workdir, first)
    begins = bool(settings.init_from) and first is None
    parts = build.build(settings, kept=settings.init_from if begins else workdir if first is not None else "")
    data = parts.data
    if begins:
        saved.check_source(parts, settings.init_from)
    if settings.eval.every:
        for scale in data.scales():
            data.check_scale(scale, "validation")
    words = data.describe()
    if hosts.is_lead():
        parameters = sum(leaf.size for leaf in jax.tree.leaves(parts.shapes.params))
        print(
            f"seqpe_jax: {hosts.describe()}\n"
            f"  {settings.encoding.kind} on {settings.data.name}: {parameters:,} parameters, {words}\n"
            f"  {hosts.describe_batch(settings.batch_size, layout.batch_shards(parts.mesh))}\n"
            f"  workdir {workdir}",
            flush=True,
        )
        if parts.whole:
            print(f"  {layout.describe_whole(parts.whole)}", flush=True)
    # Parameters that a run begins with are read before it claims its folder, since they may not fit.
    state = saved.first_state(parts) if first is None else None
    hosts.sync()  # all have looked at the workdir before it changes
    if hosts.is_lead():
        write_config(workdir, config.to_dict(settings))
        data.keep(workdir)
    hosts.sync()
    hosts.check_shared(workdir / "config.json")
    if first == settings.steps:
        if hosts.is_lead():
            print(f"  nothing to do: step {first} is saved")
        return
    checkpoints = Checkpoints(workdir, keep=settings.checkpoint.keep)
    state = checkpoints.restore(parts.shapes) if state is None else state
    seconds = checkpoints.meta().get("seconds", 0.0) if first is not None else 0.0
    if hosts.is_lead() and (first is not None or settings.init_from):
        print(f"  begins with {settings.init_from}" if first is None else f"  going on from step {first}", flush=True)

    window = config.profile_window(settings)
    if hosts.is_lead() and window is not None and window[0] < (first or 0):
        print(f"  profile.steps={settings.profile.steps} has passed: nothing is recorded", flush=True)

    def evaluate(params: object) -> dict[str, float]:
        results = {}
        for scale in data.scales():
            result = parts.evaluate(params, scale, "validation")
            for name in data.measured:
                results[f"eval/{name}@{scale[0]}"] = result[name]
        return results

    loop.fit(
        state,
        parts.train_step(),
        parts.batches(first or 0),
        steps=settings.steps,
        units_per_step=data.units_per_step,
        unit=data.unit,
        checkpoints=checkpoints,
        save_every=settings.checkpoint.every,
        meta={"config": json.loads(json.dumps(config.to_dict(settings)))},
        metrics=MetricsWriter(workdir, first or 0, tensorboard=settings.report.tensorboard),
        report_every=settings.report.every,
        flops_per_step=flops_of_run(parts, "train"),
        evaluate=evaluate if settings.eval.every else None,
        evaluate_every=settings.eval.every,
        profile=window,
        workdir=workdir,
        seconds_before=seconds,
    )


def _check_same_run(settings: Config, workdir: pathlib.Path, step: int | None) -> None:
    """Refuses a folder of something else. A run that has saved no step yet begins anew, with any config."""
    check_utf8_name(workdir.absolute(), "a folder with checkpoints (--workdir)")
    if not (workdir / "config.json").exists():
        if workdir.exists() and (not workdir.is_dir() or any(path.name != LOG for path in workdir.iterdir())):
            raise InputError(f"workdir {workdir} holds other files but no config.json: choose a new or empty folder")
        return
    if step is None:
        return
    # An older run's file lacks fields that are newer, which have their defaults, and may hold values that nothing reads.
    before = config.from_dict(read_config(workdir))
    old, new = (config.to_dict(config.as_read(one)) for one in (before, settings))
    for values in (old, new):
        for section in config.FREE_SECTIONS:
            values.pop(section, None)
        values["data"].pop("lossy_tokenizer")  # what is accepted changes nothing of what is computed
    lines = config.difference(old, new)
    if lines:
        raise InputError(
            f"workdir {workdir} belongs to a run with another config; it differs in {'; '.join(lines)}. Use a new "
            "--workdir, or the same fields"
        )


_CONFIG = config_flags.DEFINE_config_file("config", None, "config file, with its :variant", lock_config=True)
_WORKDIR = command.define_path("workdir", "folder of the run: config, metrics, checkpoints", writes="folder")
_INIT_FROM = command.define_path("init-from", "begin with the parameters of that run or converted checkpoint")
command.define_hosts()


def main() -> None:
    """The command."""
    run(command.join_hosts(_settings), _WORKDIR.value)


def _settings() -> Config:
    settings = config.parse(_CONFIG.value)
    return settings if _INIT_FROM.value is None else dataclasses.replace(settings, init_from=_INIT_FROM.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    command.run(main)
