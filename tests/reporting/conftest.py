"""Fixtures of the tests of reports."""

import pytest

from seqpe_jax.reporting import report


@pytest.fixture
def without_plots(monkeypatch):
    """Reports without plots, which take most of the time."""
    monkeypatch.setattr(report, "_write_plots", lambda *_: {"study_plots": [], "run_plots": {}})
