"""Checkpoints of other programs: their config, read at once, and their arrays, read when they are needed."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from seqpe_jax.config import Config
from seqpe_jax.interop.weights import Rule
from seqpe_jax.models.build import DataSpec


class Arrays(NamedTuple):
    """The arrays of a checkpoint.

    Attributes:
      state: arrays by name.
      left_out: {array that is no weight: reason}.
      fixed_tables: stored tables of encodings without parameters, which this package computes, by name.
      files: paths that were read.
    """

    state: dict[str, np.ndarray]
    left_out: dict[str, str]
    fixed_tables: dict[str, np.ndarray]
    files: tuple[pathlib.Path, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ForeignCheckpoint:
    """A checkpoint in another format than a run's.

    Attributes:
      config: config of the model.
      rules: rule of each parameter.
      read_arrays: reads the arrays; called once, by `arrays`.
      tokenizer_files: paths of the tokenizer's files; () without one.
      settings: fields of its config.json that a folder of Hugging Face gets back, such as eos_token_id.
      data_spec: classes, channels and pixel statistics of images, where the checkpoint says them.
    """

    config: Config
    rules: tuple[Rule, ...]
    read_arrays: Callable[[], Arrays]
    tokenizer_files: tuple[pathlib.Path, ...] = ()
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    data_spec: DataSpec | None = None

    @functools.cached_property
    def arrays(self) -> Arrays:
        """The arrays. Raises: InputError: a file is missing, damaged or cut short."""
        return self.read_arrays()
