"""Suites of probes for any model with a tokenizer: scores by length and depth, and the effective length."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from seqpe_jax import config
from seqpe_jax.config import Config
from seqpe_jax.data import registry
from seqpe_jax.data.datasets.retrieval import NAME as RETRIEVAL
from seqpe_jax.data.retrieval import PromptTooLongError
from seqpe_jax.errors import InputError, suggest

# Percent that RULER asks of a length: the score of Llama 2 7B at 4,096 tokens.
EFFECTIVE_SCORE = 85.6
EXAMPLES = 50  # prompts of a probe at each length
SPARE_TOKENS = 8  # generated beyond the longest answer, for words before it
LONGEST_SAMPLE = 16  # prompts whose answers say how long they are
QUESTIONS = "qa"  # RULER's questions on SQuAD, where its file is given

Run = Callable[[Any, tuple[int]], dict[str, Any]]  # (model, length) -> result


@dataclasses.dataclass(frozen=True)
class SuiteRequest:
    """Probes of an evaluation.

    Attributes:
      suites: names of `registry.SUITES`.
      lengths: tokens of prompts with their answers, ascending.
      examples: prompts of each probe at each length.
      depths: where what is asked for is, in 0..1; () = the default of data.depths.
      seed: seed of the prompts.
      effective_score: percent that a length must reach to count as effective.
      new_tokens: tokens of an answer at most; None = as many as the longest answer has, and a few.
      paths: a file of SQuAD, by which RULER's questions are asked too; () = they are left out.
      instructions: whether prompts begin with what they are about.
    """

    suites: tuple[str, ...]
    lengths: tuple[int, ...]
    examples: int = EXAMPLES
    depths: tuple[float, ...] = ()
    seed: int = 0
    effective_score: float = EFFECTIVE_SCORE
    new_tokens: int | None = None
    paths: tuple[str, ...] = ()
    instructions: bool = True

    def probes(self) -> Iterator[tuple[str, str]]:
        """Yields (suite, probe)."""
        for suite in self.suites:
            yield from ((suite, probe) for probe in registry.SUITES[suite])
            if suite == "ruler" and self.paths:
                yield suite, QUESTIONS


def check_suites(settings: Config, request: SuiteRequest) -> None:
    """Refuses suites that there are not, or that a model cannot be asked. Raises: InputError."""
    for suite in request.suites:
        if suite not in registry.SUITES:
            raise InputError(
                f"--suite names '{suite}', which is none of {', '.join(registry.SUITES)}.{suggest(suite, registry.SUITES)}"
            )
    if settings.is_image or settings.is_sequences:
        raise InputError(
            f"--suite asks in text, and this is a run on {settings.data_kind}: give a run on text or questions"
        )
    if request.paths and "ruler" not in request.suites:
        raise InputError(
            "--paths with --suite is the file of SQuAD of --suite=ruler: name that suite too, or leave it out"
        )


def probe_config(settings: Config, request: SuiteRequest, probe: str) -> Config:
    """Returns the config under which a model is asked a probe. Raises: InputError: values that do not fit."""
    values, name = config.to_dict(settings), "squad_long" if probe == QUESTIONS else RETRIEVAL
    reset = ("prepared", "prompt_weight", "question_weight", "packing", "reset_positions")
    reset += registry.get(name).foreign_options
    defaults = type(settings.data)()
    own = {field: getattr(defaults, field) for field in reset} | {"name": name, "paths": request.paths, "mixture": {}}
    if name == RETRIEVAL:
        own |= {"paths": (), "probe": probe, "instructions": request.instructions}
        own |= {"depths": request.depths or defaults.depths}
    values["data"] |= own
    values["seed"] = request.seed
    values["eval"] |= {
        "lengths": request.lengths,
        "examples": request.examples,
        "new_tokens": request.new_tokens or 1,
    } | {field: getattr(type(settings.eval)(), field) for field in ("contexts", "stride", "targets", "tokens")}
    return config.from_dict(values)


def _with_new_tokens(model: Any, settings: Config, request: SuiteRequest) -> Config:
    """The config with room for the longest answer of a few prompts."""
    if request.new_tokens:
        return settings
    task = dataclasses.replace(model, config=settings).task
    try:
        source = task.questions("test", request.lengths[-1])
    except PromptTooLongError:  # said for each length
        return settings
    records = [source[index] for index in range(min(LONGEST_SAMPLE, request.examples, len(source)))]
    answers = [record.get("answer") or max(record["outputs"], key=len) for record in records]
    longest = max(len(task.tokenizer.encode(f" {answer}".encode())) for answer in answers)
    return dataclasses.replace(settings, eval=dataclasses.replace(settings.eval, new_tokens=longest + SPARE_TOKENS))


def evaluate_suites(
    model: Any, request: SuiteRequest, run: Run, note: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Asks a model all probes at all lengths.

    Args:
      model: a `seqpe_jax.Model`.
      request: the probes.
      run: evaluates a model, whose config is that of a probe, at one length.
      note: gets a line on each probe and length that are left out, since its shortest prompt is longer.

    Returns:
      {"examples", "depths", "seed", "instructions", "effective_score", "probes": {probe: [result of each length]}, "suites": {suite:
      {"score": {length: mean over its probes}, "effective_length": the largest length up to which every one reaches the
      score, None if the shortest does not}}}. "score" of a result is the mean share of an answer's parts that are found; of
      questions on SQuAD the share of answers found.
    """
    original, probes = model, {}
    for _, probe in dict.fromkeys(request.probes()):
        settings = _with_new_tokens(model, probe_config(model.config, request, probe), request)
        asked = dataclasses.replace(model, config=settings, load_params=lambda: original.params)
        probes[probe] = []
        for length in request.lengths:
            try:
                probes[probe].append(run(asked, (length,)))
            except PromptTooLongError as error:
                note(f"length {length}: left out, {error}")
        for result in probes[probe]:
            result["score"] = result.get("contains_all", result["contains"])
    return {
        "examples": request.examples,
        "depths": list(request.depths or type(model.config.data)().depths),
        "seed": request.seed,
        "instructions": request.instructions,
        "effective_score": request.effective_score,
        "probes": probes,
        "suites": {suite: _suite_scores(suite, request, probes) for suite in request.suites},
    }


def _suite_scores(suite: str, request: SuiteRequest, probes: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    own = [result for name, probe in request.probes() if name == suite for result in probes[probe]]
    scores = {length: [result["score"] for result in own if result["length"] == length] for length in request.lengths}
    means = {length: float(np.mean(found)) for length, found in scores.items() if found}
    return {
        "score": {str(length): mean for length, mean in means.items()},
        "effective_length": effective_length(tuple(means), tuple(means.values()), request.effective_score),
    }


def effective_length(lengths: Sequence[int], scores: Sequence[float], least: float) -> int | None:
    """Returns the largest length that reaches a score and before which every shorter one does; None if there is none."""
    found = None
    for length, score in sorted(zip(lengths, scores, strict=True)):
        if score < least:
            break
        found = length
    return found
