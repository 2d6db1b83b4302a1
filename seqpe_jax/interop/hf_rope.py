"""Rotary fields of a Hugging Face config.json <-> fields of `encoding.kind='rotary'`; without scaling so far."""

from collections.abc import Mapping
from typing import Any

from seqpe_jax.config import RotaryConfig
from seqpe_jax.errors import InputError

ROPE_KEYS = frozenset(
    "rope_theta rope_scaling rope_parameters rotary_emb_base rotary_pct partial_rotary_factor "
    "original_max_position_embeddings".split()
)


def rope_from_hf(settings: Mapping[str, Any], head_width: int) -> dict[str, Any]:
    """Returns the fields of the encoding.

    Args:
      settings: content of a config.json.
      head_width: features of a head.

    Raises:
      InputError: a scaling or a part of a head, which are unknown here.
    """
    given = settings.get("rope_parameters") or {}
    for name, value in {**(settings.get("rope_scaling") or {}), **given}.items():
        if name not in ("rope_theta", "rope_type", "type") or (name != "rope_theta" and value != "default"):
            raise InputError(f"field 'rope_parameters.{name}' is {value!r}, which is unknown here")
    for name in ("rotary_pct", "partial_rotary_factor"):
        if settings.get(name) not in (None, 1, 1.0):
            raise InputError(f"field '{name}' is {settings[name]!r}, only 1.0 is known")
    return {"theta": float(given.get("rope_theta") or settings.get("rope_theta") or 10000.0)}


def rope_to_hf(encoding: RotaryConfig, head_width: int, length: int, gpt_neox: bool = False) -> dict[str, Any]:
    """Returns the entries of a config.json, in the forms of transformers 4 and 5.

    Args:
      encoding: the encoding.
      head_width: features of a head.
      length: tokens of the window.
      gpt_neox: with the names that GPT-NeoX has for some of them.

    Raises:
      InputError: a RoPE that Hugging Face does not have.
    """
    if encoding.scaling != "none" or encoding.rotary_pairs or encoding.position_heads:
        raise InputError("a scaling, or pairs or heads that do not rotate, cannot be written")
    names = {"rotary_emb_base": encoding.theta, "rotary_pct": 1.0} if gpt_neox else {}
    parameters = {"rope_type": "default", "rope_theta": encoding.theta}
    return names | {"rope_theta": encoding.theta, "rope_scaling": None, "rope_parameters": parameters}
