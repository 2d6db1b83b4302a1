"""Trains and evaluates the runs of a sweep file; executed again, it resumes an interrupted sweep.

python -m seqpe_jax.sweep --sweep=configs/sweeps/extrapolation.py --workdir=runs/extrapolation --jobs=2
python -m seqpe_jax.sweep --sweep=configs/sweeps/extrapolation.py --workdir=runs/extrapolation --executor=print
python -m seqpe_jax.sweep --sweep=configs/sweeps/search.py --workdir=runs/search --executor=optuna --jobs=2

Executors: local (this machine), slurm (an array of jobs; needs submitit), print (the commands, for other schedulers),
optuna (the file's SEARCH over ranges; needs Optuna). Each run has WORKDIR/NAME, with its commands' output in log.txt.
--results=FILE.json also writes the results of finished runs into that small file, with which the sweep resumes where their
folders are missing, such as on another machine. A run with a field that others decide (`BestOf`, `tune_then_repeat`) starts
when those have ended; --status shows the decisions and the progress of each run, and runs nothing.
"""

import shlex
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from seqpe_jax.cli import common
from seqpe_jax.errors import Failure, InputError, suggest
from seqpe_jax.files import AnyPath, as_path, is_remote

if TYPE_CHECKING:
    from seqpe_jax.sweeps.results_cache import ResultsCache
    from seqpe_jax.sweeps.run import SweepRun
    from seqpe_jax.sweeps.spec import SweepFile
    from seqpe_jax.sweeps.trial_graph import TrialGraph

_SWEEP = common.define_path(
    "sweep", "sweep file: CONFIG, and runs() or SEARCH (see configs/sweeps)", local="sweep files are Python"
)
_WORKDIR = common.define_path("workdir", "folder of the sweep, with a folder for each run", writes="folder")
_RESULTS = common.define_path("results", "JSON file of finished runs' results; read first, then updated", writes="file")
_EXECUTOR = flags.DEFINE_enum("executor", "local", ["local", "slurm", "print", "optuna"], "who executes the commands")
_JOBS = flags.DEFINE_integer("jobs", None, "runs at a time (default: 1; slurm: as many as it has room for)", 1, 4096)
_ONLY = flags.DEFINE_list("only", [], "names of the runs to execute; default: all")
_RETRY = flags.DEFINE_bool("retry-failed", False, "execute the failed runs alone, once more")
_STATUS = flags.DEFINE_bool("status", False, "show the progress of each run, with those in --results; run nothing")
_SLURM = flags.DEFINE_list("slurm", [], "with slurm: options of a job, e.g. partition=gpu,gpus_per_node=1,time=600")


def main() -> None:
    """Checks the options, and executes, prints or shows the runs."""
    from seqpe_jax.sweeps import slurm, spec
    from seqpe_jax.sweeps.trial_graph import TrialGraph

    sweep, workdir, executor = spec.read_sweep_file(_SWEEP.value), as_path(_WORKDIR.value), _EXECUTOR.value
    if is_remote(workdir) and executor in ("slurm", "optuna"):
        raise InputError(
            f"--executor={executor} appends to files in --workdir, which a bucket does not allow: "
            "give a folder that all hosts share as --workdir, or use --executor=local or print"
        )
    if _SLURM.value and executor != "slurm":
        raise InputError("--slurm is for --executor=slurm")
    if _RESULTS.value and executor in ("print", "optuna"):
        raise InputError("--results is for runs that are executed, by --executor=local or slurm")
    if executor == "optuna":
        _search(sweep, workdir)
        return
    if not sweep.trials:
        raise InputError(f"{sweep.path} has a SEARCH, but no runs(): use --executor=optuna")
    slurm_options = slurm.parameters(_SLURM.value) if executor == "slurm" else {}
    graph = TrialGraph(workdir, sweep.trials)
    for name in _ONLY.value:
        if name not in graph.runs:
            raise InputError(f"--only: no run is named '{name}'.{suggest(name, graph.runs)}")
    chosen = [run for run in graph.runs.values() if run.name in (_ONLY.value or graph.runs)]
    if _STATUS.value:
        if _RESULTS.value:
            _restore(sweep, workdir, graph)[0].update(graph.runs.values())
        _show_status(graph, graph.updated(chosen))
    elif executor == "print":
        _print_commands(sweep, workdir, graph, chosen)
    else:
        _execute(sweep, workdir, graph, chosen, slurm_options)


def _execute(
    sweep: "SweepFile", workdir: AnyPath, graph: "TrialGraph", chosen: "list[SweepRun]", slurm_options: dict[str, Any]
) -> None:
    """Executes chosen runs. Raises: InputError: the sweep file has changed; Failure: see `_report_outcomes`."""
    from seqpe_jax.sweeps import local, slurm
    from seqpe_jax.sweeps.run import map_runs
    from seqpe_jax.sweeps.trial_graph import record_trials

    cache, restored, decided = _restore(sweep, workdir, graph) if _RESULTS.value else (None, [], [])
    failures = map_runs(graph.runs.values(), lambda run: run.failure())
    failed = {run.name for run, why in zip(graph.runs.values(), failures, strict=True) if why}
    todo = [run for run in _unfinished(chosen) if (run.name in failed) == _RETRY.value]
    graph.check_selection(todo)
    for name in record_trials(workdir, sweep, sweep.trials):
        print(f"  {sweep.path} has no run '{name}' any more; its folder stays as it is")
    decided += graph.decide({run.name for run in todo})
    todo = _unfinished(graph.updated(todo))
    print(f"seqpe_jax: {len(graph.runs)} runs in {workdir}, {len(failed)} failed before, {len(todo)} to do")
    if restored:
        print(f"  {len(restored)} of them from {_RESULTS.value}: {', '.join(restored)}")
    print("".join(f"  {line}\n" for line in decided), end="", flush=True)
    runs = list(graph.runs.values())
    update_cache = cache.update if cache else lambda _: None
    update_cache(runs)
    if _EXECUTOR.value == "slurm":
        stop_signal = slurm.execute(workdir, runs, todo, _JOBS.value, slurm_options, graph)
    else:
        print(f"  {local.describe(_JOBS.value or 1)}", flush=True)
        stop_signal = local.execute(runs, todo, _JOBS.value or 1, graph, update_cache)
    update_cache(graph.runs.values())
    _report_outcomes(graph.updated(chosen), stop_signal, graph)


def _restore(sweep: "SweepFile", workdir: AnyPath, graph: "TrialGraph") -> "tuple[ResultsCache, list[str], list[str]]":
    """Restores runs from the results file; returns it, their names, and lines on decisions. Raises: InputError."""
    from seqpe_jax.sweeps.results_cache import ResultsCache
    from seqpe_jax.sweeps.trial_graph import record_trials

    cache = ResultsCache(_RESULTS.value, sweep.trials)
    record_trials(workdir, sweep, sweep.trials)
    restored, decided = cache.restore(graph)
    return cache, restored, decided


def _unfinished(runs: "list[SweepRun]") -> "list[SweepRun]":
    from seqpe_jax.sweeps.run import map_runs

    remaining = map_runs(runs, lambda run: run.remaining_commands())
    return [run for run, commands in zip(runs, remaining, strict=True) if commands]


def _report_outcomes(runs: "list[SweepRun]", stop_signal: str | None, graph: "TrialGraph | None" = None) -> None:
    """Prints the outcomes of runs. Raises: Failure: some failed or are unfinished."""
    from seqpe_jax.sweeps.run import map_runs

    failures = map_runs(runs, lambda run: run.failure())
    summary = f"{len(runs) - len(_unfinished(runs))} of {len(runs)} runs finished"
    for run, why in zip(runs, failures, strict=True):
        if why:
            print(f"  failed: {run.name}: {why}  (complete output: {run.folder}/log.txt)")
    if stop_signal:
        raise Failure(f"{stop_signal}: {summary}; the same command resumes the sweep")
    blocked_runs = graph.blocked_runs(runs) if graph else []
    for line in blocked_runs:
        print(f"  {line}")
    if any(failures):
        count = len(failures) - failures.count(None)
        raise Failure(f"{summary}, {count} failed; --retry-failed executes those alone again")
    if blocked_runs:
        raise Failure(f"{summary}; the others wait")
    print(
        f"{summary}\nthe report: python -m seqpe_jax.report --workdir={_WORKDIR.value} --output={_WORKDIR.value}/report"
    )


def _print_commands(sweep: "SweepFile", workdir: AnyPath, graph: "TrialGraph", chosen: "list[SweepRun]") -> None:
    """Prints the commands of runs; decisions on open fields are recorded."""
    from seqpe_jax.sweeps.trial_graph import record_trials

    if any(trial.best for trial in sweep.trials):
        record_trials(workdir, sweep, sweep.trials)
        graph.decide()
    for run in graph.updated(chosen):
        if not run.trial.best:
            commands = [run.train, run.evaluate] if run.evaluated else [run.train]
            print("\n".join(shlex.join(words) for _, words in commands))
    for line in graph.blocked_runs(chosen):
        print(f"  {line}; then the same command prints them", file=sys.stderr)


def _show_status(graph: "TrialGraph", chosen: "list[SweepRun]") -> None:
    """Prints the progress of each run and the decisions on its fields."""
    from seqpe_jax.sweeps.run import is_locked
    from seqpe_jax.sweeps.trial_graph import describe_decision

    for run in chosen:
        why, decisions = run.failure(), graph.decisions.get(run.name, {})
        unfinished = bool(run.remaining_commands())
        state = f"failed: {why}" if why else f"step {run.steps_done()} of {run.steps}" if unfinished else "finished"
        if unfinished and not why and is_locked(run):
            state += ", at work"
        waits = [
            f"waits for {', '.join(best.runs)}" for field, best in run.trial.best.items() if field not in decisions
        ]
        decided = [describe_decision(field, one) for field, one in decisions.items()]
        print("; ".join([f"{run.name}: {state}", *waits, *decided]))


def _search(sweep: "SweepFile", workdir: AnyPath) -> None:
    """Executes the trials of a search, and evaluates the best one."""
    from seqpe_jax.sweeps import local, search

    if _ONLY.value or _RETRY.value or _STATUS.value:
        raise InputError("--only, --retry-failed and --status are for runs with names, not for --executor=optuna")
    trials, jobs = search.SearchTrials(workdir, sweep), _JOBS.value or 1
    print(f"seqpe_jax: {len(trials.steps)} trials in {workdir}\n  {local.describe(jobs)}", flush=True)
    stop_signal = search.execute(trials, jobs)
    for name, outcome in sorted(trials.outcomes.items()):
        why = f", not possible: {trials.invalid[name]}" if name in trials.invalid else ""
        print(f"  {name}: {outcome}{why}")
    run, line = trials.best()
    stop_signal = stop_signal or local.execute([run], [run], 1)  # its evaluation
    _report_outcomes([run], stop_signal)
    print(line)


def run_command() -> None:
    """Runs the command with the arguments of the process, and exits with its code on an error."""
    flags.mark_flags_as_required(["sweep", "workdir"])
    common.run(main)
