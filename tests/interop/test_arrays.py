"""Settings files that hold no mapping are refused in one line."""

import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.interop.hf import read_mapping


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"- " * 50_000,
        b"a: [1",
        b"\xff\xfe\x00",
        b"when: 2001-99-99",
        b"3",
        b"",
        b"!!python/object/apply:os.system ['true']",
    ],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_no_mapping_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match="config.json (is neither JSON nor YAML|must hold a mapping)") as caught:
        read_mapping(tmp_path / "config.json")
    assert "\n" not in str(caught.value)
