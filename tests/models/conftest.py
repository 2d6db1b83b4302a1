"""Fixtures of the tests of attention."""

import pytest

from seqpe_jax.models import attention_dispatch, attention_tpu


@pytest.fixture
def small_kernel(monkeypatch):
    """The TPU kernels, interpreted and in small blocks, serve "flash"."""
    monkeypatch.setattr(attention_tpu, "LANES", 4)
    monkeypatch.setattr(attention_tpu, "BLOCK_SIZES", (4,))
    monkeypatch.setattr(
        attention_dispatch, "unsupported_reason", lambda inputs, *_: "a bias" if inputs.bias is not None else ""
    )
    kernel = attention_dispatch.flash_kernel
    monkeypatch.setattr(
        attention_dispatch, "flash_kernel", lambda device, blocks: kernel(device, blocks, interpret=True)
    )
