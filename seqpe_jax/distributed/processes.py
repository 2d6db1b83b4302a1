"""This process among the others: how they start and end together, who leads, where compiled programs are kept."""

import ctypes
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import signal
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
from jax._src import clusters  # JAX's own detection; `initialize` offers it only together with its own wait
from jax.experimental import multihost_utils

from seqpe_jax.distributed import roll_call
from seqpe_jax.errors import EXIT_PREEMPTED, Failure, InputError
from seqpe_jax.files import cache_root

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
# glibc's malloc.h: options of `mallopt` (M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD) and what keeps all memory in one place.
MALLOC_OPTIONS = ((-8, 1), (-4, 0), (-1, -1))
SHARED_SECONDS = 60.0  # for a network file system to show a new file everywhere

_roll_call: roll_call.Coordinator | roll_call.Worker | None = None


def initialize(
    facts: Mapping[str, Any],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    seconds: float = 300.0,
) -> None:
    """Makes this process one of a run's: before anything touches devices, once.

    Without the three, JAX looks whether this process runs under Slurm, Open MPI, on a Cloud TPU, GKE or Kubernetes; where
    it does not, or where num_processes is 1, nothing is waited for and no network is touched.

    Args:
      facts: what all processes must share (fields of the config, options), besides the versions of the program.
      coordinator: HOST:PORT of process 0; JAX's service is at PORT, the roll call at PORT - 1.
      seconds: to wait for the others.

    Raises:
      InputError: options that contradict each other, a taken port, processes that differ (each told on the lead).
      Failure: processes that did not come.
    """
    global _roll_call
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    if num_processes == 1 and coordinator is None and not process_id:
        return
    devices = None
    if any(value is not None for value in given.values()):
        absent = [name for name, value in given.items() if value is None]
        if absent:
            raise InputError(
                f"{' and '.join(given)} belong together, and {' and '.join(absent)} is not given: give all three, or none "
                "where Slurm, a TPU pod or Kubernetes tells them (--num-processes=1 alone: a process by itself)"
            )
    else:
        coordinator, num_processes, process_id, devices = _detected(seconds)
        if coordinator is None:
            return
    host, port = _address(coordinator)
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"--process-id={process_id} must be 0 to {num_processes - 1} (--num-processes={num_processes})"
        )
    if num_processes == 1:
        return
    known = (
        _versions() | {name: str(value) for name, value in facts.items()} | {"number of processes": str(num_processes)}
    )
    if process_id:
        _roll_call = roll_call.Worker((host, port - 1), process_id, known, seconds)
    else:
        roll_call.listen(host, port).close()  # JAX would not say that it is taken
        _roll_call = roll_call.Coordinator((host, port - 1), num_processes)
        _roll_call.gather(known, seconds)
    jax.config.update("jax_enable_preemption_service", True)
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(max(seconds, 60)),
    )
    if jax.device_count() != num_processes * jax.local_device_count():
        raise InputError(
            f"process {process_id} on {socket.gethostname()} has {jax.local_device_count()} of the {jax.device_count()} "
            f"devices of {num_processes} processes: give every process equally many"
        )


def _detected(seconds: float) -> tuple[str | None, int, int, list[int] | None]:
    """Returns (coordinator, processes, this one's number, its devices) as JAX finds them, or None first of all."""
    try:
        coordinator, count, process, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, int(seconds)
        )
    except Exception as error:  # what the environment's own services raise
        raise Failure(
            f"this process seems to be one of several, but where the others are could not be read ({error}): give "
            "--coordinator, --num-processes and --process-id, or --num-processes=1 for a process by itself"
        ) from error
    if coordinator is not None and (count is None or process is None):
        raise InputError(
            "JAX_COORDINATOR_ADDRESS is set, but nothing tells how many processes there are: give --coordinator, "
            "--num-processes and --process-id, or unset it"
        )
    return coordinator, count or 1, process or 0, devices


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 2 <= int(port) <= 65535:
        raise InputError(f"--coordinator={coordinator} must be HOST:PORT of process 0, with a port from 2 to 65535")
    return host.strip("[]"), int(port)


def _versions() -> roll_call.Facts:
    """Returns the versions of the program and of what a step depends on; the program's is the digest of its source."""
    source = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        source.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    libraries = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return {"python": platform.python_version(), "seqpe_jax source": source.hexdigest()[:12]} | libraries


def is_multiprocess() -> bool:
    """Whether there are other processes."""
    return _roll_call is not None


def shutdown() -> None:
    """Leaves the others in order, when the work is done."""
    global _roll_call
    if _roll_call is not None:
        _roll_call.barrier(last=True)
        _roll_call = None
        jax.distributed.shutdown()


def abort(code: int, words: str) -> NoReturn:
    """Ends this process with one line, which the lead prints for all, and every other process of the run."""
    if _roll_call is not None:
        sys.stdout.flush()
        _roll_call.abort(code, words)
    print(words, file=sys.stderr)
    roll_call.exit_process(code)


def wait_for_abort() -> None:
    """Gives way to the news that another process is gone, which shows in this one as an error of its own."""
    if _roll_call is not None:
        time.sleep(roll_call.GRACE_SECONDS + roll_call.LEAVE_SECONDS)


def barrier() -> None:
    """Waits until all processes are here."""
    if _roll_call is not None:
        _roll_call.barrier()


def check_equal(facts: Mapping[str, str]) -> None:
    """Waits until all processes are here, and refuses facts in which they differ, such as fingerprints of their data.

    Raises:
      InputError: says which process, on which host, has which value; the lead raises it, and the others end with it.
    """
    if _roll_call is not None:
        _roll_call.barrier(facts=dict(facts))


def exit_on_signal() -> None:
    """Ends this process at once where SIGTERM or SIGHUP come while there is nothing to save, as before the first step.

    Among several processes JAX listens for SIGTERM itself. A process under `nohup`, which ignores SIGHUP, goes on.
    """

    def leave(number: int, _: Any) -> None:
        name = signal.Signals(number).name
        abort(
            EXIT_PREEMPTED, f"{name}: there is nothing to save now; the same command goes on from the last checkpoint"
        )

    for number in (signal.SIGTERM, signal.SIGHUP) if not is_multiprocess() else ():
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, leave)


_asked = 0


def reached_preemption() -> bool:
    """Whether all processes stop here, because one of them got SIGTERM; each must ask at the same places as the others."""
    global _asked
    _asked += 1
    return _roll_call is not None and multihost_utils.reached_preemption_sync_point(_asked)


def broadcast_from_main(value: bool) -> bool:
    """Returns the value that the lead gives."""
    return bool(multihost_utils.broadcast_one_to_all(value)) if _roll_call is not None else value


def check_shared(path: Any) -> None:
    """Refuses to go on where a file that the lead has written is not there. Raises: InputError."""
    deadline = time.monotonic() + SHARED_SECONDS
    while is_multiprocess() and not path.exists():
        if time.monotonic() > deadline:
            raise InputError(
                f"{path.parent} is not the same folder on every host: on {socket.gethostname()} it has no {path.name}, "
                "which process 0 has just written there; give a folder that they share"
            )
        time.sleep(0.5)


def is_main_process() -> bool:
    """Whether this process writes what only one may write; asking takes no devices where there is no other process."""
    return _roll_call is None or jax.process_index() == 0


def describe() -> str:
    """Returns the machine in words: processes, devices and their kind."""
    kind = jax.devices()[0].device_kind
    return f"{jax.process_count()} process(es), {jax.device_count()} device(s) ({kind})"


def describe_batch(batch_size: int, shards: int) -> str:
    """Returns how a batch lies on the devices: "batch 512: 2 x 4 devices, 64 each"; shards: parts that it is split in."""
    devices = f"{jax.process_count()} x {jax.local_device_count()} devices"
    if shards == jax.device_count():
        return f"batch {batch_size}: {devices}, {batch_size // shards} each"
    return f"batch {batch_size}: {devices}, {batch_size // shards} to each of {shards} groups"


def enable_compilation_cache() -> None:
    """Turns the persistent compile cache on, where JAX's own environment variables do not say otherwise."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def configure_malloc() -> None:
    """Has this process keep the memory that it frees, before the first device is asked for, whose threads take their own.

    On a CPU, XLA takes the temporary arrays of a program anew at each call. glibc would ask the kernel for those hundreds
    of megabytes and give them back each time, and clearing their pages is a sixth of a training step. Nothing happens
    where there is no glibc, nor where the environment sets its allocator already.
    """
    set_option = _allocator("mallopt")
    if set_option is not None:
        for option, value in MALLOC_OPTIONS:
            set_option(option, value)


def malloc_trim() -> None:
    """Gives the kernel what is free of the memory that is kept (`configure_malloc`); seldom, for much of it is asked for again.

    What a save takes, such as 4 MB for each of TensorStore's compressors, is not always free again in one piece. With time
    the process would hold more and more pieces with nothing in them.
    """
    give_back = _allocator("malloc_trim")
    if give_back is not None:
        give_back(0)


def _allocator(function: str) -> Any:
    """Returns a function of glibc's allocator, or None where there is none, or where the environment sets its options."""
    told = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    return getattr(ctypes.CDLL(None), function, None) if os.name == "posix" and not told else None
