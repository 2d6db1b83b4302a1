"""Trains and evaluates the runs of a sweep file; the same command goes on where a sweep was stopped.

python -m seqpe_jax.sweep --sweep=configs/sweeps/extrapolation.py --workdir=runs/extrapolation --jobs=2
python -m seqpe_jax.sweep --sweep=configs/sweeps/extrapolation.py --workdir=runs/extrapolation --executor=print
python -m seqpe_jax.sweep --sweep=configs/sweeps/search.py --workdir=runs/search --executor=optuna --jobs=2

Executors: local (this machine), slurm (an array of jobs; needs submitit), print (the commands, for other schedulers),
optuna (the file's SEARCH over ranges; needs Optuna). Each run has WORKDIR/NAME, with its commands' output in log.txt.
"""

import pathlib
import shlex

from absl import flags

from seqpe_jax import command
from seqpe_jax.errors import Failure, InputError, suggest
from seqpe_jax.sweeps import local, points, record, search, slurm
from seqpe_jax.sweeps.runs import SweepRun

_SWEEP = command.define_path(
    "sweep", "sweep file: CONFIG, and runs() or SEARCH (see configs/sweeps)", local="sweep files are Python"
)
_WORKDIR = command.define_path(
    "workdir", "folder of the sweep, with a folder for each run", writes="folder",
    local="a sweep keeps locks and growing logs in its folder, which stores have not",
)  # fmt: skip
_EXECUTOR = flags.DEFINE_enum("executor", "local", ["local", "slurm", "print", "optuna"], "who runs the commands")
_JOBS = flags.DEFINE_integer("jobs", None, "runs at once (default: 1; slurm: as many as it has room for)", lower_bound=1)
_ONLY = flags.DEFINE_list("only", [], "the runs of these names alone")
_RETRY = flags.DEFINE_bool("retry-failed", False, "the failed runs alone, once more")
_SLURM = flags.DEFINE_list("slurm", [], "with slurm: options of a job, e.g. partition=gpu,gpus_per_node=1,time=600")


def main() -> None:
    """The command."""
    sweep, workdir = points.read(_SWEEP.value), pathlib.Path(_WORKDIR.value)
    if _SLURM.value and _EXECUTOR.value != "slurm":
        raise InputError("--slurm is for --executor=slurm")
    if _EXECUTOR.value == "optuna":
        _search(sweep, workdir)
        return
    if not sweep.points:
        raise InputError(f"{sweep.path} has a SEARCH, but no runs(): use --executor=optuna")
    asked = slurm.parameters(_SLURM.value) if _EXECUTOR.value == "slurm" else {}
    runs = [SweepRun(point, workdir / point.name) for point in sweep.points]
    names = {run.name for run in runs}
    for name in _ONLY.value:
        if name not in names:
            raise InputError(f"--only: no run is named '{name}'.{suggest(name, names)}")
    chosen = [run for run in runs if run.name in (_ONLY.value or names)]
    if _EXECUTOR.value == "print":
        for run in chosen:
            print("\n".join(shlex.join(words) for _, words in (run.train, run.evaluate)))
        return
    for name in record.remember(workdir, sweep, sweep.points):
        print(f"  {sweep.path} has no run '{name}' any more; its folder stays as it is")
    failed = {run.name for run in runs if run.failure()}
    todo = [run for run in chosen if run.left() and (run.name in failed) == _RETRY.value]
    print(f"seqpe_jax: {len(runs)} runs in {workdir}, {len(failed)} failed before, {len(todo)} to do", flush=True)
    if _EXECUTOR.value == "slurm":
        _end(chosen, slurm.work(workdir, runs, todo, _JOBS.value, asked))
    else:
        print(f"  {local.describe(_JOBS.value or 1)}", flush=True)
        _end(chosen, local.work(runs, todo, _JOBS.value or 1))


def _end(runs: list[SweepRun], told: str | None) -> None:
    """Says what became of the runs. Raises: Failure: some failed or are left."""
    words = f"{sum(not run.left() for run in runs)} of {len(runs)} runs finished"
    failed = [(run, why) for run in runs if (why := run.failure())]
    for run, why in failed:
        print(f"  failed: {run.name}: {why}  (all of it: {run.folder}/log.txt)")
    if told:
        raise Failure(f"{told}: {words}; the same command goes on")
    if failed:
        raise Failure(f"{words}, {len(failed)} failed; --retry-failed runs those alone again")
    print(f"{words}\nthe report: python -m seqpe_jax.report --workdir={_WORKDIR.value} --output={_WORKDIR.value}/report")


def _search(sweep: points.SweepFile, workdir: pathlib.Path) -> None:
    if _ONLY.value or _RETRY.value:
        raise InputError("--only and --retry-failed are for runs with names, not for --executor=optuna")
    trials, jobs = search.Trials(workdir, sweep), _JOBS.value or 1
    print(f"seqpe_jax: {len(trials.steps)} trials in {workdir}\n  {local.describe(jobs)}", flush=True)
    told = search.work(trials, jobs)
    for name, outcome in sorted(trials.outcomes.items()):
        print(f"  {name}: {outcome}")
    run, words = trials.best()
    told = told or local.work([run], [run], 1)  # its evaluation is left
    _end([run], told)
    print(words)


if __name__ == "__main__":
    flags.mark_flags_as_required(["sweep", "workdir"])
    command.run(main)
