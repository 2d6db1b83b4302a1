"""Fixtures of the tests of sweeps."""

import pytest

from seqpe_jax.sweeps import local, search, slurm


@pytest.fixture(autouse=True)
def short_polls(monkeypatch):
    """Commands of milliseconds are polled as often."""
    for module in (local, search, slurm):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
