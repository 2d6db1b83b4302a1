"""What tests of attention share."""

import functools

import pytest

from seqpe_jax.models import choice, tpu


@pytest.fixture
def small_kernel(monkeypatch):
    """The TPU's kernel, interpreted and in small blocks, as what "flash" stands for."""
    monkeypatch.setattr(tpu, "LANES", 4)
    monkeypatch.setattr(tpu, "BLOCKS", (4,))
    monkeypatch.setattr(choice, "refusal", lambda operands, *_: "a bias" if operands.bias is not None else "")
    monkeypatch.setattr(choice.cudnn, "flash", functools.partial(tpu.flash, interpret=True))
