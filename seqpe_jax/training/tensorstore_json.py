"""TensorStore is asked for JSON as seldom as can be, for it never lets go of what it answers.

Its binding for Python (version 0.1.86) puts each key and value into a dict and forgets to give up its own reference. Orbax
asks, with each save, for the place of each array and for counters of bytes: about 450 objects of a state of 40 arrays stay
for good (`tests/distributed/test_tensorstore_json.py`).
"""

import copy
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import tensorstore

FEW = 8  # places remembered: one save has two or three, which all its arrays share


@dataclasses.dataclass(frozen=True)
class _Question:
    """What is asked of a spec; two are the same where the words are."""

    words: str
    defaults: bool
    spec: Any = dataclasses.field(compare=False)


def _held() -> bool:
    """Whether what TensorStore answers is referred to more often than what Python's own reader makes of the same."""
    own = json.loads('{"driver": "memory"}')
    answer = tensorstore.KvStore.Spec(own).to_json()
    return sys.getrefcount(answer["driver"]) > sys.getrefcount(own["driver"])


def _asked_once(to_json: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `to_json` with a memory of its last few answers."""

    @functools.lru_cache(maxsize=FEW)
    def answer(question: _Question) -> Any:
        return to_json(question.spec, include_defaults=question.defaults)

    def remembered(self: Any, include_defaults: bool = False) -> Any:
        return copy.deepcopy(answer(_Question(repr(self), include_defaults, self)))

    return remembered


def _no_counters(metric_prefix: str = "", include_zero_metrics: bool = False) -> list[Any]:
    """Answers as TensorStore does where nothing was counted; Orbax does no more with it than to write it to its log."""
    return []


@functools.cache
def patch_tensorstore_json() -> None:
    """Changes TensorStore for all of this process, once, where it has the fault."""
    if _held():
        tensorstore.KvStore.Spec.to_json = _asked_once(tensorstore.KvStore.Spec.to_json)
        tensorstore.experimental_collect_matching_metrics = _no_counters
