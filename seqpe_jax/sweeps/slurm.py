"""Execution of a sweep's runs as the tasks of Slurm job arrays, through submitit."""

import contextlib
import getpass
import json
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from seqpe_jax.errors import Failure, InputError, suggest
from seqpe_jax.files import atomic_write, parse_json
from seqpe_jax.sweeps.local import FOLDER_SECONDS, POLL_SECONDS, ProgressView
from seqpe_jax.sweeps.run import Locked, RunProcess, SweepRun, is_locked, outcomes_of
from seqpe_jax.sweeps.trial_graph import TrialGraph

FOLDER = "slurm"  # in the sweep's folder: scripts, logs and results of submitit
JOBS_FILE = "jobs.json"  # there: run name -> job id
MAX_TIMEOUTS = 1000  # times that a run may reach its job's time limit; each time it resumes from its last checkpoint
DEFAULT_MINUTES = 24 * 60  # time limit of a job without --slurm=time=...; submitit's own default is 5


class Job:
    """Callable that a task of the array executes: the commands of a run."""

    def __init__(self, run: SweepRun):
        self._run, self._process = run, None

    def __call__(self) -> str:
        """Returns the outcome of the run; Slurm's SIGTERM to all processes of a job is no failure of the run."""
        signal.signal(signal.SIGTERM, lambda *_: self._process and self._process.stop(send=False))
        while self._run.remaining_commands() and not (self._process and self._process.stop_requested):
            try:
                self._process = RunProcess(self._run)
                break
            except Locked:  # the job that this one continues still saves
                time.sleep(FOLDER_SECONDS)
        outcome = None if self._process else "finished"
        while outcome is None:
            time.sleep(POLL_SECONDS)
            outcome = self._process.poll()
        return outcome

    def checkpoint(self, *_: Any) -> Any:
        """Lets the run save before its job ends; returns the submission with which submitit requeues it."""
        import submitit

        if self._process is not None:
            self._process.stop()
            while self._process.poll() is None:
                time.sleep(POLL_SECONDS)
        return submitit.helpers.DelayedSubmission(Job(self._run))


def parameters(items: Sequence[str]) -> dict[str, Any]:
    """Returns the options of --slurm under submitit's names.

    Args:
      items: "KEY=VALUE" each.

    Raises:
      InputError: another form or key; submitit or Slurm is missing.
    """
    submitit = _submitit()
    if not (shutil.which("sbatch") and shutil.which("squeue")):
        raise InputError(
            "--executor=slurm: there is no sbatch or squeue on this machine: run it where jobs are submitted"
        )
    known = submitit.SlurmExecutor._valid_parameters() - {"array_parallelism"}  # that is --jobs
    options = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not value:
            raise InputError(f"--slurm takes KEY=VALUE,KEY=VALUE, got '{item}': e.g. --slurm=partition=gpu,time=600")
        if key not in known:
            raise InputError(f"--slurm: unknown key '{key}'.{suggest(key, known)}")
        options[f"slurm_{key}"] = int(value) if value.isdecimal() else value
    return options


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise InputError("--executor=slurm needs submitit: pip install submitit") from error
    return submitit


def execute_array(
    workdir: pathlib.Path,
    runs: Sequence[SweepRun],
    todo: Sequence[SweepRun],
    jobs: int | None,
    options: Mapping[str, Any],
    *,
    cluster: str = "slurm",
) -> str | None:
    """Submits the runs that are not in the queue as one array, and watches until all have ended.

    Their outcomes are in their folders; a run whose job left the queue without a result has failed.

    Args:
      workdir: folder of the sweep.
      runs: all runs of the sweep, for the progress line.
      todo: runs to execute, without open fields.
      jobs: tasks of the array at a time; None = Slurm's choice.
      options: see `parameters`.
      cluster: "slurm", or submitit's "local" for a test on this machine.

    Returns:
      Name of the signal that ended the watch, or None; the jobs stay in the queue.

    Raises:
      InputError: Slurm refuses the array.
      Failure: the queue cannot be read.
    """
    folder = workdir / FOLDER
    names = {run.name for run in todo}
    outcomes = outcomes_of(run for run in runs if run.name not in names)
    job_ids = _read_job_ids(folder)
    queued = _queued_jobs() if cluster == "slurm" else set()
    new = [run for run in todo if job_ids.get(run.name) not in queued and not is_locked(run)]
    submitted = _submit(folder, new, jobs, options, cluster) if new else {}
    job_ids |= {name: job.job_id for name, job in submitted.items()}
    atomic_write(folder / JOBS_FILE, json.dumps(job_ids, indent=1) + "\n")
    numbers = sorted({job_ids[name].partition("_")[0] for name in names if name in job_ids})
    print(f"  {len(new)} submitted, {len(todo) - len(new)} queued before; jobs: {' '.join(numbers)}", flush=True)

    signals: list[str] = []
    pending = list(todo)
    with _collect_signals(signals), contextlib.closing(ProgressView({run.name: run.steps for run in runs})) as view:
        while pending and not signals:
            time.sleep(FOLDER_SECONDS)
            at_work = [run for run in pending if is_locked(run)]
            queued = (
                _queued_jobs() if cluster == "slurm" else {job.job_id for job in submitted.values() if not job.done()}
            )
            gone = [run for run in pending if run not in at_work and job_ids.get(run.name) not in queued]
            for run in gone:
                if run.remaining_commands() and not run.failure():
                    run.mark_failed(
                        f"job {job_ids.get(run.name)} left the queue without a result; its own log is in {folder}"
                    )
            outcomes |= outcomes_of(gone)
            pending = [run for run in pending if run not in gone]
            view.show(outcomes, at_work)
    if signals:
        print(f"  the jobs stay in the queue (scancel {' '.join(numbers)} ends them)")
    return signals[0] if signals else None


def execute(
    workdir: pathlib.Path,
    runs: Sequence[SweepRun],
    todo: Sequence[SweepRun],
    jobs: int | None,
    options: Mapping[str, Any],
    graph: TrialGraph,
    *,
    cluster: str = "slurm",
) -> str | None:
    """Executes runs in one array after another: runs with open fields when the array that decides them has ended.

    Args:
      graph: decides open fields. The other arguments are those of `execute_array`.

    Returns:
      Name of the signal that ended the watch, or None.
    """
    waiting = list(todo)
    while True:
        ready = [run for run in waiting if not run.trial.best]
        waiting = [run for run in waiting if run.trial.best]
        stop_signal = execute_array(workdir, runs, ready, jobs, options, cluster=cluster)
        if stop_signal or not waiting:
            return stop_signal
        for line in graph.decide({run.name for run in waiting}):
            print(f"  {line}", flush=True)
        waiting = graph.updated(waiting)
        if all(run.trial.best for run in waiting):
            return None


def _submit(
    folder: pathlib.Path, runs: Sequence[SweepRun], jobs: int | None, options: Mapping[str, Any], cluster: str
) -> dict[str, Any]:
    """Submits an array; returns run name -> submitit's job."""
    submitit = _submitit()
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=MAX_TIMEOUTS)
    try:
        executor.update_parameters(
            name="seqpe_jax", timeout_min=DEFAULT_MINUTES, slurm_array_parallelism=jobs or len(runs), **options
        )
        with executor.batch():
            submitted = [executor.submit(Job(run)) for run in runs]
    except (submitit.core.utils.FailedJobError, TypeError, ValueError) as error:
        raise InputError(f"Slurm does not take the array: {error}") from error
    return dict(zip((run.name for run in runs), submitted, strict=True))


def _queued_jobs() -> set[str]:
    """Returns the ids of this user's jobs that wait or run, each task of an array by itself."""
    result = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i", f"--user={getpass.getuser()}"],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise Failure(
            f"squeue: {result.stderr.strip()}; the jobs stay in the queue, the same command watches them again"
        )
    return set(result.stdout.split())


def _read_job_ids(folder: pathlib.Path) -> dict[str, str]:
    try:
        job_ids = parse_json((folder / JOBS_FILE).read_text())
        if not isinstance(job_ids, dict):
            raise ValueError("it is no object")
        return job_ids
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"{folder / JOBS_FILE} is damaged ({error}): remove it when squeue shows no jobs") from error


@contextlib.contextmanager
def _collect_signals(names: list[str]) -> Iterator[None]:
    """Context in which the names of SIGINT and SIGTERM are appended to a list when they arrive."""
    before = {
        number: signal.signal(number, lambda number, _: names.append(signal.Signals(number).name))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
