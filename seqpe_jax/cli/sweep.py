"""Trains and evaluates the runs of a sweep file; the same command goes on where a sweep was stopped.

python -m seqpe_jax.sweep --sweep=configs/sweeps/extrapolation.py --workdir=runs/extrapolation --jobs=2
python -m seqpe_jax.sweep --sweep=configs/sweeps/extrapolation.py --workdir=runs/extrapolation --executor=print
python -m seqpe_jax.sweep --sweep=configs/sweeps/search.py --workdir=runs/search --executor=optuna --jobs=2

Executors: local (this machine), slurm (an array of jobs; needs submitit), print (the commands, for other schedulers),
optuna (the file's SEARCH over ranges; needs Optuna). Each run has WORKDIR/NAME, with its commands' output in log.txt.
With --results=FILE.json, what finished runs have measured is kept in that small file too, and the sweep goes on with it
where their folders are not, such as on another machine. A run whose field is decided by others (`trials.Best`,
`tune_then_repeat`) begins when those have ended; --status tells what was decided and how far each run is, and runs nothing.
"""

import shlex
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from seqpe_jax.cli import common
from seqpe_jax.errors import Failure, InputError, suggest
from seqpe_jax.files import AnyPath, as_path, is_remote

if TYPE_CHECKING:
    from seqpe_jax.sweeps.run import SweepRun
    from seqpe_jax.sweeps.spec import SweepFile
    from seqpe_jax.sweeps.trial_graph import TrialGraph

_SWEEP = common.define_path(
    "sweep", "sweep file: CONFIG, and runs() or SEARCH (see configs/sweeps)", local="sweep files are Python"
)
_WORKDIR = common.define_path("workdir", "folder of the sweep, with a folder for each run", writes="folder")
_RESULTS = common.define_path(
    "results", "JSON file that keeps what finished runs measured, and is read first", writes="file"
)
_EXECUTOR = flags.DEFINE_enum("executor", "local", ["local", "slurm", "print", "optuna"], "who runs the commands")
_JOBS = flags.DEFINE_integer("jobs", None, "runs at once (default: 1; slurm: as many as it has room for)", 1, 4096)
_ONLY = flags.DEFINE_list("only", [], "the runs of these names alone")
_RETRY = flags.DEFINE_bool("retry-failed", False, "the failed runs alone, once more")
_STATUS = flags.DEFINE_bool("status", False, "tell how far each run is, and run nothing")
_SLURM = flags.DEFINE_list("slurm", [], "with slurm: options of a job, e.g. partition=gpu,gpus_per_node=1,time=600")


def main() -> None:
    """The command."""
    from seqpe_jax.sweeps import slurm, spec
    from seqpe_jax.sweeps.trial_graph import TrialGraph

    sweep, workdir = spec.read_sweep_file(_SWEEP.value), as_path(_WORKDIR.value)
    if is_remote(workdir) and _EXECUTOR.value in ("slurm", "optuna"):
        raise InputError(
            f"--executor={_EXECUTOR.value} keeps a growing record of its own beside the runs, which stores have not: "
            "give a folder that all hosts share as --workdir, or use --executor=local or print"
        )
    if _SLURM.value and _EXECUTOR.value != "slurm":
        raise InputError("--slurm is for --executor=slurm")
    if _RESULTS.value and (_STATUS.value or _EXECUTOR.value in ("print", "optuna")):
        raise InputError("--results is for runs that are worked on, by --executor=local or slurm")
    if _EXECUTOR.value == "optuna":
        _search(sweep, workdir)
        return
    if not sweep.trials:
        raise InputError(f"{sweep.path} has a SEARCH, but no runs(): use --executor=optuna")
    asked = slurm.parameters(_SLURM.value) if _EXECUTOR.value == "slurm" else {}
    stages = TrialGraph(workdir, sweep.trials)
    runs = list(stages.runs.values())
    for name in _ONLY.value:
        if name not in stages.runs:
            raise InputError(f"--only: no run is named '{name}'.{suggest(name, stages.runs)}")
    chosen = [run for run in runs if run.name in (_ONLY.value or stages.runs)]
    if _STATUS.value:
        _status(stages, chosen)
    elif _EXECUTOR.value == "print":
        _print(sweep, workdir, stages, chosen)
    else:
        _work(sweep, workdir, stages, chosen, asked)


def _work(
    sweep: "SweepFile", workdir: AnyPath, stages: "TrialGraph", chosen: "list[SweepRun]", asked: dict[str, Any]
) -> None:
    """Runs what is left of the chosen runs. Raises: InputError: the sweep has changed; Failure: see `_end`."""
    from seqpe_jax.sweeps import local, record, slurm
    from seqpe_jax.sweeps.results_cache import ResultsCache
    from seqpe_jax.sweeps.run import map_runs

    kept = ResultsCache(_RESULTS.value) if _RESULTS.value else None
    restored, decided = [], []
    if kept:
        record.remember(workdir, sweep, sweep.trials)
        restored, decided = kept.restore(stages)
    whys = map_runs(stages.runs.values(), lambda run: run.failure())
    failed = {run.name for run, why in zip(stages.runs.values(), whys, strict=True) if why}
    left = map_runs(chosen, lambda run: run.remaining_commands())
    todo = [
        run for run, commands in zip(chosen, left, strict=True) if commands and (run.name in failed) == _RETRY.value
    ]
    stages.check(todo)
    for name in record.remember(workdir, sweep, sweep.trials):
        print(f"  {sweep.path} has no run '{name}' any more; its folder stays as it is")
    decided += stages.settle({run.name for run in todo})
    now = stages.now(todo)
    todo = [
        run for run, commands in zip(now, map_runs(now, lambda run: run.remaining_commands()), strict=True) if commands
    ]
    print(f"seqpe_jax: {len(stages.runs)} runs in {workdir}, {len(failed)} failed before, {len(todo)} to do")
    if restored:
        print(f"  {len(restored)} of them from {_RESULTS.value}: {', '.join(restored)}")
    print("".join(f"  {line}\n" for line in decided), end="", flush=True)
    runs = list(stages.runs.values())
    keep = kept.keep if kept else lambda _: None
    keep(runs)
    if _EXECUTOR.value == "slurm":
        told = slurm.work_in_order(workdir, runs, todo, _JOBS.value, asked, stages)
    else:
        print(f"  {local.describe(_JOBS.value or 1)}", flush=True)
        told = local.work(runs, todo, _JOBS.value or 1, stages, keep)
    keep(stages.runs.values())
    _end(stages.now(chosen), told, stages)


def _end(runs: "list[SweepRun]", told: str | None, stages: "TrialGraph | None" = None) -> None:
    """Says what became of the runs. Raises: Failure: some failed or are left."""
    from seqpe_jax.sweeps.run import map_runs

    left, whys = map_runs(runs, lambda run: run.remaining_commands()), map_runs(runs, lambda run: run.failure())
    words = f"{left.count([])} of {len(runs)} runs finished"
    failed = [(run, why) for run, why in zip(runs, whys, strict=True) if why]
    for run, why in failed:
        print(f"  failed: {run.name}: {why}  (all of it: {run.folder}/log.txt)")
    if told:
        raise Failure(f"{told}: {words}; the same command goes on")
    obstacles = stages.obstacles(runs) if stages else []
    for line in obstacles:
        print(f"  {line}")
    if failed:
        raise Failure(f"{words}, {len(failed)} failed; --retry-failed runs those alone again")
    if obstacles:
        raise Failure(f"{words}; the others wait")
    print(
        f"{words}\nthe report: python -m seqpe_jax.report --workdir={_WORKDIR.value} --output={_WORKDIR.value}/report"
    )


def _print(sweep: "SweepFile", workdir: AnyPath, stages: "TrialGraph", chosen: "list[SweepRun]") -> None:
    """Prints the commands of runs; where some wait for others, what has been decided is recorded."""
    from seqpe_jax.sweeps import record

    if any(trial.best for trial in sweep.trials):
        record.remember(workdir, sweep, sweep.trials)
        stages.settle()
    for run in stages.now(chosen):
        if not run.trial.best:
            commands = [run.train, run.evaluate] if run.evaluated else [run.train]
            print("\n".join(shlex.join(words) for _, words in commands))
    for line in stages.obstacles(chosen):
        print(f"  {line}; then the same command prints them", file=sys.stderr)


def _status(stages: "TrialGraph", chosen: "list[SweepRun]") -> None:
    """Prints how far each run is, and what decided its fields."""
    from seqpe_jax.sweeps.run import is_locked
    from seqpe_jax.sweeps.trial_graph import in_words

    for run in chosen:
        why, decided = run.failure(), stages.recorded.get(run.name, {})
        state = (
            "finished"
            if not run.remaining_commands()
            else f"failed: {why}"
            if why
            else f"step {run.steps_done()} of {run.steps}"
        )
        if run.remaining_commands() and not why:
            state += ", at work" if is_locked(run) else ""
        waits = [f"waits for {', '.join(best.runs)}" for field, best in run.trial.best.items() if field not in decided]
        print("; ".join([f"{run.name}: {state}", *waits, *(in_words(field, one) for field, one in decided.items())]))


def _search(sweep: "SweepFile", workdir: AnyPath) -> None:
    from seqpe_jax.sweeps import local, search

    if _ONLY.value or _RETRY.value or _STATUS.value:
        raise InputError("--only, --retry-failed and --status are for runs with names, not for --executor=optuna")
    trials, jobs = search.SearchTrials(workdir, sweep), _JOBS.value or 1
    print(f"seqpe_jax: {len(trials.steps)} trials in {workdir}\n  {local.describe(jobs)}", flush=True)
    told = search.work(trials, jobs)
    for name, outcome in sorted(trials.outcomes.items()):
        print(
            f"  {name}: {outcome}" + (f", not possible: {trials.impossible[name]}" if name in trials.impossible else "")
        )
    run, words = trials.best()
    told = told or local.work([run], [run], 1)  # its evaluation is left
    _end([run], told)
    print(words)


def run_command() -> None:
    """Runs the command with the arguments of the process; never returns where it fails."""
    flags.mark_flags_as_required(["sweep", "workdir"])
    common.run(main)
