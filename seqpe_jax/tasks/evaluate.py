"""Evaluation of a model at several lengths or sizes: the report that `evaluate` writes, and arrays for plots."""

import dataclasses
import json
import math
import sys
from typing import Any

import numpy as np

from seqpe_jax import config
from seqpe_jax.config import Config
from seqpe_jax.data import registry
from seqpe_jax.data.datasets.retrieval import NAME as RETRIEVAL
from seqpe_jax.distributed import processes
from seqpe_jax.distributed.progress import ProgressLine
from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, atomic_file, atomic_write, parse_json
from seqpe_jax.inference.attention_spread import MAX_TOKENS
from seqpe_jax.losses.train_loss import TrainLoss
from seqpe_jax.models.build import ModelSpec, Shape
from seqpe_jax.run_dir import EVALUATION_FILE, RunDir, changed_fingerprints, describe_fingerprint
from seqpe_jax.tasks.base import Evaluator, check_eval_size, evaluate_at
from seqpe_jax.tasks.metrics import SCORES, long_perplexity, write_answers
from seqpe_jax.tasks.predictions import WriteRecord
from seqpe_jax.tasks.suites import SuiteRequest, check_suites, evaluate_suites
from seqpe_jax.trees import num_params

Arrays = dict[str, dict[str, np.ndarray] | None]

COUNTED = ("tokens", "targets", "examples")  # keys of a result that say how much it scored
SUITES_KEY = "suites"  # of a report
NUM_ATTENTION_IMAGES = 4  # images of the split whose attention is drawn


@dataclasses.dataclass(frozen=True)
class EvalRequest:
    """Options of one evaluation; None means the value of the config's eval or data section.

    Without lengths, sizes and contexts, all that the config's eval section names are evaluated.

    Attributes:
      lengths: window lengths of text, in tokens, each as (length,).
      sizes: (height, width) of images, or (frames, height, width) of videos, in pixels.
      split: "validation" or "test".
      data: another data set than the run's (`data.name`).
      paths: `data.paths` of that data set.
      tokens: score at most that many tokens per length.
      examples: ask at most that many questions per length.
      new_tokens: generate at most that many tokens for an answer.
      contexts: window lengths under which the same tokens of text are scored.
      stride: targets of each of these windows.
      targets: score at most that many targets under each context.
      lossy: accept text that does not come back from its tokens, whatever the config says.
      text_key: field that holds the text of a record, for the data set `text`; None = the config's, or "text" for another data set.
      bit_depth: bit depth of grey values in 16-bit files of an image folder; None = the config's, or 0 for another data set.
      suites: probes to ask in place of the split; None = no.
    """

    lengths: tuple[Shape, ...] = ()
    sizes: tuple[Shape, ...] = ()
    split: str = "test"
    data: str | None = None
    paths: tuple[str, ...] = ()
    tokens: int | None = None
    examples: int | None = None
    new_tokens: int | None = None
    contexts: tuple[int, ...] = ()
    stride: int | None = None
    targets: int | None = None
    lossy: bool = False
    text_key: str | None = None
    bit_depth: int | None = None
    suites: SuiteRequest | None = None

    @property
    def eval_fields(self) -> dict[str, Any]:
        """Values of the config's eval section that this request replaces, by field name."""
        names = ("tokens", "examples", "new_tokens", "stride", "targets")
        values = {name: getattr(self, name) for name in names} | {"contexts": self.contexts or None}
        return {name: value for name, value in values.items() if value is not None}


def evaluate(
    model: Any, request: EvalRequest, write_prediction: WriteRecord | None = None
) -> tuple[dict[str, Any], Arrays]:
    """Evaluates a model.

    Args:
      model: a `seqpe_jax.Model`; an export is evaluated up to the grid that it serves.
      request: lengths or sizes, data and limits.
      write_prediction: called with what the model answers for each example (`tasks.predictions`); in one process of a run.

    Returns:
      The report as `evaluate --output` stores it, except that results on questions hold "answers", (records, hypotheses);
      and arrays to draw. "training_flops" are per token or image.

    Raises:
      InputError: a length or size that cannot be evaluated, data that cannot be read, damaged parameters.
    """
    if request.suites is not None:
        return _evaluate_suites(model, request.suites, write_prediction), {}
    check_request(model.config, model.folder, request)
    settings = _requested_config(model.config, request)
    sizes = _checked_sizes(settings, request)
    if settings != model.config:
        original = model
        model = dataclasses.replace(model, config=settings, load_params=lambda: original.params)
    task, split = model.task, request.split
    if write_prediction is not None and not task.has_predictions:
        raise InputError(f"--predictions is not written of data.name={settings.data.name}: leave it out")
    named = bool(request.lengths or sizes or request.contexts)
    work = [(task, eval_size) for eval_size in request.lengths or sizes or (() if named else task.eval_sizes())]
    if request.contexts or not named:
        work += [(extra, eval_size) for extra in task.extra_evaluators() for eval_size in extra.eval_sizes()]
    for evaluator, eval_size in work:  # before the parameters are read
        check_eval_size(evaluator, model.model_spec.max_grid, eval_size, split)
    _compare_data(model, split, is_run_data=request.data is None)
    results = [
        _evaluate_and_print(model, evaluator, eval_size, split, write_prediction) for evaluator, eval_size in work
    ]
    long_perplexity(
        [result for result in results if "context" in result], settings.eval.key_gain, settings.eval.key_loss
    )
    own_sizes = [size for evaluator, size in work if evaluator is task] or [size for _, size in work]
    arrays, attention = _arrays_to_draw(model, max(own_sizes, key=max), split)
    return _report(model, split, results) | attention, arrays


def _evaluate_suites(model: Any, request: SuiteRequest, write_prediction: WriteRecord | None) -> dict[str, Any]:
    """Returns the report of suites of probes. Raises: InputError: they do not fit the model."""
    check_suites(model.config, request)

    def run(asked: Any, eval_size: Shape) -> dict[str, Any]:
        check_eval_size(asked.task, asked.model_spec.max_grid, eval_size, "test")
        label = asked.config.data.probe if asked.config.data.name == RETRIEVAL else asked.config.data.name
        write = None
        if write_prediction is not None:

            def write(record: dict[str, Any]) -> None:
                write_prediction({"probe": label} | record)

        return _evaluate_and_print(asked, asked.task, eval_size, "test", write, f"{label}, ")

    def note(line: str) -> None:
        if processes.is_main_process():
            print(line, file=sys.stderr, flush=True)

    found = evaluate_suites(model, request, run, note)
    if processes.is_main_process():
        for suite, scores in found["suites"].items():
            length = scores["effective_length"] or f"below {min(request.lengths)}"
            print(f"{suite}: effective length {length} ({request.effective_score:g} percent)", flush=True)
    settings = model.config
    return {
        "checkpoint": model.folder or model.source,
        "step": model.step,
        "encoding": settings.encoding.name,
        "training_length": settings.data.length,
        "results": [],
        SUITES_KEY: found,
    }


def _report(model: Any, split: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    task, settings = model.task, model.config
    baseline = task.no_context_baseline(split)
    model_spec = ModelSpec.of(settings, model.data_spec)  # of the run, if the model is its export
    train_loss = TrainLoss(model_spec, task.task_loss, settings.objective)
    flops = train_loss.step_flops(task.example, settings.batch_size, settings.optimizer.accumulate)
    training_size = list(settings.data.size) if settings.is_image else settings.data.length
    return {
        "checkpoint": model.folder or model.source,
        "step": model.step,
        **({"weights": "averaged"} if model.averaged else {}),
        "task": task.kind,
        "encoding": settings.encoding.name,
        f"training_{task.size_name}": training_size,
        "split": split,
        "parameters": num_params(model_spec.shapes),
        "training_flops": flops / task.count_per_step,
        "results": results,
        **({"without_context": baseline} if baseline is not None else {}),
        **({"made_from": RunDir(model.folder).evaluation_sources(model.step)} if model.folder else {}),
    }


def _compare_data(model: Any, split: str, is_run_data: bool) -> None:
    """Prints a note if a split has changed since the run began, and refuses processes whose data differ.

    Args:
      model: a `seqpe_jax.Model`.
      split: name of the split.
      is_run_data: whether the data set is that of the run.

    Raises:
      InputError: the processes have different data.
    """
    now = {split: model.task.fingerprint(split)}
    name = model.config.data.name
    processes.check_equal({f"{split} split of {name}": describe_fingerprint(now[split])})
    if model.folder and is_run_data and processes.is_main_process():
        for line in changed_fingerprints(RunDir(model.folder).fingerprints, now):
            print(f"note: {name} has changed since {model.folder} was trained: {line}", file=sys.stderr, flush=True)


def _evaluate_and_print(
    model: Any,
    evaluator: Evaluator,
    eval_size: Shape,
    split: str,
    write_prediction: WriteRecord | None,
    prefix: str = "",
) -> dict[str, Any]:
    """Returns the result at one size, and prints its metrics."""
    label = f"{prefix}{evaluator.size_name} {'x'.join(map(str, eval_size))}"
    line = ProgressLine(1, label=label)
    result = evaluate_at(
        evaluator,
        model.compiled,
        model.params,
        eval_size,
        split,
        lambda done, total: line.update(done, total=total),
        write_prediction,
    )
    line.close()
    words = [f"{result[name]:,} {name}" for name in COUNTED if name in result]
    words += [f"{name} {result[name]:.4g}" for name in evaluator.metric_names if name in result]
    if processes.is_main_process():
        print(f"{label}: {', '.join(words)}", flush=True)
        for source, own in result.get("sources", {}).items():
            words = [f"{own['tokens']:,} tokens"]
            words += [f"{name} {own[name]:.4g}" for name in evaluator.metric_names if name in own]
            print(f"{label}, {source}: {', '.join(words)}", flush=True)
        if cut := result.get("cut_off"):
            print(
                f"{label}: {cut} of {result['examples']} answers take more than {evaluator.config.eval.new_tokens} tokens "
                "and were cut off: --new-tokens gives them more",
                flush=True,
            )
    return result


def _arrays_to_draw(model: Any, eval_size: Shape, split: str) -> tuple[Arrays, dict[str, Any]]:
    """Returns what the plots of a run show at one size.

    Returns:
      Arrays by the name of their file, None where there are none: the similarity of position vectors, what attention gains by
      distance, and images with the attention of the class token. And the report's {"attention": {"tokens" or "patches",
      "distance", "entropy"}} with lists by layer and head, or {}.
    """
    compiled, params, grid = model.compiled, model.params, model.task.grid_of(eval_size)
    tokens_L = model.task.sample_tokens(eval_size, split)
    arrays: Arrays = {
        "similarity": compiled.similarity(params, grid),
        "position_curves": compiled.position_curves(params, grid, tokens_L),
        "attention": None,
    }
    samples = model.task.sample_images(eval_size, split, NUM_ATTENTION_IMAGES)
    inputs = tokens_L if samples is None else samples[0]
    found = None if inputs is None else compiled.attention_spread(params, inputs)
    if found is None:
        return arrays, {}
    spread, class_token = found
    if samples is not None:
        arrays["attention"] = {"images": samples[1], "attention": class_token}
        unit = {"patches": math.prod(grid)}
    else:
        unit = {"tokens": min(len(tokens_L), MAX_TOKENS)}
    rounded = {
        name: [[float(f"{value:.4g}") for value in heads] for heads in values] for name, values in spread.items()
    }
    return arrays, {"attention": unit | rounded}


def check_request(settings: Config, folder: str, request: EvalRequest) -> None:
    """Refuses options that do not fit the kind of data or each other. Raises: InputError."""
    name, fields = folder or "the model", request.eval_fields
    if settings.is_image and (request.lengths or fields):
        raise InputError(
            f"{name} is a run on images: --lengths, --contexts, --stride, --targets, --tokens, --examples and --new-tokens "
            "are for text, use --sizes"
        )
    if request.sizes and not settings.is_image:
        raise InputError(f"{name} is a run on text: --sizes is for images, use --lengths")
    for option in ("stride", "targets"):
        if option in fields and request.lengths and not request.contexts:
            raise InputError(f"--{option} is for --contexts, and only --lengths is set: set --contexts too")
    if "tokens" in fields and request.contexts and not request.lengths:
        raise InputError("--tokens is for --lengths, and only --contexts is set: use --targets, or set both")


def _checked_sizes(settings: Config, request: EvalRequest) -> tuple[Shape, ...]:
    """Returns the sizes, with their frames. Raises: InputError: there are no positions for a length or size."""
    for length, *_ in request.lengths:
        config.check_length(settings, length, "evaluation length")
    for size in request.sizes:
        config.check_size(settings, size, "evaluation size")
    return tuple(settings.full_size(size) for size in request.sizes)


def _requested_config(settings: Config, request: EvalRequest) -> Config:
    """Returns the model's config with the request's values. Raises: InputError: values that do not fit."""
    values, fields = config.to_dict(settings), request.eval_fields
    values["eval"] |= fields
    if request.data is not None:
        own = {
            "prompt_weight": 0.0,
            "question_weight": 0.0,
            "bit_depth": 0,
            "max_pixels": 0,
            "prepared": "",
            "text_key": "text",
            "split_on": "",
            "mixture": {},
            "unanswerable": "skip",
        }
        if registry.get(request.data).kind != registry.DATA_TEXT:
            own["packing"] = "concatenated"
        defaults = type(settings.data)()
        own |= {name: getattr(defaults, name) for name in registry.get(request.data).foreign_options}
        own["raw"] = values["data"]["raw"] and request.data == values["data"]["name"]
        values["data"] |= {"name": request.data, "paths": request.paths} | own
    values["data"]["lossy_tokenizer"] |= request.lossy
    data_name = values["data"]["name"]
    is_qa = registry.get(data_name).kind == registry.DATA_QA
    for option in ("contexts", "stride", "targets"):
        if option in fields and is_qa:
            raise InputError(f"--{option} is for text, and {data_name} has questions: leave it out, and use --lengths")
        if option in fields and not values["eval"]["contexts"]:
            raise InputError(f"--{option} is for --contexts, which is not set: set --contexts too")
    if request.lengths and (is_qa or settings.is_sequences):  # they decide which questions are asked, or which inputs
        values["eval"]["lengths"] = tuple(length for (length,) in request.lengths)
    if request.text_key is not None:
        values["data"]["text_key"] = request.text_key
    if request.bit_depth is not None:
        if not settings.is_image:
            raise InputError("--bit-depth is for images, and this is a run on text: leave it out")
        values["data"]["bit_depth"] = request.bit_depth
    found = config.from_dict(values)
    for name in ("examples", "new_tokens"):
        if name in fields and not (found.is_qa or (name == "examples" and found.is_sequences)):
            raise InputError(
                f"--{name.replace('_', '-')} is for questions, and {found.data.name} has none: leave it out, or name "
                "questions with --data"
            )
    return found


def write(report: dict[str, Any], arrays: Arrays, path: AnyPath) -> list[AnyPath]:
    """Writes the result of `evaluate`: the report as JSON, with answers and arrays in files of the same folder.

    These have the names that `report` reads if the report is a run's own evaluation.json; else their names begin with that
    of the report, so that several evaluations fit into one folder.

    Args:
      report: first value of `evaluate`.
      arrays: second value of `evaluate`.
      path: path of the report.

    Returns:
      The files of answers, and the report last.

    Raises:
      InputError: answers cannot be written.
    """
    files, prefix = [], "" if path.name == EVALUATION_FILE else f"{path.stem}_"
    for result in report["results"]:
        if "answers" in result:
            metrics = [name for name in SCORES if name in result]
            file = path.parent / f"{prefix}answers_{result['length']}.jsonl"
            files.append(write_answers(file, *result["answers"], metrics))
    for name, values in arrays.items():
        if values is not None:
            with atomic_file(path.parent / f"{prefix}{name}.npz") as part, part.open("wb") as file:
                np.savez_compressed(file, **values)
    results = list(map(_without_answers, report["results"]))
    written = report | {"results": results}
    if SUITES_KEY in report:
        suites = report[SUITES_KEY]
        for probe, own in suites["probes"].items():
            for result in own:
                file = path.parent / f"{prefix}answers_{probe}_{result['length']}.jsonl"
                files.append(write_answers(file, *result["answers"], [name for name in SCORES if name in result]))
        probes = {probe: list(map(_without_answers, own)) for probe, own in suites["probes"].items()}
        written = _evaluation_of(report, path)
        written |= {SUITES_KEY: _with_stored_suites(suites | {"probes": probes}, written.get(SUITES_KEY))}
    atomic_write(path, json.dumps(written, indent=1) + "\n")
    return [*files, path]


def _without_answers(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "answers"}


def _evaluation_of(report: dict[str, Any], path: AnyPath) -> dict[str, Any]:
    """Returns the evaluation that a file holds of the same checkpoint and step, to which suites are added, or the report."""
    try:
        stored = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return report
    same = isinstance(stored, dict) and all(stored.get(name) == report[name] for name in ("checkpoint", "step"))
    return stored if same else report


def _with_stored_suites(suites: dict[str, Any], stored: Any) -> dict[str, Any]:
    """Returns suites and, of those that a file holds, the others, if they were asked under the same settings."""
    found = ("probes", "suites")
    settings = {name: value for name, value in suites.items() if name not in found}
    if not isinstance(stored, dict) or stored.keys() != suites.keys():
        return suites
    if json.loads(json.dumps(settings)) != {name: value for name, value in stored.items() if name not in found}:
        return suites
    return suites | {name: stored[name] | suites[name] for name in found if isinstance(stored[name], dict)}
