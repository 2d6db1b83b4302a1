"""The start of several processes: options, JAX's detection, the roll call, and what is said when it fails."""

import ctypes
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from seqpe_jax.distributed import processes, roll_call
from seqpe_jax.errors import Failure, InputError

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


CLUSTERS = (
    *SLURM,
    "OMPI_MCA_orte_hnp_uri",
    "PRTE_MCA_prte_base_help_aggregate",
    "KUBERNETES_SERVICE_HOST",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
    "JAX_COORDINATOR_ADDRESS",
    "JAX_COORDINATOR_PORT",
)


class Called(Exception):
    """Stands for what would open a connection."""


@pytest.fixture(autouse=True)
def nobody_around(monkeypatch):
    for name in CLUSTERS:
        monkeypatch.delenv(name, raising=False)

    def called(*arguments):
        raise Called(*arguments[:2])

    monkeypatch.setattr(roll_call, "Coordinator", called)
    monkeypatch.setattr(roll_call, "Worker", called)


@pytest.mark.parametrize(
    "given", [{}, {"num_processes": 1}, {"coordinator": "a:99", "num_processes": 1, "process_id": 0}]
)
def test_alone_nothing_is_waited_for(given, monkeypatch):
    monkeypatch.setattr(socket, "socket", Called)
    processes.initialize({}, **given)
    assert not processes.is_multiprocess() and processes.is_main_process() and not processes.reached_preemption()
    assert processes.broadcast_from_main(True) and not processes.broadcast_from_main(False)
    processes.barrier()
    processes.shutdown()


@pytest.mark.parametrize(
    "given, words",
    [
        ({"coordinator": "a:99"}, "--num-processes and --process-id is not given"),
        ({"num_processes": 2}, "--coordinator and --process-id is not given"),
        ({"num_processes": 2, "process_id": 2, "coordinator": "a:99"}, "--process-id=2 must be 0 to 1"),
        ({"num_processes": 2, "process_id": 1, "coordinator": "a"}, "--coordinator=a must be HOST:PORT"),
        ({"num_processes": 2, "process_id": 1, "coordinator": "a:70000"}, "--coordinator=a:70000 must be HOST:PORT"),
    ],
)
def test_options_that_contradict_each_other(given, words):
    with pytest.raises(InputError, match=words):
        processes.initialize({}, **given)


def test_slurm_names_the_coordinator(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Called) as called:
        processes.initialize({})
    # Of this job's nodes the first coordinates; JAX's port for job 7 is the seventh of its range, the roll call below it.
    assert called.value.args == (("node003", 61440 + 7 - 1), 5)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    processes.initialize({})
    assert not processes.is_multiprocess()


def test_a_cluster_that_cannot_be_read(monkeypatch):
    for name, value in (SLURM | {"SLURM_NTASKS": "many"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Failure, match="could not be read.*--num-processes=1"):
        processes.initialize({})
    for name in SLURM:
        monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:99")
    with pytest.raises(InputError, match="JAX_COORDINATOR_ADDRESS is set, but"):
        processes.initialize({})


def test_numbers_and_differences_in_words():
    assert roll_call.format_ranges([7, 1, 3, 4, 5]) == "1, 3-5, 7"
    facts = {0: {"steps": "6", "seed": "0"}, 1: {"steps": "6", "seed": "0"}, 2: {"steps": "7", "seed": "0", "new": "x"}}
    assert roll_call.differences(facts) == [
        "new: absent (process 0-1), x (process 2)",
        "steps: 6 (process 0-1), 7 (process 2)",
    ]
    assert roll_call.differences({0: {"a": "1"}, 1: {"a": "1"}}) == []


class Left(BaseException):
    """Stands for the end of a process, which here is a thread."""


@pytest.fixture
def gather(monkeypatch):
    """Returns a function that runs a coordinator and workers as threads: -> (the coordinator's error or None, exit codes).

    `work` is what each does after the start: (its end of the connections, its number) -> any.
    """
    monkeypatch.undo()
    port = 20000 + (hash(time.monotonic_ns()) % 10000)
    left = {}

    def leave(code):
        left[threading.current_thread().name] = code
        raise Left

    monkeypatch.setattr(roll_call, "exit_process", leave)
    monkeypatch.setattr(roll_call, "EXIT_SECONDS", 1.0)
    monkeypatch.setattr(roll_call, "MISMATCH_SECONDS", 1.0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def call(count, members, seconds=1.0, own=None, work=None):
        def member(process, facts):
            joined = roll_call.Worker(("localhost", port), process, facts, 20.0)
            if work:
                work(joined, process)
            left[threading.current_thread().name] = "stayed"

        threads = [
            threading.Thread(target=member, args=(process, facts), name=f"{process}.{place}", daemon=True)
            for place, (process, facts) in enumerate(members)
        ]
        coordinator = roll_call.Coordinator(("localhost", port), count)
        for thread in threads:
            thread.start()
        try:
            coordinator.gather(own or {"steps": "6"}, seconds)
            if work:
                work(coordinator, 0)
            error = None
        except (InputError, Failure) as found:
            error = found
            with pytest.raises(Left):
                coordinator.abort(2, "")
        for thread in threads:
            thread.join(3 if error and work else 30)  # where a process would end, a thread that waits stays
        return error, left

    return call


def test_a_roll_call_of_equals(gather):
    error, left = gather(3, [(1, {"steps": "6"}), (2, {"steps": "6"})], seconds=30.0)
    assert error is None and left == {"1.0": "stayed", "2.1": "stayed"}


@pytest.mark.slow
def test_hosts_whose_data_differ_are_named_with_both_values_before_the_first_step(gather):
    here, same = socket.gethostname(), [(1, {"steps": "6"}), (2, {"steps": "6"})]
    data = dict.fromkeys(range(2), {"seed": "0", "train split of text_files": "62,003 tokens (fingerprint 0a1b)"})
    data |= {2: {"seed": "0", "train split of text_files": "37,799 tokens (fingerprint 2c3d)"}}
    error, left = gather(3, same, seconds=30.0, work=lambda end, process: end.barrier(facts=data[process]))
    assert isinstance(error, InputError) and "\n" not in str(error)
    assert (
        f"differ in train split of text_files: 62,003 tokens (fingerprint 0a1b) (process 0-1 on {here}), 37,799 tokens "
        f"(fingerprint 2c3d) (process 2 on {here}). Give every host the same files"
    ) in str(error)
    assert 2 in left.values() and "stayed" not in left.values()


def test_threads_exchange_values_at_the_same_time_and_a_barrier_meets_again(gather):
    """As a save in the background does while the main thread waits for something else."""
    results = {}

    def work(end, process):
        def save():
            for _ in range(3):  # one key, again and again
                results[process] = end.exchange(
                    "save", {"file": process}, lambda values: [one["file"] for one in values]
                )

        saving = threading.Thread(target=save)
        saving.start()
        for _ in range(3):
            end.barrier()
        assert end.exchange("main", process, max) == 2
        saving.join()
        end.barrier(last=True)

    error, left = gather(3, [(1, {"steps": "6"}), (2, {"steps": "6"})], seconds=30.0, work=work)
    assert error is None and left == {"1.0": "stayed", "2.1": "stayed"}
    assert results == dict.fromkeys(range(3), [0, 1, 2])


def test_the_main_process_learns_what_the_others_do_and_who_does_not_answer(gather, monkeypatch):
    monkeypatch.setattr(roll_call, "ANSWER_SECONDS", 1.0)
    asked, reported, shared = {}, [], {}

    def work(end, process):
        if process == 0:
            end.check = lambda status: (reported.append(status), asked.update(end.ask_all(True)))
        else:
            end.share_status({"host_seconds": process})
            end.answer = lambda stacks: {"phase": "data", "stacks": stacks} if process == 1 else time.sleep(60)
        end.barrier()
        if process == 1:
            assert end.report_stall({"step": 7}), "the coordinator answers"
        if process == 0:
            shared.update(end.share_status({"host_seconds": 0}))
            while not asked:
                time.sleep(0.01)
            assert set(end.hosts.values()) == {socket.gethostname()} and set(end.hosts) == {0, 1, 2}
        end.barrier(last=True)

    error, _ = gather(3, [(1, {"steps": "6"}), (2, {"steps": "6"})], seconds=30.0, work=work)
    assert error is None and reported == [{"step": 7}]
    assert asked == {1: {"phase": "data", "stacks": True}, 2: None}
    assert {process: status["host_seconds"] for process, status in shared.items()} == {0: 0, 1: 1, 2: 2}


def test_a_worker_that_is_stuck_waits_no_longer_than_the_coordinator_may_take_to_answer(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(roll_call, "ANSWER_SECONDS", 0.2)
    asked = []

    def silent(server):  # a coordinator that is stopped after the start
        connected, _ = server.accept()
        file = connected.makefile("rw")
        file.readline()
        file.write('{"kind": "start"}\n')
        file.flush()
        asked.extend([file.readline(), connected])

    with socket.create_server(("localhost", 0)) as server:
        threading.Thread(target=silent, args=(server,), daemon=True).start()
        worker = roll_call.Worker(("localhost", server.getsockname()[1]), 1, {}, 5.0)
        assert not worker.report_stall({"step": 3})
        assert "stalled" in asked[0] and '"step": 3' in asked[0]
        worker._is_over = True  # else this process exits when the socket closes


def test_who_did_not_come_is_named_and_the_others_end(gather):
    error, left = gather(6, [(2, {"steps": "6"})])
    assert isinstance(error, Failure) and left["2.0"] == 2
    assert "process 1, 3-5 of 6 did not come within 1 s" in str(error) and f"2 on {socket.gethostname()}" in str(error)


@pytest.mark.parametrize(
    "members, words",
    [
        ([(1, {"steps": "7"}), (2, {"steps": "6"})], "differ in steps: 6 \\(process 0, 2\\), 7 \\(process 1\\)"),
        ([(1, {"steps": "6"}), (1, {"steps": "6"})], "two processes say that they are process 1"),
    ],
)
def test_those_that_differ_are_named_and_all_end(gather, members, words):
    error, left = gather(3, members, seconds=60.0)  # far less than that is waited once one does not fit
    assert isinstance(error, InputError)
    with pytest.raises(InputError, match=words):
        raise error
    assert [left[f"{process}.{place}"] for place, (process, _) in enumerate(members)] == [2, 2]


def test_a_coordinator_that_does_not_come(monkeypatch):
    monkeypatch.undo()
    with socket.create_server(("localhost", 0)) as taken:
        free = taken.getsockname()[1]
    with pytest.raises(
        Failure, match=f"process 1 waited 0.5 s .* the coordinator, which did not come to localhost:{free}"
    ):
        roll_call.Worker(("localhost", free), 1, {}, 0.5)


def test_a_taken_port():
    with (
        socket.create_server(("localhost", 0)) as taken,
        pytest.raises(InputError, match="the coordinator cannot listen at port"),
    ):
        roll_call.listen("localhost", taken.getsockname()[1])


HOLES = """
import ctypes, pathlib
from seqpe_jax.distributed import processes

def held():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024

processes.configure_malloc()
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
blocks = [ctypes.c_void_p(c.malloc(size)) for _ in range(200) for size in (2**20, 64)]
for block in blocks[::2]:
    ctypes.memset(block, 1, 2**20)
for block in blocks[::2]:
    c.free(block)
before = held()
processes.malloc_trim()
print(before - held())
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="no allocator of glibc's")
@pytest.mark.parametrize(
    "variables",
    [{}, {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000"}],
    ids=["configured", "set by the environment"],
)
def test_free_memory_between_pieces_in_use_is_given_back(variables):
    """200 free MiB with something in use after each, unless who started the command sets the allocator."""
    rest = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", HOLES], env=rest | variables, capture_output=True, text=True, check=True
    )
    given_back = int(done.stdout)
    assert given_back < 20 if variables else given_back > 180
