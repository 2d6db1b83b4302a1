"""The processes of a run: initialization, barriers, preemption, abort; compile cache and memory allocator of this process."""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
from jax._src import clusters  # JAX's own detection; `initialize` offers it only together with its own wait
from jax.experimental import multihost_utils

from seqpe_jax import start_signals
from seqpe_jax.distributed import roll_call
from seqpe_jax.distributed.hardware import expected_platform
from seqpe_jax.errors import Failure, InputError
from seqpe_jax.files import COMPILED_DIR, as_path, cache_root, is_remote

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
# glibc's malloc.h: M_ARENA_MAX = 1, M_MMAP_MAX = 0, M_TRIM_THRESHOLD = -1 keep all memory in one arena.
MALLOC_OPTIONS = ((-8, 1), (-4, 0), (-1, -1))
GPU_MEMORY_FRACTION = "0.9"  # NVIDIA's JAX-Toolbox sets 0.8 to 0.9: its libraries need the rest
GPU_MEMORY_VARIABLES = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "XLA_PYTHON_CLIENT_COLLECTIVE_MEM_SIZE_MB",
)
# What compiles a step; of the last three a machine has one or none.
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
# JAX ends a run without a name, in a C++ stack trace, when a process sends nothing for so long; the roll call notices one
# that is lost within half a minute, and the watchdog of a run one that is stopped.
HEARTBEAT_SECONDS = 3600
SHARED_FILE_SECONDS = 60.0  # for a network file system to show a new file everywhere

_roll_call: roll_call.Coordinator | roll_call.Worker | None = None


def initialize(
    facts: Mapping[str, Any],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    seconds: float = 300.0,
) -> None:
    """Connects this process to the others of its run; called once, before anything uses devices.

    Without coordinator, num_processes and process_id, JAX detects Slurm, Open MPI, Cloud TPU, GKE and Kubernetes. A single
    process waits for nothing and opens no connection.

    Args:
      facts: values that all processes must share (fields of the config, options), besides the versions of the program.
      coordinator: HOST:PORT of process 0; JAX's service listens at PORT, the roll call at PORT - 1.
      num_processes: number of processes of the run.
      process_id: number of this process.
      seconds: seconds to wait for the others.

    Raises:
      InputError: options contradict each other, the port is taken, or processes differ (reported by the coordinator).
      Failure: processes are missing.
    """
    global _roll_call
    options = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    if num_processes == 1 and coordinator is None and not process_id:
        return
    devices = None
    if any(value is not None for value in options.values()):
        absent = [name for name, value in options.items() if value is None]
        if absent:
            raise InputError(
                f"{' and '.join(options)} belong together, and {' and '.join(absent)} is not given: give all three, or none "
                "where Slurm, a TPU pod or Kubernetes sets them (--num-processes=1 alone: a process by itself)"
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
    facts = {name: str(value) for name, value in facts.items()}
    facts |= _versions() | {"number of processes": str(num_processes)}
    if process_id:
        _roll_call = roll_call.Worker((host, port - 1), process_id, facts, seconds)
    else:
        roll_call.listen(host, port).close()  # JAX would not report that it is taken
        _roll_call = roll_call.Coordinator((host, port - 1), num_processes)
        _roll_call.gather(facts, seconds)
    start_signals.release()  # JAX handles SIGTERM from here on
    jax.config.update("jax_enable_preemption_service", True)
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(max(seconds, 60)),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    if jax.device_count() != num_processes * jax.local_device_count():
        raise InputError(
            f"process {process_id} on {socket.gethostname()} has {jax.local_device_count()} of the {jax.device_count()} "
            f"devices of {num_processes} processes: give every process equally many"
        )


def _detected(seconds: float) -> tuple[str | None, int, int, list[int] | None]:
    """Returns (coordinator, number of processes, process id, local devices) as JAX detects them; coordinator None = none."""
    try:
        coordinator, count, process, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, int(seconds)
        )
    except Exception as error:  # whatever the cluster's own services raise
        raise Failure(
            f"this process seems to be one of several, but where the others are could not be read ({error}): give "
            "--coordinator, --num-processes and --process-id, or --num-processes=1 for a process by itself"
        ) from error
    if coordinator is not None and (count is None or process is None):
        raise InputError(
            "JAX_COORDINATOR_ADDRESS is set, but not how many processes there are: give --coordinator, "
            "--num-processes and --process-id, or unset it"
        )
    return coordinator, count or 1, process or 0, devices


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 2 <= int(port) <= 65535:
        raise InputError(f"--coordinator={coordinator} must be HOST:PORT of process 0, with a port from 2 to 65535")
    return host.strip("[]"), int(port)


def _versions() -> roll_call.Facts:
    """Returns the versions of the program, as a digest of its source, and of the libraries that a step depends on."""
    source = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        source.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    libraries = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            libraries[name] = importlib.metadata.version(name)
    return {"python": platform.python_version(), "seqpe_jax source": source.hexdigest()[:12]} | libraries


def is_multiprocess() -> bool:
    """Returns whether the run has more than one process."""
    return _roll_call is not None


def shutdown() -> None:
    """Disconnects from the other processes when the work is done."""
    global _roll_call
    if _roll_call is not None:
        _roll_call.barrier(last=True)
        _roll_call = None
        jax.distributed.shutdown()


def abort(code: int, reason: str) -> NoReturn:
    """Exits all processes of the run; the coordinator prints the reason, one line, once; "" = nothing."""
    if _roll_call is not None:
        _roll_call.abort(code, reason)
    with contextlib.suppress(OSError):  # stderr may be on a full disk
        print(reason, end="\n" if reason else "", file=sys.stderr)
    roll_call.exit_process(code)


def wait_for_abort() -> None:
    """Waits for the coordinator to abort this process: the loss of another one shows here as an error too."""
    if _roll_call is not None:
        time.sleep(roll_call.GRACE_SECONDS + roll_call.EXIT_SECONDS)


def barrier() -> None:
    """Waits until all processes are here; unlike a collective, for as long as it takes (Gloo gives up after 30 s)."""
    if _roll_call is not None:
        _roll_call.barrier()


def exchange(key: str, value: Any, reduce: roll_call.Reduce) -> Any:
    """Waits until all processes have called this with the key, from any thread; returns reduce(values by process) to all.

    Args:
      key: name of the meeting point.
      value: this process's value, in JSON.
      reduce: called on the main process, where it may raise; its result is JSON too.
    """
    return reduce([value]) if _roll_call is None else _roll_call.exchange(key, value, reduce)


def from_main(key: str, value: Any) -> Any:
    """Returns the main process's value, in JSON, to all processes; unlike a collective, from any thread."""
    return exchange(key, value, lambda values: values[0])


def share_status(status: roll_call.Status) -> dict[int, roll_call.Status]:
    """Sends what this process measures to the main one, without waiting; returns there the last of each process, else {}."""
    return {} if _roll_call is None else _roll_call.share_status(status)


def hosts() -> dict[int, str]:
    """Returns the host names by process, on the main process; {} for a single process and on the others."""
    return _roll_call.hosts if isinstance(_roll_call, roll_call.Coordinator) else {}


def on_stall(answer: Callable[[bool], roll_call.Status], check: Callable[[roll_call.Status], None]) -> None:
    """Sets what the processes do when one makes no progress.

    Args:
      answer: (whether to write stacks) -> what this process does; called in a thread of its own when the main process asks.
      check: called on the main process, in a thread, with the status of a process that reports a stall.
    """
    if isinstance(_roll_call, roll_call.Worker):
        _roll_call.answer = answer
    elif _roll_call is not None:
        _roll_call.check = check


def ask_all(with_stacks: bool) -> dict[int, roll_call.Status | None]:
    """Asks the workers what they do, on the main process; None for those that do not answer soon.

    Args:
      with_stacks: they write their stacks too.
    """
    return _roll_call.ask_all(with_stacks) if isinstance(_roll_call, roll_call.Coordinator) else {}


def report_stall(status: roll_call.Status) -> bool:
    """Reports, on a worker, that it makes no progress; returns whether the main process answers."""
    return isinstance(_roll_call, roll_call.Worker) and _roll_call.report_stall(status)


def exit_alone(code: int, reason: str) -> NoReturn:
    """Exits this process, as one whose main process does not answer."""
    print(reason, file=sys.stderr)
    roll_call.exit_process(code)


def check_equal(facts: Mapping[str, str]) -> None:
    """Waits until all processes are here, and refuses facts that differ, such as fingerprints of their data.

    Args:
      facts: facts about this process.

    Raises:
      InputError: raised on the coordinator; names the values with their processes and hosts. The workers are aborted.
    """
    if _roll_call is not None:
        _roll_call.barrier(facts=dict(facts))


_sync_points = 0


def reached_preemption() -> bool:
    """Returns whether all processes stop here because one got SIGTERM; all must call it at the same points."""
    global _sync_points
    _sync_points += 1
    return _roll_call is not None and multihost_utils.reached_preemption_sync_point(_sync_points)


def broadcast_from_main(value: bool) -> bool:
    """Returns the main process's value."""
    return bool(multihost_utils.broadcast_one_to_all(value)) if _roll_call is not None else value


def check_shared(path: Any) -> None:
    """Refuses a folder that the processes do not share, where a file of the main process is missing. Raises: InputError."""
    deadline = time.monotonic() + SHARED_FILE_SECONDS
    while is_multiprocess() and not path.exists():
        if time.monotonic() > deadline:
            raise InputError(
                f"{path.parent} is not the same folder on every host: on {socket.gethostname()} it has no {path.name}, "
                "which process 0 sees there; give a folder that they share"
            )
        time.sleep(0.5)


def is_main_process() -> bool:
    """Returns whether this process writes the files of the run; initializes no devices if it is the only process."""
    return _roll_call is None or jax.process_index() == 0


def describe() -> str:
    """Returns a summary of processes and devices."""
    kind = jax.devices()[0].device_kind
    return f"{jax.process_count()} process(es), {jax.device_count()} device(s) ({kind})"


def describe_batch(batch_size: int, shards: int) -> str:
    """Returns a summary of a batch on the devices, e.g. "batch 512: 2 x 4 devices, 64 each".

    Args:
      batch_size: batch size of all processes.
      shards: parts that the batch is split into.
    """
    devices = f"{jax.process_count()} x {jax.local_device_count()} devices"
    if shards == jax.device_count():
        return f"batch {batch_size}: {devices}, {batch_size // shards} each"
    return f"batch {batch_size}: {devices}, {batch_size // shards} to each of {shards} groups"


def enable_compilation_cache(workdir: str = "") -> None:
    """Enables JAX's persistent compile cache, unless JAX's own environment variables set it.

    It is in $SEQPE_JAX_CACHE, else in a run folder that is in a bucket, where a new machine finds it, else in ~/.cache.

    Args:
      workdir: folder of the run that this process trains; "" = none.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        in_bucket = is_remote(workdir) and "SEQPE_JAX_CACHE" not in os.environ
        folder = as_path(workdir) if in_bucket else cache_root()
        jax.config.update("jax_compilation_cache_dir", str(folder / COMPILED_DIR))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def configure_gpu_memory() -> None:
    """Sets the fraction of a GPU's memory that JAX allocates; called before devices are initialized.

    JAX's default of 75% leaves memory idle next to one training run. Without effect on other platforms, or if the environment
    configures JAX's allocator.
    """
    if expected_platform() == "gpu" and not any(name in os.environ for name in GPU_MEMORY_VARIABLES):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = GPU_MEMORY_FRACTION


def configure_malloc() -> None:
    """Configures glibc to retain freed memory; called before devices are initialized, whose threads have own arenas.

    On a CPU, XLA allocates the temporary arrays of a program at each call. glibc would get those hundreds of megabytes from
    the kernel and return them each time, and clearing their pages takes a sixth of a training step. Without effect on other
    platforms, whose arrays are not in this memory and whose many threads would wait for one arena; or if there is no glibc
    or the environment configures its allocator.
    """
    set_option = _allocator("mallopt") if expected_platform() == "cpu" else None
    if set_option is not None:
        for option, value in MALLOC_OPTIONS:
            set_option(option, value)


def malloc_trim() -> None:
    """Returns free memory to the kernel that `configure_malloc` keeps; called seldom, since much of it is needed again.

    The memory of a save, such as 4 MB for each of TensorStore's compressors, becomes fragmented, and would grow with time.
    """
    trim = _allocator("malloc_trim")
    if trim is not None:
        trim(0)


def _allocator(function: str) -> Any:
    """Returns a function of glibc's allocator; None if there is none, or the environment configures the allocator."""
    is_configured = any(name.startswith("MALLOC_") for name in os.environ)
    is_configured = is_configured or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return getattr(ctypes.CDLL(None), function, None) if os.name == "posix" and not is_configured else None
