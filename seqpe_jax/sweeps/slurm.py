"""Runs of a sweep as the tasks of one Slurm array, through submitit."""

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
from seqpe_jax.sweeps.local import LOOK, TURN, ProgressView, outcomes_of
from seqpe_jax.sweeps.run import Locked, RunProcess, SweepRun, is_locked
from seqpe_jax.sweeps.trial_graph import TrialGraph

FOLDER = "slurm"  # in the sweep's folder: scripts, logs and results of submitit
JOBS = "jobs.json"  # there: run -> its job
REQUEUED = 1000  # times that a run may reach its job's time limit; each goes on from its last checkpoint
MINUTES = 24 * 60  # of a job, where --slurm=time=... does not say it; submitit's own default is 5


class Job:
    """What a task of the array does: the commands of a run."""

    def __init__(self, run: SweepRun):
        self._run, self._attempt = run, None

    def __call__(self) -> str:
        """Returns how the run ended; Slurm's SIGTERM to all processes of a job is no failure of the run."""
        signal.signal(signal.SIGTERM, lambda *_: self._attempt and self._attempt.stop(send=False))
        while self._run.remaining_commands() and not (self._attempt and self._attempt.stop_requested):
            try:
                self._attempt = RunProcess(self._run)
                break
            except Locked:  # the job before this one, requeued, still saves
                time.sleep(LOOK)
        outcome = None if self._attempt else "finished"
        while outcome is None:
            time.sleep(TURN)
            outcome = self._attempt.poll()
        return outcome

    def checkpoint(self, *_: Any) -> Any:
        """Lets the run save when its job is about to end, and returns what submitit queues again."""
        import submitit

        if self._attempt is not None:
            self._attempt.stop()
            while self._attempt.poll() is None:
                time.sleep(TURN)
        return submitit.helpers.DelayedSubmission(Job(self._run))


def parameters(items: Sequence[str]) -> dict[str, Any]:
    """Returns what --slurm=KEY=VALUE,... asks of Slurm, in submitit's names.

    Raises:
      InputError: not such a list; submitit or Slurm is not here.
    """
    submitit = _submitit()
    if not (shutil.which("sbatch") and shutil.which("squeue")):
        raise InputError(
            "--executor=slurm: there is no sbatch or squeue on this machine: run it where jobs are submitted"
        )
    known = submitit.SlurmExecutor._valid_parameters() - {"array_parallelism"}  # that is --jobs
    found = {}
    for item in items:
        key, given, value = item.partition("=")
        if not given or not value:
            raise InputError(f"--slurm takes KEY=VALUE,KEY=VALUE, got '{item}': e.g. --slurm=partition=gpu,time=600")
        if key not in known:
            raise InputError(f"--slurm: unknown key '{key}'.{suggest(key, known)}")
        found[f"slurm_{key}"] = int(value) if value.isdecimal() else value
    return found


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise InputError("--executor=slurm needs submitit: pip install submitit") from error
    return submitit


def work(
    workdir: pathlib.Path,
    runs: Sequence[SweepRun],
    todo: Sequence[SweepRun],
    jobs: int | None,
    asked: Mapping[str, Any],
    *,
    cluster: str = "slurm",
) -> str | None:
    """Submits the runs to do that are not in the queue, and watches until all have ended.

    What became of a run is in its folder; one whose job left the queue without a word has failed.

    Args:
      runs: all of the sweep, for the view; todo: those to do.
      jobs: tasks of the array that run at once, None = as Slurm sees fit; asked: see `parameters`.
      cluster: "slurm", or submitit's "local" for a trial on this machine.

    Returns:
      The name of the signal that ended the watch, None without one; the jobs stay in the queue.

    Raises:
      InputError: Slurm refuses the array.
      Failure: the queue cannot be read.
    """
    folder = workdir / FOLDER
    names = {run.name for run in todo}
    outcomes = outcomes_of([run for run in runs if run.name not in names])
    recorded = _recorded(folder)
    queued = _queued() if cluster == "slurm" else set()
    new = [run for run in todo if recorded.get(run.name) not in queued and not is_locked(run)]
    own = _submit(folder, new, jobs, asked, cluster) if new else {}
    recorded |= {name: job.job_id for name, job in own.items()}
    _record(folder, recorded)
    numbers = sorted({recorded[name].partition("_")[0] for name in names if name in recorded})
    print(f"  {len(new)} submitted, {len(todo) - len(new)} queued before; jobs: {' '.join(numbers)}", flush=True)

    stop_signal: list[str] = []
    pending = list(todo)
    with _noted(stop_signal), contextlib.closing(ProgressView({run.name: run.steps for run in runs})) as view:
        while pending and not stop_signal:
            time.sleep(LOOK)
            at_work = [run for run in pending if is_locked(run)]
            queued = _queued() if cluster == "slurm" else {job.job_id for job in own.values() if not job.done()}
            gone = [run for run in pending if run not in at_work and recorded.get(run.name) not in queued]
            for run in gone:
                if run.remaining_commands() and not run.failure():
                    run.fail(f"job {recorded.get(run.name)} left the queue without a word; its own log is in {folder}")
            outcomes |= outcomes_of(gone)
            pending = [run for run in pending if run not in gone]
            view.show(outcomes, at_work)
    if stop_signal:
        print(f"  the jobs stay in the queue (scancel {' '.join(numbers)} ends them)")
    return stop_signal[0] if stop_signal else None


def work_in_order(
    workdir: pathlib.Path,
    runs: Sequence[SweepRun],
    todo: Sequence[SweepRun],
    jobs: int | None,
    asked: Mapping[str, Any],
    stages: TrialGraph,
    *,
    cluster: str = "slurm",
) -> str | None:
    """Works runs off as `work` does, in one array each: those that wait for others when the array before has ended."""
    waiting = list(todo)
    while True:
        ready = [run for run in waiting if not run.trial.best]
        waiting = [run for run in waiting if run.trial.best]
        stop_signal = work(workdir, runs, ready, jobs, asked, cluster=cluster)
        if stop_signal or not waiting:
            return stop_signal
        for line in stages.settle({run.name for run in waiting}):
            print(f"  {line}", flush=True)
        waiting = stages.now(waiting)
        if all(run.trial.best for run in waiting):
            return None


def _submit(
    folder: pathlib.Path, runs: Sequence[SweepRun], jobs: int | None, asked: Mapping[str, Any], cluster: str
) -> dict:
    submitit = _submitit()
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=REQUEUED)
    try:
        executor.update_parameters(
            name="seqpe_jax", timeout_min=MINUTES, slurm_array_parallelism=jobs or len(runs), **asked
        )
        with executor.batch():
            submitted = [executor.submit(Job(run)) for run in runs]
    except (submitit.core.utils.FailedJobError, TypeError, ValueError) as error:
        raise InputError(f"Slurm does not take the array: {error}") from error
    return dict(zip((run.name for run in runs), submitted, strict=True))


def _queued() -> set[str]:
    """Returns this user's jobs that wait or run, tasks of arrays one by one."""
    found = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i", f"--user={getpass.getuser()}"],
        capture_output=True,
        text=True,
    )
    if found.returncode:
        raise Failure(
            f"squeue: {found.stderr.strip()}; the jobs stay in the queue, the same command watches them again"
        )
    return set(found.stdout.split())


def _recorded(folder: pathlib.Path) -> dict[str, str]:
    try:
        jobs = parse_json((folder / JOBS).read_text())
        if not isinstance(jobs, dict):
            raise ValueError("it is no object")
        return jobs
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"{folder / JOBS} is damaged ({error}): remove it when squeue shows no jobs") from error


def _record(folder: pathlib.Path, jobs: Mapping[str, str]) -> None:
    atomic_write(folder / JOBS, json.dumps(jobs, indent=1) + "\n")


@contextlib.contextmanager
def _noted(stop_signal: list[str]) -> Iterator[None]:
    """Puts the names of SIGINT and SIGTERM into a list when they come."""
    before = {
        number: signal.signal(number, lambda number, _: stop_signal.append(signal.Signals(number).name))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
