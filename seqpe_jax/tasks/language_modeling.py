"""Language modeling: text in windows of tokens, next-token loss, perplexity at any length."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.config import Config, check_positions
from seqpe_jax.data import loader, registry, tokens
from seqpe_jax.data.formats import HEAD_BYTES, check_plain_text, strip_bom
from seqpe_jax.data.paths import warn
from seqpe_jax.data.token_encoder import special_pattern
from seqpe_jax.data.tokenizers import (
    BYTES_WITH_END,
    TOKENIZER_FILE,
    ByteTokenizer,
    RoundTrip,
    RoundTripLoss,
    decode_continuation,
    load_tokenizer,
)
from seqpe_jax.distributed.processes import is_main_process, is_multiprocess
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path
from seqpe_jax.losses.task import Documents, NextTokenLoss
from seqpe_jax.metric_registry import training_metrics
from seqpe_jax.models.build import DataSpec
from seqpe_jax.run_dir import RunDir
from seqpe_jax.tasks.base import EvalContext, Evaluator, ExportSignature, Task
from seqpe_jax.tasks.metrics import RecordLosses, SplitSize, perplexity, perplexity_by_source, perplexity_in_context
from seqpe_jax.tasks.predictions import WriteRecord, rounded


class LanguageModeling(Task):
    """Language modeling on the text of a config, which is tokenized when it is first read.

    Args:
      config: config of the run.
      data_available: whether the data can be read; if not, a model that names its vocabulary needs no tokenizer.
      run_dir: folder of the run whose tokenizer it must be; "" = a new run.

    Attributes:
      tokenizer: tokenizer of the text.
      known_V: bool[V], whether an id of the model is a token; its vocabulary may be larger than the tokenizer's.

    Raises:
      InputError: the tokenizer is missing, cannot be read, has more tokens than the model, or is not that of the run.
    """

    kind = "language_modelling"
    count_name = "tokens"
    size_name = "length"
    metric_names = training_metrics("text")

    def __init__(self, config: Config, data_available: bool = True, run_dir: str | os.PathLike = ""):
        self.config, self._run_dir = config, run_dir
        self.task_loss: NextTokenLoss = NextTokenLoss(z_loss=config.objective.z_loss)
        self.example = {"tokens": jax.ShapeDtypeStruct((config.data.length + 1,), jnp.int32)}
        self.count_per_step = config.batch_size * config.data.length
        stored = RunDir(run_dir).data_spec if run_dir else None
        vocabulary = config.model.vocabulary or (stored.vocabulary if stored else 0)
        self.data_spec = DataSpec(vocabulary=vocabulary)
        if vocabulary and not data_available:
            if config.data.packing == "documents":  # to be compiled alone: any id makes the same program
                self.task_loss = dataclasses.replace(self.task_loss, documents=self._documents(vocabulary - 1))
            return
        if not config.data.tokenizer:
            raise InputError(
                f"this checkpoint came without a tokenizer: put its {TOKENIZER_FILE} next to its config.json, or name one with "
                "--tokenizer when it is converted"
            )
        try:
            self.tokenizer = load_tokenizer(config.data.tokenizer)
        except InputError as error:
            if data_available:
                raise
            raise InputError(
                f"{error}, or only the number of its tokens (GPT-2's: --config.model.vocabulary=50257)"
            ) from error
        vocabulary = vocabulary or self.tokenizer.vocab_size
        if self.tokenizer.vocab_size > vocabulary:
            fix = f"set model.vocabulary to {self.tokenizer.vocab_size} or more, or to 0, which takes the tokenizer's"
            if run_dir:
                fix = "use the tokenizer that the model was trained with"
            raise InputError(
                f"data.tokenizer={config.data.tokenizer} has {self.tokenizer.vocab_size} tokens, but the model only "
                f"{vocabulary} (model.vocabulary): {fix}"
            )
        self.data_spec = DataSpec(vocabulary=vocabulary)
        self.known_V = np.isin(np.arange(vocabulary), self.tokenizer.ids)
        if run_dir:
            self.check_assets(run_dir)
            stored_tokenizer = as_path(run_dir) / TOKENIZER_FILE
            # The run's own copy: the token that ends a text stays what it was when the run began.
            if stored_tokenizer.exists() and str(run_dir) != config.init_from:
                self.tokenizer = load_tokenizer(stored_tokenizer)
        if config.data.packing == "documents":
            self.task_loss = dataclasses.replace(self.task_loss, documents=self._documents(self.tokenizer.eos_id))

    def _documents(self, end: int | None) -> Documents:
        """Returns the reading of windows in documents; end: token that ends one. Raises: InputError: there is none."""
        config = self.config
        if end is None:
            fix = "give one that has"
            if self.tokenizer.name == ByteTokenizer.name:
                fix = f"set data.tokenizer='{BYTES_WITH_END}', with byte 255 as the end, which no text has"
            raise InputError(
                f"data.packing='documents': data.tokenizer={config.data.tokenizer} has no EOS token to tell where a document "
                f"ends: {fix}"
            )
        return Documents(end, config.encoding.reset_fields if config.data.reset_positions else ())

    @property
    def document_end(self) -> int | None:
        """Token after which nothing is scored: the next one is of another document; None = all tokens are."""
        return self.task_loss.documents and self.task_loss.documents.end

    @functools.cache  # noqa: B019  a process has few tasks
    def source(self, split: str) -> tokens.TokenSource:
        """Returns the tokens of a split, of all sources of a mixture. Raises: InputError: the data cannot be read."""
        found = self.sources(split)
        return tokens.joined_source(found) if self.config.data.mixture else found[""]

    @functools.cache  # noqa: B019
    def sources(self, split: str) -> dict[str, tokens.TokenSource]:
        """Returns the tokens of a split by source; without a mixture, those of "". Raises: InputError: as `source`."""
        data = self.config.data
        places = {one.name: (one.paths, one.prepared) for one in data.mixture} or {"": (data.paths, data.prepared)}
        found = {}
        for name, (paths, prepared) in places.items():
            try:
                found[name] = tokens.token_source(
                    data.name,
                    split=split,
                    tokenizer=self.tokenizer,
                    paths=paths,
                    cache_dir=data.cache_dir,
                    progress=is_main_process(),
                    accept_lossy=data.lossy_tokenizer,
                    prepared=prepared,
                    max_bytes=tokens.MAX_BYTES_PER_HOST if is_multiprocess() else None,
                    options=registry.get(data.name).options_of(data),
                )
            except InputError as error:
                if not name:
                    raise
                raise InputError(f"data.mixture.{name}: {error}") from error
        return found

    @functools.cached_property
    def _mixture(self) -> loader.Mixture:
        """Training windows of the sources of `data.mixture`."""
        config = self.config
        windows = {}
        for name, source in self.sources("train").items():
            try:
                windows[name] = loader.training_windows(source.tokens, config.data.length)
            except InputError as error:
                raise InputError(f"data.mixture.{name}: {error}") from None
        phases = [(step * config.batch_size, weights) for step, weights in self._mixture_phases()]
        return loader.Mixture(windows, phases, config.seed)

    def _mixture_phases(self) -> list[tuple[int, dict[str, float]]]:
        """Returns (first step, weight of each source) for each change of weights that a resumed run has recorded."""
        weights = {source.name: source.weight for source in self.config.data.mixture}
        if not self._run_dir or str(self._run_dir) == self.config.init_from:
            return [(0, weights)]
        run = RunDir(self._run_dir)
        stored = {source.name: source.weight for source in run.config.data.mixture}
        changes = []
        for entry in run.config_history():
            of_entry = {name.split(".")[2]: pair for name, pair in entry["changes"].items() if _is_weight(name)}
            if of_entry:
                changes.append((entry["step"], of_entry))
        began = dict(stored)
        for _, of_entry in reversed(changes):
            began |= {name: old for name, (old, _) in of_entry.items()}
        phases = [(0, began)]
        for step, of_entry in changes:
            phases.append((step, phases[-1][1] | {name: new for name, (_, new) in of_entry.items()}))
        if len(phases) > 1 and phases[-1][1] != stored:  # of a start that was killed before it wrote config.json
            phases.pop()
        if weights != stored:
            phases.append((run.latest_step() or 0, weights))
        return phases

    def describe(self) -> str:
        """Returns a description of the training data for the log."""
        source, config = self.source("train"), self.config
        lines = [
            f"{len(source.tokens):,} training tokens, windows of {config.data.length}, {config.batch_size} to a batch"
        ]
        end = self.tokenizer.eos_id
        if end is not None:
            is_byte = self.tokenizer.name == ByteTokenizer.name
            lines.append(f"texts end with {f'byte {end}' if is_byte else self._describe_token(end)}")
        else:
            lines.append("no EOS token: documents are concatenated, and generation continues to its limit")
        if self.task_loss.documents is not None:
            positions = "begin anew in each" if config.data.reset_positions else "continue"
            lines.append(
                f"{source.documents:,} document{'' if source.documents == 1 else 's'}: attention stays inside, positions "
                f"{positions}, and no first token is predicted"
            )
        if config.data.mixture:
            lines += self._describe_mixture()
        return "\n  ".join(lines + self._describe_lost_text(source.round_trip_loss))

    def _describe_mixture(self) -> list[str]:
        """Returns a line for each source: its share, its windows, and how often they are read."""
        config, lines = self.config, []
        given = self._mixture.given(config.steps * config.batch_size)
        for name, source in self.sources("train").items():
            windows = len(loader.training_windows(source.tokens, config.data.length))
            epochs = given[name] / windows
            again = f", read again from about step {round(config.steps / epochs):,} on" if epochs > 1 else ""
            lines.append(
                f"{name}: {config.data.mixture_weights[name]:.4g} of the windows, {len(source.tokens):,} tokens in {windows:,} "
                f"windows, {epochs:.3g} epochs in {config.steps:,} steps{again}"
            )
        return lines

    def _describe_token(self, token: int) -> str:
        return f"{self.tokenizer.decode([token])!r} (token {token})"

    def _describe_lost_text(self, loss: RoundTripLoss) -> list[str]:
        return [f"the tokenizer loses text: {loss} do not survive encoding and decoding"] if loss.lost_bytes else []

    def prompts(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Returns the tokens of prompts, and warns of text that the tokenizer loses; an empty one is the start token.

        Raises:
          InputError: no UTF-8, or an empty prompt where the tokenizer has no start token.
        """
        encoded, trip = self.tokenizer.encode_many(texts), RoundTrip(self.tokenizer, max(1, len(texts)))
        for text in texts:
            trip.add(text)
        if trip.loss.lost_bytes and is_main_process():
            warn(f"prompts: the tokenizer loses text: {trip.loss} do not survive encoding and decoding")
        pattern = special_pattern(self.tokenizer)
        if is_main_process() and (
            spelled := sorted({name.decode() for text in texts for name in pattern.findall(text)})
        ):
            warn(f"prompts: special tokens that they spell are read as plain text: {', '.join(spelled)}")
        start = self.tokenizer.start_id
        if start is None and not all(texts):
            raise InputError(
                f"the prompt is empty, and tokenizer '{self.tokenizer.name}' has no token that texts begin with (bos_token "
                "or eos_token in tokenizer_config.json): give at least one character"
            )
        return [tokens if text else np.array([start], np.int32) for text, tokens in zip(texts, encoded, strict=True)]

    def decode_continuation(self, prompt: np.ndarray, ids: np.ndarray) -> str:
        """Returns the text that generated ids add to the text of a prompt."""
        return decode_continuation(self.tokenizer, prompt, ids)

    def train_loader(self, rows: Sequence[int]) -> loader.TrainLoader:
        """Returns the training batches; this process reads the given rows of each."""
        config = self.config
        windows = (
            self._mixture
            if config.data.mixture
            else loader.training_windows(self.source("train").tokens, config.data.length)
        )
        return loader.TrainLoader(
            windows,
            batch_size=config.batch_size,
            seed=config.seed,
            rows=rows,
            threads=config.data.threads,
        )

    def fingerprint(self, split: str) -> dict[str, Any]:
        """Returns the fingerprint of a split's tokens, and their number. Raises: InputError: the data cannot be read."""
        source = self.source(split)
        return {"tokens": len(source.tokens), "fingerprint": source.fingerprint}

    def save_assets(self, workdir: str | os.PathLike) -> None:
        """Writes the tokenizer's file into a run's folder; bytes need none."""
        if self.tokenizer.name != "bytes":
            self.tokenizer.save(workdir)

    def copy_assets(self, folder: str | os.PathLike) -> None:
        """Writes the tokenizer's file into another folder."""
        self.save_assets(folder)

    def check_assets(self, workdir: str | os.PathLike) -> None:
        """Raises InputError if the tokenizer is not the one that the run began with."""
        stored = as_path(workdir) / TOKENIZER_FILE
        if stored.exists() and load_tokenizer(stored).digest != self.tokenizer.digest:
            raise InputError(
                f"data.tokenizer={self.config.data.tokenizer} is not the tokenizer that the run of {workdir} began with, "
                f"whose copy is {TOKENIZER_FILE} in that folder: use that file or a new --workdir"
            )

    def eval_sizes(self) -> tuple[tuple[int], ...]:
        """Returns the evaluation lengths of the config, each as (length,)."""
        return self.config.eval_sizes

    def grid_of(self, eval_size: tuple[int]) -> tuple[int]:
        """Returns the number of positions of a window, as (length,)."""
        return eval_size

    def export_signature(self, max_grid: tuple[int]) -> ExportSignature:
        """Returns the inputs and outputs of an exported model that serves windows of up to (length,)."""
        (length,), rows, known = max_grid, self.data_spec.vocabulary, self.tokenizer.ids
        example = f"numpy.zeros((1, {min(length, self.config.data.length)}), 'int32')"
        ids = f"of {TOKENIZER_FILE}"
        if self.tokenizer.name == "bytes":
            example = f"numpy.frombuffer(b'def main():'[:{length}], 'uint8').astype('int32')[None]"
            ids = "the bytes of UTF-8 text"
        spare = f"; {rows - len(known)} of the {rows} ids are no tokens" if rows > len(known) else ""
        return ExportSignature(
            "tokens",
            "int32",
            ("batch", "length"),
            {"length": length},
            ("batch", "length", str(rows)),
            example,
            f"token ids 0 to {known[-1]}, {ids}; the logits at an index are those of the token after it{spare}",
        )

    def check_eval_size(self, eval_size: tuple[int], split: str) -> None:
        """Raises InputError if the length cannot be evaluated on the split."""
        (length,), limit = eval_size, self.config.eval.tokens
        check_positions(self.config, length, "evaluation length")
        for name, source in self.sources(split).items():
            tokens = len(source.tokens)
            if tokens < length + 1:
                raise InputError(
                    f"evaluation length {length} is longer than the {split} split of {name or self.config.data.name} "
                    f"({tokens} tokens): choose a length below {tokens}"
                )
        if 0 < limit < length:
            raise InputError(
                f"eval.tokens={limit} (--tokens) is less than evaluation length {length}: raise it to {length} or more, so "
                "that every length scores the same tokens, or choose a shorter length"
            )

    def evaluate(self, ctx: EvalContext, eval_size: tuple[int], split: str) -> dict[str, Any]:
        """Returns the perplexity in windows of one length; of a mixture also that of each source."""
        (length,), limit, end = eval_size, self.config.eval.tokens, self.document_end
        batches = {
            name: loader.eval_windows(source.tokens, length, ctx.batch_size, max_tokens=limit, document_end=end)
            for name, source in self.sources(split).items()
        }
        examples = sum(of_source.examples for of_source in batches.values())
        window = {"length": length}
        arguments = self.perplexity_arguments(ctx, split, window)
        arguments["progress"] = lambda done: ctx.progress(done, examples)
        if not self.config.data.mixture:
            return perplexity(length=length, batches=batches[""], **arguments)
        arguments["split_sizes"] = {name: self._split_size(source) for name, source in self.sources(split).items()}
        arguments["records"] = {name: self._recorder(ctx, window | {"source": name}) for name in batches}
        del arguments["split_size"], arguments["record"]
        return perplexity_by_source(length=length, batches=batches, **arguments)

    def _split_size(self, source: tokens.TokenSource) -> SplitSize:
        return SplitSize(
            len(source.tokens), source.bytes, source.words if self.tokenizer.name != ByteTokenizer.name else None
        )

    def sample_tokens(self, eval_size: tuple[int], split: str) -> np.ndarray:
        """Returns the first window of a split, int32[length]."""
        return np.asarray(self.source(split).tokens[: eval_size[0]], np.int32)

    def perplexity_arguments(self, ctx: EvalContext, split: str, window: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments of `perplexity` that are the same for windows of every length.

        Args:
          ctx: the model.
          split: name of the split.
          window: {"length" or "context": tokens}, with which the records of predictions begin.
        """
        return {
            "token_losses": lambda tokens_BL: ctx.eval_step({"tokens": tokens_BL})["loss"],
            "put": ctx.put,
            "record": self._recorder(ctx, window),
            "split_size": self._split_size(self.source(split)),
        }

    def _recorder(self, ctx: EvalContext, window: dict[str, Any]) -> RecordLosses | None:
        """Returns a function that writes the predictions of a batch; None where nobody asks for them."""
        return functools.partial(self._write_losses, ctx.write_prediction, window) if ctx.write_prediction else None

    def _write_losses(
        self, write: WriteRecord, window: dict[str, Any], batch: dict[str, np.ndarray], losses_BL: np.ndarray
    ) -> None:
        """Writes the losses of the scored tokens of each window of a batch."""
        targets_BL, last = batch["tokens"][:, 1:], batch["tokens"].shape[1] - 2
        for targets_L, losses_L, scored_L, end in zip(
            targets_BL, losses_BL, batch["scored"], batch["end"].tolist(), strict=True
        ):
            if not scored_L.any():  # padding
                continue
            first = int(scored_L.argmax())
            ids, losses = targets_L[first:], rounded(losses_L[first:])
            is_scored = scored_L[first:].tolist()  # with packed documents, not the first token of each
            write(
                {
                    **window,
                    "start": end - last + first,
                    "tokens": ids.tolist(),
                    "losses": [loss if scored else None for loss, scored in zip(losses, is_scored, strict=True)],
                    "text": self.tokenizer.decode(ids),
                }
            )

    def extra_evaluators(self) -> tuple[Evaluator, ...]:
        """Returns the evaluator of the same tokens under contexts of several lengths."""
        return (ContextEvaluator(self),)


@dataclasses.dataclass(frozen=True)
class ContextEvaluator:
    """Loss of the same tokens of text, the targets, under each context length of `eval.contexts`.

    Attributes:
      task: the language modeling task.
      size_name: key of the context length in results.
      metric_names: metrics of a result that are printed.
    """

    task: LanguageModeling
    size_name: str = "context"
    metric_names: tuple[str, ...] = LanguageModeling.metric_names

    @property
    def config(self) -> Config:
        """Config of the run."""
        return self.task.config

    @property
    def task_loss(self) -> NextTokenLoss:
        """Loss that the model is trained with."""
        return self.task.task_loss

    def eval_sizes(self) -> tuple[tuple[int], ...]:
        """Returns the context lengths of the config, each as (context,)."""
        return tuple((context,) for context in self.config.eval.contexts)

    def grid_of(self, eval_size: tuple[int]) -> tuple[int]:
        """Returns the number of positions of a window, as (length,)."""
        return eval_size

    def positions_at(self, eval_size: tuple[int]) -> tuple[int]:
        """Returns the number of positions of a window, as (length,)."""
        return eval_size

    def check_eval_size(self, eval_size: tuple[int], split: str) -> None:
        """Raises InputError if a context is longer than the split."""
        (context,), tokens = eval_size, len(self.task.source(split).tokens)
        if tokens < context + 1:
            raise InputError(
                f"evaluation context {context} is longer than the {split} split of {self.config.data.name} "
                f"({tokens} tokens): choose contexts below {tokens} (eval.contexts, --contexts)"
            )

    def evaluate(self, ctx: EvalContext, eval_size: tuple[int], split: str) -> dict[str, Any]:
        """Returns the perplexity of the targets under one context length."""
        (context,), settings, tokens = eval_size, self.config.eval, self.task.source(split).tokens
        stride = self.config.context_stride
        ends = loader.target_ends(len(tokens), largest=max(settings.contexts), stride=stride, targets=settings.targets)
        end = self.task.document_end
        batches = loader.context_windows(tokens, context, ctx.batch_size, ends, stride, end)
        return perplexity_in_context(
            context=context,
            stride=stride,
            batches=batches,
            progress=lambda done: ctx.progress(done, batches.examples),
            **self.task.perplexity_arguments(ctx, split, {"context": context}),
        )


def prompt_text(content: bytes, name: str) -> str:
    """Returns the text of a file of prompts, without a line break at its end.

    Args:
      content: content of the file.
      name: the option and the file, for messages.

    Raises:
      InputError: the file is no plain UTF-8 text.
    """
    check_plain_text(content[:HEAD_BYTES], name)
    try:
        return strip_bom(content).decode("utf-8").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} cannot be read ({error}): give a UTF-8 text file") from None


def _is_weight(name: str) -> bool:
    """Returns whether a dotted field of a config is the weight of a source of a mixture."""
    return name.startswith("data.mixture.") and name.endswith(".weight")


def with_run_tokenizer(config: Config, workdir: str | os.PathLike) -> Config:
    """Returns a run's config with the tokenizer file of its folder as `data.tokenizer`."""
    stored = as_path(workdir) / TOKENIZER_FILE
    if not stored.exists():
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(stored)))
