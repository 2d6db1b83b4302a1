"""Settings of every test: eight fake CPU devices, a compile cache that outlives the process, and shared fixtures."""

import os
import pathlib
import tempfile

# All of this is read when jax is first imported, so it comes before any other import.
os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "seqpe_jax_test_compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _beside(name: str) -> pathlib.Path:
    folder = ROOT.parent / "shared" / name
    if not folder.is_dir():
        pytest.skip(f"no ../shared/{name} beside the repository")
    return folder


@pytest.fixture(scope="session")
def goldens() -> pathlib.Path:
    """Folder of the arrays recorded from the PyTorch reference; the test skips where it is absent."""
    return _beside("goldens")


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder of real data kept beside the repository; the test skips where it is absent."""
    return _beside("data")
