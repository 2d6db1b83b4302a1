"""`Model`, the public handle on a trained model: logits, position vectors, generation, evaluation, saving and export."""

import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.axes import size_label
from seqpe_jax.config import Config, check_size
from seqpe_jax.data.images import eval_example, normalize_pixels, read_image
from seqpe_jax.data.tokenizers import Tokenizer, decode_continuation
from seqpe_jax.distributed.progress import ProgressLine
from seqpe_jax.distributed.sharding import batch_shards, make_mesh
from seqpe_jax.encodings.seqpe import SeqPE
from seqpe_jax.errors import InputError, encode_utf8
from seqpe_jax.inference import export
from seqpe_jax.inference import generate as generation
from seqpe_jax.inference.compiled import CompiledModel, compiled_model
from seqpe_jax.inference.decode import Generation, Sampling
from seqpe_jax.inference.export import PLATFORMS
from seqpe_jax.interop import hf_decoders, hf_images, run_writer, torch_reference
from seqpe_jax.losses.task import likeliest_classes
from seqpe_jax.models.build import DataSpec, ModelSpec, Params, Shape
from seqpe_jax.run_dir import RunDir
from seqpe_jax.tasks import LanguageModeling, Task, task_class
from seqpe_jax.tasks.evaluate import EvalRequest, evaluate
from seqpe_jax.tasks.predictions import top_classes
from seqpe_jax.trees import num_params

Start = int | Sequence[int] | None
ImageInput = str | os.PathLike | np.ndarray  # a file, or uint8[H, W, C]
RAW_PIXELS = 4.0  # times the largest normalized pixel: float images beyond are not normalized


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A model and its parameters, from a run, an export, or a PyTorch or Hugging Face checkpoint (`seqpe_jax.load`).

    Attributes:
      config: config of the run; of a position encoder alone, only its encoding section is meaningful.
      model_spec: encoding and network.
      data_spec: vocabulary or classes, channels and pixel statistics.
      load_params: returns the parameters; called once, by `params`.
      step: training step of the parameters; 0 for those of other programs.
      folder: folder of the run or export that the model was loaded from, or "".
      mesh: devices that it runs on.
      source: path of the other program's checkpoint that the model was loaded from, or "".
      averaged: the parameters are the average of a run's (`loading.open_model`).
    """

    config: Config
    model_spec: ModelSpec
    data_spec: DataSpec
    load_params: Callable[[], Params]
    step: int = 0
    folder: str = ""
    mesh: jax.sharding.Mesh = dataclasses.field(default_factory=lambda: make_mesh(0, 1))
    source: str = ""
    averaged: bool = False

    def __repr__(self) -> str:
        parameters = f"{num_params(self.params):,} parameters"
        if self.model_spec.network is None:
            return f"Model(encoder of positions, {parameters})"
        model = self.config.model
        origin = f", step {self.step:,} of {self.folder}" if self.folder else ""
        origin += ", averaged" * self.averaged
        sizes = f"{model.layers} layers of width {model.width}"
        return f"Model({self.config.encoding.name} in {model.kind}, {sizes}, {parameters}{origin})"

    @functools.cached_property
    def params(self) -> Params:
        """The parameters, {"encoding": ..., "model": ...}, float32."""
        return self.load_params()

    @functools.cached_property
    def compiled(self) -> CompiledModel:
        """The model's functions, compiled at their first call."""
        return compiled_model(self.model_spec, self.mesh)

    @functools.cached_property
    def task(self) -> Task:
        """The task that the model was trained for; it opens its data at their first use.

        Raises:
          InputError: the tokenizer or the class names are missing or damaged.
        """
        task = task_class(self.config)(self.config, run_dir=self.folder)
        if (
            self.config.is_image and not self.folder
        ):  # pixels as the checkpoint says, which may not be those of its data
            task.data_spec = self.data_spec
        return task

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of a language model. Raises: InputError: as `task`, or the model reads images."""
        return self._text.tokenizer

    @property
    def _text(self) -> LanguageModeling:
        task = self.task
        if not isinstance(task, LanguageModeling):
            raise InputError("this model reads images: it has no tokenizer")
        return task

    def logits(self, inputs: Any, start: Start = None) -> jax.Array:
        """Returns logits, float32: [B, L, V] for tokens, [B, V] for images or videos.

        Args:
          inputs: tokens int32[B, L]; images [B, H, W, C] or videos [B, T, H, W, C]. uint8 pixels are normalized here with
            `data_spec.mean` and `data_spec.std`; float32 pixels must be normalized so already, and those that go far beyond
            (0 to 255) are refused.
          start: first position in tokens or patches, an int or one per axis; None = the origin.

        Raises:
          InputError: inputs of another kind or size, unknown tokens, pixels without known statistics or not normalized, positions beyond the
            digits, or a position encoder alone.
        """
        if self.model_spec.network is None:
            raise InputError("this is a position encoder alone: it has no logits, only encode_positions")
        inputs = self._checked_inputs(jnp.asarray(inputs))
        first = self._checked_start(start, self.model_spec.grid_of(inputs.shape))
        return self.compiled.logits(self.params, inputs, first)

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes of a model of images, by label, as far as its folder has them; () = unknown."""
        return (RunDir(self.folder).class_names or ()) if self.folder else hf_images.class_names(self.source)

    def predict(
        self, images: ImageInput | Sequence[ImageInput], size: int | Shape | None = None, *, top: int = 5
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Returns the likeliest classes of an image, or of each of several.

        Images are decoded, rotated upright, resized and cropped as in an evaluation, and normalized with `data_spec`.

        Args:
          images: a file, or uint8[H, W, C] of any size; or several of them.
          size: side or (height, width) in pixels that the model reads; None = that of training.
          top: number of classes.

        Returns:
          {"file": its name, or None of an array, "top": [(class, probability), ...]}, the likeliest class first.

        Raises:
          InputError: a model of text or videos, a size beyond the positions, or a file that is no image or damaged.
        """
        if isinstance(images, str | os.PathLike) or isinstance(images, np.ndarray) and images.ndim == 3:
            ((found,),) = self._predictions([images], size, top)
            return found
        items, results = list(images), []
        line = ProgressLine(len(items), label="image")
        for part in self._predictions(items, size, top):
            results += part
            line.update(len(results))
        line.close()
        return results

    def _predictions(
        self, images: Sequence[ImageInput], size: int | Shape | None, top: int
    ) -> Iterator[list[dict[str, Any]]]:
        """Yields the predictions of `predict`, batch by batch."""
        sides = self._image_sides(size)
        if top < 1:
            raise InputError(f"top must be at least 1, got {top}")
        rows = max(1, self.config.eval.batch_tokens // math.prod(self.config.grid_of(sides)))
        shards = batch_shards(self.mesh)
        rows = -(-min(rows, len(images) or 1) // shards) * shards
        prepare = functools.partial(self._prepared_image, sides=sides)
        with concurrent.futures.ThreadPoolExecutor(max(1, self.config.data.threads)) as pool:
            for first in range(0, len(images), rows):
                pixels_B = list(pool.map(prepare, images[first : first + rows]))
                padding = [pixels_B[0]] * (rows - len(pixels_B))
                likeliest = likeliest_classes(self.logits(np.stack([*pixels_B, *padding])), top)
                labels_BK, probabilities_BK = map(np.asarray, (likeliest["classes"], likeliest["probabilities"]))
                yield [
                    {
                        "file": None if isinstance(image, np.ndarray) else os.fspath(image),
                        "top": top_classes(labels_BK[row], probabilities_BK[row], self.class_names),
                    }
                    for row, image in enumerate(images[first : first + rows])
                ]

    def _image_sides(self, size: int | Shape | None) -> Shape:
        """Returns the (height, width) that images are read at. Raises: InputError: no model of images, or not possible."""
        if not self.model_spec.is_image or len(self.config.data.size) != 2:
            kind = "videos: give frames to logits" if self.model_spec.is_image else "text: it predicts no classes"
            raise InputError(f"this model reads {kind}")
        sides = self.config.data.size if size is None else (size, size) if isinstance(size, int) else tuple(size)
        check_size(self.config, sides, "size")
        grid, max_grid = self.config.grid_of(sides), self.model_spec.max_grid
        if max_grid is not None and any(count > most for count, most in zip(grid, max_grid, strict=True)):
            raise InputError(
                f"size {size_label(sides)} is beyond the exported range: choose less, or export the run again with "
                f"--max-size={max(sides)}"
            )
        return sides

    def _prepared_image(self, image: ImageInput, sides: Shape) -> np.ndarray:
        """Returns an image as an evaluation reads it, uint8[H, W, C]. Raises: InputError: it cannot be read."""
        channels = self.data_spec.channels
        pixels = image
        if not isinstance(image, np.ndarray):
            pixels = read_image(os.fspath(image), channels, self.config.data.bit_depth, self.config.data.max_pixels)
        elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != channels:
            raise InputError(f"an image must be uint8[height, width, {channels}], got {image.dtype}{list(image.shape)}")
        return eval_example({"image": pixels, "label": 0}, sides, self.config.data.crop_ratio)["images"]

    def encode_positions(self, positions: Any) -> jax.Array:
        """Returns SeqPE's vectors of positions, float32[R, E].

        Args:
          positions: [R] or [R, A], in tokens or patches; fractional as far as encoding.fraction_digits allows.

        Raises:
          InputError: the encoding has no vectors, or positions beyond the digits.
        """
        encoder = self.model_spec.encoder
        if encoder is None:
            raise InputError("this model has no encoder of positions: only 'seq_pe' with its own weights has vectors")
        positions = np.asarray(positions)
        positions_RA = positions[:, None] if positions.ndim == 1 else positions
        if positions_RA.ndim != 2 or positions_RA.shape[1] != encoder.dims.axes:
            raise InputError(
                f"positions must be int32[R, {encoder.dims.axes}] (or float32), got shape {positions.shape}"
            )
        resolution = self.model_spec.position_grid.position_resolution
        scaled_RA = positions_RA.astype(np.float64) * resolution
        fixed_point_RA = np.rint(scaled_RA).astype(np.int64)
        inexact = np.abs(scaled_RA - fixed_point_RA) > 0.05  # more than float32 rounds
        if inexact.any():
            raise InputError(
                f"position {positions_RA[inexact][0]} is no multiple of 1/{resolution}, the resolution of encoding.fraction_digits="
                f"{self.config.encoding.fraction_digits}: round positions first"
            )
        _check_digits(encoder, fixed_point_RA)
        return self.compiled.vectors_of(self.params, jnp.asarray(fixed_point_RA, jnp.int32))

    def position_curves(
        self, size: int | Shape | None = None, tokens: Sequence[int] | np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Returns what attention gains by distance in each layer and head (`CompiledModel.position_curves`); {} = nothing.

        Args:
          size: tokens of the window, or the size of images in pixels; None = that of training.
          tokens: int32[L], a text on which forget gates are measured; None = they are left out.

        Raises:
          InputError: positions beyond the digits, more tokens than the window, or a position encoder alone.
        """
        if self.model_spec.network is None:
            raise InputError("this is a position encoder alone: it has no attention, only encode_positions")
        grid = self.model_spec.shape
        if size is not None:
            sides = (size,) if isinstance(size, int) else tuple(size)
            if len(sides) != len(grid):
                raise InputError(f"size must have {len(grid)} number(s), one per axis, got {size!r}")
            grid = self.model_spec.grid_of((1, *sides, 1)) if self.model_spec.is_image else sides
        if min(grid) < 1:
            raise InputError(f"size {size} has no position: choose a larger one")
        if tokens is not None and not 1 <= len(tokens) <= grid[0]:
            raise InputError(f"tokens must be 1 to {grid[0]} of the window, got {len(tokens)}: set a larger size")
        self._checked_start(None, grid)
        text_L = None if tokens is None else np.asarray(tokens, np.int32)
        return self.compiled.position_curves(self.params, grid, text_L) or {}

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        window: int | None = None,
    ) -> str | list[str]:
        """Returns the text that follows a prompt, or one text for each of several prompts.

        Args:
          prompt: one or several; "" begins at the tokenizer's start token.
          max_new_tokens: tokens generated for each prompt, at most.
          temperature: 0 = always the most likely token; larger = more varied text.
          top_p: nucleus sampling from the most likely tokens that together reach this probability.
          top_k: sampling from so many of the most likely tokens; 0 = all.
          seed: seed of the random draws.
          window: tokens; a learned table, encoding.scaling and encoding.resize='interpolate' need it for texts longer than in
            training, since their positions depend on it. Other encodings do not use it.

        Raises:
          InputError: a model of images, an empty prompt without a start token, values out of range, a text too long for the positions, or a window
            that is missing or not used.
        """
        asked = Sampling(max_new_tokens, temperature, top_p, seed, top_k=top_k)
        generation.check_generation(self.config, [1], asked, window, max_grid=self.model_spec.max_grid)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        tokens = self._text.prompts([encode_utf8(text) for text in prompts])
        sampling = dataclasses.replace(asked, end=self.tokenizer.eos_id)
        line = ProgressLine(len(prompts) * max_new_tokens, label="token")
        found = self.continuations(
            tokens, sampling, window=window, progress=lambda done, total: line.update(done, total=total)
        )
        line.close()
        texts = [decode_continuation(self.tokenizer, ids, one.content) for ids, one in zip(tokens, found, strict=True)]
        return texts[0] if isinstance(prompt, str) else texts

    def continuations(self, prompts: Sequence[np.ndarray], sampling: Sampling, **options: Any) -> list[Generation]:
        """Returns the generations for prompts of token ids; options: of `inference.generate.generate`."""
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

        Without lengths, sizes and contexts, those of the config's eval section are evaluated.

        Args:
          lengths: tokens, for a language model.
          sizes: pixels, for a model of images: sides, (height, width) or (frames, height, width).
          split: "validation" or "test".
          contexts: tokens, for a language model: the same tokens are scored under each context.
          options: further fields of `tasks.evaluate.EvalRequest`.

        Raises:
          InputError: a length, size or context that cannot be evaluated, or data that cannot be read.
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
        """Writes the model as a run's folder, which every command takes. Raises: InputError: the folder is taken."""
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
        """Writes the model as a folder that runs with JAX alone (`inference.export`).

        Args:
          folder: new or empty.
          max_length: longest window, tokens; None = the longest that the config trains on or evaluates.
          max_size: largest side, pixels; None = the largest that the config trains on or evaluates.
          platforms: some of "cpu", "cuda" and "tpu".

        Raises:
          InputError: a range beyond the positions, an unknown platform, or the folder is taken.
        """
        export.write_export(self, folder, max_length, max_size, platforms)

    def save_reference(self, folder: str | os.PathLike) -> dict[str, Any]:
        """Writes the model as a checkpoint of the PyTorch reference, and returns a report of the conversion.

        Raises:
          InputError: a field without a counterpart in the reference, or the folder is taken.
        """
        return torch_reference.write_reference(self, folder)

    def save_huggingface(self, folder: str | os.PathLike, dtype: str = "float32") -> dict[str, Any]:
        """Writes the model as a folder that `transformers.AutoModelForCausalLM` opens, and returns a report.

        Args:
          folder: new or empty.
          dtype: of the stored weights, "float32", "bfloat16" or "float16".

        Raises:
          InputError: positions or parts that no architecture of Hugging Face has, or the folder is taken.
        """
        return hf_decoders.write(self, folder, dtype)

    def _checked_inputs(self, inputs: jax.Array) -> jax.Array:
        """Returns valid inputs, pixels normalized. Raises: InputError: another kind or size, or unknown tokens."""
        rank = len(self.model_spec.inputs.shape)
        if inputs.ndim != rank:
            wanted = {2: "tokens int32[B, L]", 4: "images float32[B, H, W, C]", 5: "videos float32[B, T, H, W, C]"}[
                rank
            ]
            raise InputError(f"this model reads {wanted}, got an array of shape {inputs.shape}")
        if self.model_spec.is_image:
            if inputs.shape[-1] != self.data_spec.channels:
                raise InputError(
                    f"this model reads {self.data_spec.channels} channel(s), got an array of shape {inputs.shape}"
                )
            return self._normalized(inputs)
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise InputError(f"this model reads tokens int32[B, L], got {inputs.dtype}: use model.tokenizer on text")
        if inputs.size and not 0 <= int(inputs.min()) <= int(inputs.max()) < self.data_spec.vocabulary:
            raise InputError(
                f"tokens {int(inputs.min())} to {int(inputs.max())} are not all in the vocabulary, 0 to "
                f"{self.data_spec.vocabulary - 1}"
            )
        return inputs

    def _normalized(self, images: jax.Array) -> jax.Array:
        """Returns float images. Raises: InputError: integers that cannot be normalized."""
        if jnp.issubdtype(images.dtype, jnp.floating):
            if self.data_spec.mean and images.size:
                limits = [
                    max(mean, 1 - mean) / std for mean, std in zip(self.data_spec.mean, self.data_spec.std, strict=True)
                ]
                largest = float(jnp.abs(images).max())
                if largest > RAW_PIXELS * max(limits):
                    raise InputError(
                        f"float images must be normalized, at most about {max(limits):.1f} here, got {largest:.4g}: give uint8, "
                        "which is normalized here, or subtract data_spec.mean and divide by data_spec.std of pixels in 0 to 1"
                    )
            return images
        if images.dtype != jnp.uint8:
            raise InputError(
                f"this model reads images of uint8 (0 to 255), or normalized ones of float32, got {images.dtype}"
            )
        if not self.data_spec.mean:
            raise InputError(
                "this model does not know the mean and deviation of its images, so it cannot normalise uint8: give "
                "float32, normalized as in its training"
            )
        return jnp.asarray(normalize_pixels(np.asarray(images), self.data_spec.mean, self.data_spec.std))

    def _checked_start(self, start: Start, shape: Shape) -> Shape:
        """Returns the first position in tokens or patches along each axis. Raises: InputError: not possible."""
        first = np.zeros(len(shape), np.int32) if start is None else np.atleast_1d(np.asarray(start, np.int32))
        is_integer = start is None or np.issubdtype(np.asarray(start).dtype, np.integer)
        if first.shape != (len(shape),) or not is_integer:
            raise InputError(f"start must be {len(shape)} int(s), one per axis, got {start!r}")
        kind, position_grid = self.config.encoding.kind, self.model_spec.position_grid
        encoder = self.model_spec.encoder
        if encoder is not None:
            _check_digits(
                encoder, np.asarray(position_grid.positions(shape)) + position_grid.position_resolution * first
            )
        elif first.any() and "given" in self.params["encoding"]:
            raise InputError("start= makes no sense with given vectors: they are those of the positions read")
        elif first.any() and kind in ("learned", "sinusoidal") and len(shape) > 1:
            raise InputError(f"encoding '{kind}' serves grids at the origin only: leave start out")
        return tuple(first.tolist())


def _check_digits(encoder: SeqPE, positions: np.ndarray) -> None:
    """Refuses fixed-point positions that the digits cannot represent, or that an export's table lacks. Raises: InputError."""
    end = (
        min(encoder.table_sides) * encoder.table_stride
        if encoder.table_sides
        else encoder.config.base**encoder.config.num_digits
    )
    if positions.size and (positions.min() < 0 or positions.max() >= end):
        worst = positions.max() if positions.min() >= 0 else positions.min()
        range_of = f"{encoder.config.num_digits} digits in base {encoder.config.base}"
        if encoder.table_sides:
            range_of = "this export"
        raise InputError(f"position {worst} is outside 0 .. {end - 1}, the range of {range_of}")
