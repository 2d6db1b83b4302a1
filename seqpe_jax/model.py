"""One handle on a trained model: ask it, generate with it, evaluate it, write it elsewhere."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.config import Config
from seqpe_jax.data.images import normalize_pixels
from seqpe_jax.data.tokenizers import Tokenizer, decode_continuation
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.distributed.progress import ProgressLine
from seqpe_jax.encodings.seqpe import SeqPE
from seqpe_jax.errors import InputError, encode_utf8
from seqpe_jax.inference import export
from seqpe_jax.inference import generate as generation
from seqpe_jax.inference.compiled import CompiledModel
from seqpe_jax.inference.decode import Generation, Sampling
from seqpe_jax.inference.export import PLATFORMS
from seqpe_jax.interop import run_writer, torch_reference
from seqpe_jax.models.build import DataSpec, ModelSpec, Params, Shape
from seqpe_jax.tasks import LanguageModeling, Task, task_class
from seqpe_jax.tasks.evaluate import EvalRequest, evaluate
from seqpe_jax.trees import count

Start = int | Sequence[int] | None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A model and its parameters, from a run, an export, or a checkpoint of others (`seqpe_jax.load`).

    Attributes:
      config: of the run; of an encoder of positions alone, its encoding section says all there is.
      model_spec: the encoding and the network.
      data_spec: what the model took from its data.
      read: reads the parameters; `params` calls it once.
      step: of the training that the parameters come from; 0 for those of others.
      folder: that the model was loaded from, or "".
      mesh: the devices that it runs on.
    """

    config: Config
    model_spec: ModelSpec
    data_spec: DataSpec
    read: Callable[[], Params]
    step: int = 0
    folder: str = ""
    mesh: jax.sharding.Mesh = dataclasses.field(default_factory=lambda: layout.make_mesh(0, 1))

    def __repr__(self) -> str:
        parameters = f"{count(self.params):,} parameters"
        if self.model_spec.network is None:
            return f"Model(encoder of positions, {parameters})"
        model = self.config.model
        origin = f", step {self.step:,} of {self.folder}" if self.folder else ""
        sizes = f"{model.layers} layers of width {model.width}"
        return f"Model({self.config.encoding.name} in {model.kind}, {sizes}, {parameters}{origin})"

    @functools.cached_property
    def params(self) -> Params:
        """The parameters, {"encoding": ..., "model": ...}, float32."""
        return self.read()

    @functools.cached_property
    def compiled(self) -> CompiledModel:
        """The model's compiled programs."""
        return CompiledModel(self.model_spec, self.mesh)

    @functools.cached_property
    def task(self) -> Task:
        """What the model was trained for; its data are opened when they are first asked for.

        Raises:
          InputError: the tokenizer, or the names of the classes, are missing or damaged.
        """
        return task_class(self.config)(self.config, run_dir=self.folder)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of a model of text. Raises: InputError: as `task`, or the model reads images."""
        return self._text.tokenizer

    @property
    def _text(self) -> LanguageModeling:
        task = self.task
        if not isinstance(task, LanguageModeling):
            raise InputError("this model reads images: it has no tokenizer")
        return task

    def logits(self, inputs: Any, start: Start = None) -> jax.Array:
        """Returns logits, float32: [B, L, V] of tokens, [B, V] of images or clips.

        Args:
          inputs: tokens int32[B, L]; images [B, H, W, C] or clips [B, T, H, W, C], either uint8, which are normalised here
            with `sizes.mean` and `sizes.std`, or float32, which must be normalised so already.
          start: the first position in tokens or patches, an int or one per axis; None = the origin.

        Raises:
          InputError: inputs of another kind or size, unknown tokens, pixels that nobody knows how to normalise, positions
            beyond the digits, an encoder alone.
        """
        if self.model_spec.network is None:
            raise InputError("this is a position encoder alone: it has no logits, only encode_positions")
        inputs = self._checked(jnp.asarray(inputs))
        first = self._start(start, self.model_spec.grid_of(inputs.shape))
        return self.compiled.logits(self.params, inputs, first)

    def encode_positions(self, positions: Any) -> jax.Array:
        """Returns the vectors of positions, float32[R, E].

        Args:
          positions: [R] or [R, A], in tokens or patches; fractions of one where encoding.fraction_digits writes them.

        Raises:
          InputError: the encoding has no vectors, or positions beyond the digits.
        """
        encoder = self.model_spec.encoder
        if encoder is None:
            raise InputError("this model has no encoder of positions: only 'seq_pe' with its own weights has vectors")
        given = np.asarray(positions)
        places_RA = given[:, None] if given.ndim == 1 else given
        if places_RA.ndim != 2 or places_RA.shape[1] != encoder.axes:
            raise InputError(f"positions must be int32[R, {encoder.axes}] (or float32), got shape {given.shape}")
        unit = self.model_spec.position_grid.position_resolution
        exact_RA = places_RA.astype(np.float64) * unit
        units_RA = np.rint(exact_RA).astype(np.int64)
        between = np.abs(exact_RA - units_RA) > 0.05  # more than float32 rounds
        if between.any():
            raise InputError(
                f"position {places_RA[between][0]} lies between those that encoding.fraction_digits="
                f"{self.config.encoding.fraction_digits} writes, which are 1/{unit} apart: round positions first"
            )
        _check_reach(encoder, units_RA)
        return self.compiled.vectors_of(self.params, jnp.asarray(units_RA, jnp.int32))

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        window: int | None = None,
    ) -> str | list[str]:
        """Returns the text that follows a prompt, or each of several.

        Args:
          temperature: 0 = always the likeliest token; larger = more varied text.
          top_p: draw from the likeliest tokens that together reach this probability; seed: of the draws.
          window: length of the window, in tokens; a learned table, encoding.scaling and encoding.resize='interpolate' need it
            for texts longer than in training, since their positions depend on it. Other encodings do not read it.

        Raises:
          InputError: a model of images, an empty prompt, values out of range, too long a text for the positions, a window
            that is missing or not read.
        """
        asked = Sampling(max_new_tokens, temperature, top_p, seed)
        generation.check_generation(self.config, [1], asked, window, max_grid=self.model_spec.max_grid)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        tokens = self._text.prompts([encode_utf8(text) for text in prompts])
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, self.tokenizer.eos_id)
        line = ProgressLine(len(prompts) * max_new_tokens, label="token")
        found = self.continuations(
            tokens, sampling, window=window, progress=lambda done, total: line.update(done, total=total)
        )
        line.close()
        texts = [decode_continuation(self.tokenizer, ids, one.content) for ids, one in zip(tokens, found, strict=True)]
        return texts[0] if isinstance(prompt, str) else texts

    def continuations(self, prompts: Sequence[np.ndarray], sampling: Sampling, **options: Any) -> list[Generation]:
        """Returns what follows prompts of token ids; options as of `inference.generate.generate`."""
        return generation.generate(
            self.compiled, self.config, self.params, prompts, sampling, self._text.known_V, **options
        )

    def evaluate(
        self,
        lengths: Sequence[int] = (),
        sizes: Sequence[int | Shape] = (),
        split: str = "test",
        contexts: Sequence[int] = (),
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Returns the results that `evaluate` prints, one for each length, size or context.

        Args:
          lengths: of a model of text; sizes: of a model of images, sides in pixels, (height, width) or (frames,
            height, width).
          split: "validation" or "test"; options: further fields of `tasks.evaluate.EvalRequest`.
          contexts: of a model of text, in tokens: the same tokens are scored under each of them. Where neither lengths,
            sizes nor contexts are given: those of the config's eval section.

        Raises:
          InputError: a length, size or context that cannot be evaluated, data that cannot be read.
        """
        request = EvalRequest(
            lengths=tuple((length,) for length in lengths),
            sizes=tuple((size, size) if isinstance(size, int) else tuple(size) for size in sizes),
            split=split,
            contexts=tuple(contexts),
            **options,
        )
        return evaluate(self, request)[0]["results"]

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the model as a run that every command takes. Raises: InputError: the folder is taken."""
        known = bool(self.folder or self.config.data.tokenizer)
        copy_assets = self.task.copy_assets if known else None
        run_writer.write_run(folder, self.config, self.params, self.data_spec, self.step, save_assets=copy_assets)

    def export(
        self,
        folder: str | os.PathLike,
        *,
        max_length: int | None = None,
        max_size: int | None = None,
        platforms: Sequence[str] = PLATFORMS,
    ) -> None:
        """Writes the model as a folder that runs with JAX alone (see `seqpe_jax.export`).

        Args:
          max_length: longest window, in tokens; max_size: largest side, in pixels; None = the largest that the config
            trains on or evaluates.

        Raises:
          InputError: a range that the positions do not reach, an unknown platform, the folder is taken.
        """
        export.write_export(self, folder, max_length, max_size, platforms)

    def save_reference(self, folder: str | os.PathLike) -> dict[str, Any]:
        """Writes the model in the layout of the PyTorch reference, and returns what went where.

        Raises:
          InputError: a field that the reference has nothing like, or the folder is taken.
        """
        return torch_reference.write_reference(self, folder)

    def _checked(self, inputs: jax.Array) -> jax.Array:
        """The inputs of a call. Raises: InputError: of another kind, or unknown tokens."""
        rank = len(self.model_spec.inputs.shape)
        if inputs.ndim != rank:
            wanted = {2: "tokens int32[B, L]", 4: "images float32[B, H, W, C]", 5: "clips float32[B, T, H, W, C]"}[rank]
            raise InputError(f"this model reads {wanted}, got an array of shape {inputs.shape}")
        if self.model_spec.is_image:
            if inputs.shape[-1] != self.data_spec.channels:
                raise InputError(
                    f"this model reads {self.data_spec.channels} channel(s), got an array of shape {inputs.shape}"
                )
            return self._normalised(inputs)
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise InputError(f"this model reads tokens int32[B, L], got {inputs.dtype}: use model.tokenizer on text")
        if inputs.size and not 0 <= int(inputs.min()) <= int(inputs.max()) < self.data_spec.vocabulary:
            raise InputError(
                f"tokens {int(inputs.min())} to {int(inputs.max())} are not all in the vocabulary, 0 to "
                f"{self.data_spec.vocabulary - 1}"
            )
        return inputs

    def _normalised(self, images: jax.Array) -> jax.Array:
        """Images as the network reads them, float. Raises: InputError: whole numbers that cannot be normalised."""
        if jnp.issubdtype(images.dtype, jnp.floating):
            return images
        if images.dtype != jnp.uint8:
            raise InputError(
                f"this model reads images of uint8 (0 to 255), or normalised ones of float32, got {images.dtype}"
            )
        if not self.data_spec.mean:
            raise InputError(
                "this model does not know the mean and deviation of its images, so it cannot normalise uint8: give "
                "float32, normalised as in its training"
            )
        return jnp.asarray(normalize_pixels(np.asarray(images), self.data_spec.mean, self.data_spec.std))

    def _start(self, start: Start, shape: Shape) -> Shape:
        """The first position in tokens or patches along each axis. Raises: InputError: it cannot be."""
        first = np.zeros(len(shape), np.int32) if start is None else np.atleast_1d(np.asarray(start, np.int32))
        whole = start is None or np.issubdtype(np.asarray(start).dtype, np.integer)
        if first.shape != (len(shape),) or not whole:
            raise InputError(f"start must be {len(shape)} int(s), one per axis, got {start!r}")
        kind, position_grid = self.config.encoding.kind, self.model_spec.position_grid
        encoder = self.model_spec.encoder
        if encoder is not None:
            _check_reach(
                encoder, np.asarray(position_grid.positions(shape)) + position_grid.position_resolution * first
            )
        elif first.any() and "given" in self.params["encoding"]:
            raise InputError("start= makes no sense with given vectors: they are those of the positions read")
        elif first.any() and kind in ("learned", "sinusoidal") and len(shape) > 1:
            raise InputError(f"encoding '{kind}' has no grids elsewhere: leave start at the origin")
        return tuple(first.tolist())


def _check_reach(encoder: SeqPE, positions: np.ndarray) -> None:
    """Refuses positions, in units, that the digits cannot write, or an export's table does not hold. Raises: InputError."""
    end = min(encoder.table_sides) * encoder.table_stride if encoder.table_sides else encoder.base**encoder.digits
    if positions.size and (positions.min() < 0 or positions.max() >= end):
        worst = positions.max() if positions.min() >= 0 else positions.min()
        what = (
            "this export holds" if encoder.table_sides else f"{encoder.digits} digits in base {encoder.base} can write"
        )
        raise InputError(f"position {worst} is outside 0 .. {end - 1}, what {what}")
