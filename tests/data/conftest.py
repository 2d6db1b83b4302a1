"""Fixtures of the tests of data."""

import pytest

from seqpe_jax.data.tokenizers import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def gpt2_tokenizer(shared_data) -> Tokenizer:
    """GPT-2's tokenizer, which takes seconds to load; the test skips where its file is absent."""
    return load_tokenizer(shared_data / "gpt2_tokenizer")
