"""Settings of every test: eight fake CPU devices, a compile cache that outlives the process, and shared fixtures."""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

# All of this is read when jax is first imported, so it comes before any other import.
# Threads that wait for each other in a collective must all have started. Eight devices with two collectives at once need
# more of them than XLA makes for two cores, and it ends the process after 40 seconds in which some found none.
os.environ.setdefault("NPROC", "32")
os.environ["JAX_PLATFORMS"] = "cpu"
FLAGS = {
    "xla_force_host_platform_device_count": 8,
    # Tests compile far longer than they run: this halves their time.
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": "true",
}
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones may not know these flags and would not start
    # One module for LLVM instead of 32 parts, each of which has a cost of its own: a fifth of the compilation.
    FLAGS |= {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": 1}
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}={value}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "seqpe_jax_test_compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

from tests.commands import Commands
from tests.emulator import BUCKET, S3Store, Store

gc.set_threshold(50_000, 20, 50)  # traces make many objects that live long; looking through them again costs time
ROOT = pathlib.Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest start first, so that no process ends long before the others."""
    first = (
        "test_commands_of_pages.py",
        "test_processes.py",
        "test_equal_steps.py",
        "test_resume.py",
        "test_configs.py",
        "test_decoding.py",
        "test_step.py",
        "test_mutations.py",
        "test_aot.py",
        "test_public.py",
        "test_sweep.py",
        "test_export_command.py",
        "test_conversion.py",
        "test_export.py",
        "test_commands.py",
        "test_answer_commands.py",
        "test_generate.py",
        "test_trace.py",
    )
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Runs commands as a user would, all of a file's with one cache."""
    running = Commands(tmp_path_factory.mktemp("cache"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """Runs and models without a mesh of their own use the first device alone, for which they compile sooner than for all eight."""
    import jax

    from seqpe_jax import model
    from seqpe_jax.distributed import sharding

    make_mesh = sharding.make_mesh

    def make_small_mesh(data, fsdp, context=1, tensor=1, devices=None, slices=0):
        if devices is None and max(data, fsdp, context, tensor) < 2:
            devices = jax.devices()[:1]
        return make_mesh(data, fsdp, context, tensor, devices, slices)

    with pytest.MonkeyPatch.context() as patch:
        for module in (sharding, model):
            patch.setattr(module, "make_mesh", make_small_mesh)
        yield


def _running(kind: type[Store]) -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch:
        running = kind()
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running
        running.close()


@pytest.fixture(scope="session")
def one_store() -> Iterator[Store]:
    """An object store on this machine, for all tests of a process."""
    yield from _running(Store)


@pytest.fixture(scope="session")
def one_s3_store() -> Iterator[Store]:
    """A store that speaks S3's protocol; tests skip where the libraries for it are absent."""
    for name in ("s3fs", "moto", "flask", "flask_cors"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install -e .[s3-test]")
    yield from _running(S3Store)


@pytest.fixture
def store(one_store: Store, request: pytest.FixtureRequest) -> Iterator[Store]:
    """The same, with a folder of the test's own, `store.folder`, and without failures on purpose."""
    yield from _of_test(one_store, request)


@pytest.fixture
def s3_store(one_s3_store: Store, request: pytest.FixtureRequest) -> Iterator[Store]:
    """The same of S3."""
    yield from _of_test(one_s3_store, request)


@pytest.fixture(params=["store", "s3_store"], ids=["gs", "s3"])
def any_store(request: pytest.FixtureRequest) -> Store:
    """Each of both kinds in turn."""
    return request.getfixturevalue(request.param)


def _of_test(one: Store, request: pytest.FixtureRequest) -> Iterator[Store]:
    one.folder = f"{one.scheme}{BUCKET}/{re.sub('[^a-z0-9_]+', '_', request.node.name)}"
    yield one
    one.fail(0)


def _shared(name: str) -> pathlib.Path:
    folder = ROOT.parent / "shared" / name
    if not folder.is_dir():
        pytest.skip(f"no ../shared/{name} next to the repository")
    return folder


@pytest.fixture(scope="session")
def goldens() -> pathlib.Path:
    """Folder of the arrays recorded from the PyTorch reference; the test skips where it is absent."""
    return _shared("goldens")


@pytest.fixture(scope="session")
def shared_inputs() -> pathlib.Path:
    """Folder of small files that users might have, next to the repository; the test skips where it is absent."""
    return _shared("inputs")


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder of real data next to the repository; the test skips where it is absent."""
    return _shared("data")
