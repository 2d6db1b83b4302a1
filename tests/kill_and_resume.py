"""Kills a run at random moments until it is done, and compares it with an uninterrupted one (launch/chaos.sh).

    python -m tests.kill_and_resume --kills=200 --pair=20 --bucket=20 --folder=runs/chaos --results=docs/results/chaos.json
    python -m tests.kill_and_resume --soak=20000

The kills are spread over the whole run, a third of them aimed at the writing of a checkpoint. The same command resumes from
where it was interrupted; another --folder begins anew. Exit code 1: something was lost or differs, or the memory of a run
that is soaked grew by more than 2%.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"

from seqpe_jax.files import atomic_write
from seqpe_jax.run_dir import COMMIT_MARKER
from seqpe_jax.training.checkpoint import TMP_SUFFIX
from tests.commands import Commands, Running, free_port, hosts, train_arguments
from tests.emulator import Store, files_of
from tests.run_files import CLOCK, arrays, lines, newest

FIELDS = {
    "config": "tests/tiny_text.py:alibi",
    "checkpoint__every": 20,
    "report__every": 1,
    "eval__every": 100,
    "eval__lengths": (16,),
    "model__dropout": 0.1,
}
START_SECONDS = 4.0  # in which a start reads its state and compiles
SAVE_SECONDS = 0.03  # within which a kill follows the beginning of a save on a disk
BUCKET_SAVE_SECONDS = 0.5  # the same in a bucket
BUCKET_STEPS_SECONDS = 1.0  # between two saves in a bucket
STUCK_SECONDS = 600.0
GROWTH_PERCENT = 2.0  # of memory, beyond which a soaked run is said to leak
STEPS_PER_KILL = 30
STEPS_AFTER_KILLS = 100


class Victim:
    """A run of some processes that is killed a number of times and then let go to its end.

    Args:
      bucket: whether its folder is in a bucket, of an emulator that stores the objects as files of this machine.
    """

    def __init__(self, commands: Commands, folder: pathlib.Path, processes: int, kills: int, bucket: bool = False):
        self.commands, self.folder, self.processes, self.kills = commands, folder, processes, kills
        self.steps = STEPS_AFTER_KILLS + kills * STEPS_PER_KILL
        self.straight, self.killed = folder / "straight", folder / "killed"
        self.text, self.record = text_of(folder), folder / "kills.json"
        self.done = json.loads(self.record.read_text()) if self.record.exists() else []
        self.store, self.seconds_of_a_save = None, SAVE_SECONDS
        if bucket:
            self.store, self.seconds_of_a_save = Store(folder / "store"), BUCKET_SAVE_SECONDS
            self.killed = files_of(folder / "store") / "killed"

    def start(self, straight: bool = False) -> list[Running]:
        """Begins the run, or continues it: the one that is killed, or the uninterrupted one."""
        workdir, variables = str(self.straight if straight else self.killed), {}
        if self.store and not straight:
            workdir, variables = f"{self.store.folder}/{self.killed.name}", self.store.environment
        options, port = train_arguments(workdir, self.text, steps=self.steps, **FIELDS), free_port()
        numbers = range(self.processes) if self.processes > 1 else ()
        process_options = [hosts(port, self.processes, number) for number in numbers] or [[]]
        return [self.commands.start("train", *options, *own, **variables) for own in process_options]

    def finish(self, straight: bool = False) -> None:
        """Lets one of the two go to its end."""
        results = [self.commands.wait(one, 3600) for one in self.start(straight)]
        if any(result.code for result in results):
            sys.exit(f"the run in {self.straight if straight else self.killed} did not end well: {results}")

    def kill(self) -> None:
        """Starts the run and kills one of its processes at a random moment: of the start, of a save, or any other."""
        draw = random.Random(len(self.done))
        moment = draw.choices(("save", "start", "step"), (2, 1, 3))[0]
        reached, left = self.saved(), self.kills - len(self.done)
        rest = max(0, self.steps - STEPS_AFTER_KILLS - reached)
        wanted = reached + draw.randrange(1 + min(rest, 2 * rest // left))
        begun, began = time.time_ns(), time.monotonic()
        running = self.start()
        victim, share = draw.choice(running), draw.random()
        if moment == "start":
            while time.monotonic() < began + share * START_SECONDS and self.last_step(begun) <= reached:
                time.sleep(0.002)
        while moment != "start" and self.last_step(begun) <= wanted:
            if time.monotonic() > began + STUCK_SECONDS:
                sys.exit(f"{self.killed} does not go on: {[one.err for one in running]}")
            time.sleep(0.002)
        if moment == "save":
            while not self.saves_since(begun) and self.saved() < self.steps:
                time.sleep(0.0005)
            time.sleep(share * self.seconds_of_a_save)
        elif moment == "step" and self.store:  # others write metrics at the beginning of a save alone
            time.sleep(share * BUCKET_STEPS_SECONDS)
        os.kill(victim.process, signal.SIGKILL)
        codes = [self.commands.wait(one).code for one in running]
        if -signal.SIGKILL not in codes:
            sys.exit(f"{self.killed} ended before it was killed: {[one.err for one in running]}")
        inside = self.saves_since(begun)
        self.done.append({"moment": moment, "inside_a_save": inside, "saved": self.saved()})
        atomic_write(self.record, json.dumps(self.done))
        print(f"{self.folder.name}: kill {len(self.done)} of {self.kills}, {self.done[-1]}", flush=True)

    def last_step(self, begun: int) -> int:
        """Returns the last step in the killed run's metrics since a time in nanoseconds, or 0."""
        metrics = self.killed / "metrics.jsonl"
        with contextlib.suppress(FileNotFoundError):
            if metrics.stat().st_mtime_ns > begun:  # else an earlier start wrote it, maybe up to a step that was lost
                return _last_step(metrics)
        return 0

    def saved(self) -> int:
        """The last step of the killed run whose checkpoint is finished."""
        if not self.store:
            return newest(self.killed)
        return max((int(path.parent.name) for path in self.killed.glob(f"checkpoints/*/{COMMIT_MARKER}")), default=0)

    def saves_since(self, begun: int) -> bool:
        """Returns whether a save that began after a time in nanoseconds was under way when the run was killed."""
        folders = list((self.killed / "checkpoints").glob("*"))
        finished = self.saved()
        for folder in folders:
            step = folder.name.removesuffix(TMP_SUFFIX)
            with contextlib.suppress(FileNotFoundError):  # it has just got its name
                if step.isdecimal() and int(step) > finished:  # earlier kills have left some, too
                    if any(path.stat().st_mtime_ns > begun for path in (folder, *folder.rglob("*"))):
                        return True
        return False

    def run(self) -> dict[str, int]:
        """Does the runs and kills that are left, and returns how the two runs compare."""
        if newest(self.straight) < self.steps:
            shutil.rmtree(self.straight, ignore_errors=True)
            self.finish(straight=True)
        while len(self.done) < self.kills and self.saved() < self.steps:
            self.kill()
        self.finish()
        if self.store:
            self.store.close()
        inside = sum(one["inside_a_save"] for one in self.done)
        about = {
            "processes": self.processes,
            "steps": self.steps,
            "kills": len(self.done),
            "kills_inside_a_save": inside,
        }
        return about | differences(self.straight, self.killed, self.steps)


def text_of(folder: pathlib.Path) -> pathlib.Path:
    """Writes the text that is trained on."""
    atomic_write(folder / "text.txt", "".join(f"{number} times {number} is {number**2}\n" for number in range(1000)))
    return folder / "text.txt"


def differences(straight: pathlib.Path, killed: pathlib.Path, steps: int) -> dict[str, int]:
    """Returns how many lines of metrics and arrays of the last state there are, and how many are not bit-equal."""
    expected, found = ([_key(line) for line in lines(one)] for one in (straight, killed))
    trained = [line["step"] for line in lines(killed) if "train/loss" in line]
    theirs, ours = arrays(straight, steps), arrays(killed, steps)
    return {
        "lines": len(expected),
        "lines_missing": len(set(expected) - set(found)),
        "lines_that_differ_or_are_doubled": len(found) - len(set(found) & set(expected)),
        "steps_missing": len(set(range(1, steps + 1)) - set(trained)),
        "steps_doubled": len(trained) - len(set(trained)),
        "arrays": len(theirs),
        "arrays_that_differ": sum(
            _bits(ours.get(name)) != _bits(theirs.get(name)) for name in ours.keys() | theirs.keys()
        ),
    }


def _key(line: dict) -> str:
    """Returns a line of metrics without its times, floats with all their digits."""
    return json.dumps({name: value for name, value in line.items() if name not in CLOCK}, sort_keys=True)


def _bits(array) -> tuple | None:
    return None if array is None else (array.dtype, array.shape, array.tobytes())


def wrong(result: dict[str, float]) -> bool:
    """Returns whether something was lost or differs, or memory grew."""
    lost = sum(count for name, count in result.items() if name.endswith(("missing", "doubled", "differ")))
    return bool(lost or result.get("exit_code") or result.get("growth_percent", 0) > GROWTH_PERCENT)


def soak(commands: Commands, folder: pathlib.Path, steps: int) -> dict[str, float]:
    """Returns the resident memory of a run of so many steps, in MiB, after a quarter of them and at their end.

    Each is the median over the twentieth of the steps before, for an evaluation and a save take some memory for a while.
    """
    shutil.rmtree(folder, ignore_errors=True)
    fields = FIELDS | {"checkpoint__every": 100, "report__every": 10, "eval__batch_tokens": 256}
    running = commands.start("train", *train_arguments(folder / "run", text_of(folder), steps=steps, **fields))
    status, metrics = pathlib.Path(f"/proc/{running.process}/status"), folder / "run" / "metrics.jsonl"
    held: dict[int, list[float]] = {steps // 4: [], steps: []}
    while (mebibytes := _resident_memory(status)) is not None:
        step = _last_step(metrics) if metrics.exists() else 0
        for end, values in held.items():
            if end - steps // 20 <= step < end:
                values.append(mebibytes)
        time.sleep(0.1)
    early, late = (statistics.median(values) for values in held.values())
    return {
        "steps": steps,
        "exit_code": commands.wait(running).code,
        "MiB_after_a_quarter": round(early, 1),
        "MiB_at_the_end": round(late, 1),
        "growth_percent": round(100 * (late / early - 1), 2),
    }


def _resident_memory(status: pathlib.Path) -> float | None:
    """Returns the resident memory of a process in MiB, None when it has ended."""
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmRSS")]
    return int(lines[0].split()[1]) / 1024 if lines else None


def _last_step(metrics: pathlib.Path) -> int:
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4000))
        last_lines = file.read().splitlines(keepends=True)[-3:]
    complete = [line for line in last_lines if line.startswith(b"{") and line.endswith(b"}\n")]
    return json.loads(complete[-1])["step"] if complete else 0


def table(results: dict[str, dict[str, float]]) -> str:
    """Returns the results as a markdown table."""
    names = list(dict.fromkeys(name for result in results.values() for name in result))
    rows = [["what", *results]] + [
        [name.replace("_", " "), *(f"{one.get(name, '-')}" for one in results.values())] for name in names
    ]
    rows.insert(1, ["---", *["---:"] * len(results)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    """Does what the options say; returns the exit code."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=200, help="of a run of one process")
    options.add_argument("--pair", type=int, default=20, help="kills of a run of two processes")
    options.add_argument(
        "--bucket", type=int, default=20, help="kills of a run of one process whose folder is in a bucket"
    )
    options.add_argument(
        "--soak", type=int, default=0, help="steps of a run whose memory is looked at, instead of kills"
    )
    options.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/chaos"))
    options.add_argument("--results", type=pathlib.Path, help="JSON file to write")
    given = options.parse_args()
    folder, results = given.folder.absolute(), {}
    commands = Commands(folder / "cache")

    def keep(name: str, result: dict[str, float]) -> None:
        results[name] = result
        if given.results:
            stored = json.loads(given.results.read_text()) if given.results.exists() else {}
            atomic_write(given.results, json.dumps(stored | results, indent=1) + "\n")

    if given.soak:
        keep("soak", soak(commands, folder / "soak", given.soak))
    for name, processes, kills in (
        ("one process", 1, given.kills),
        ("two processes", 2, given.pair),
        ("in a bucket", 1, given.bucket),
    ):
        if kills and not given.soak:
            where = folder / name.replace(" ", "_")
            keep(name, Victim(commands, where, processes, kills, bucket=name == "in a bucket").run())
    commands.close()
    print(table(results))
    return int(any(map(wrong, results.values())))


if __name__ == "__main__":
    sys.exit(main())
