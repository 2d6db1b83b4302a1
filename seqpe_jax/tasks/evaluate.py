"""A model, evaluated at the lengths or sizes asked for: what `evaluate` reports and what `report` draws."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from seqpe_jax import config
from seqpe_jax.data import registry
from seqpe_jax.distributed import processes
from seqpe_jax.distributed.progress import ProgressLine
from seqpe_jax.errors import InputError
from seqpe_jax.evaluation.answers import METRICS, write_answers
from seqpe_jax.files import AnyPath, atomic_file, atomic_write
from seqpe_jax.losses.train_loss import TrainLoss
from seqpe_jax.models.build import ModelSpec
from seqpe_jax.run_dir import EVALUATION_FILE, RunDir, changed_fingerprints, describe_fingerprint
from seqpe_jax.tasks.task import Evaluator, check_eval_size, evaluate_at
from seqpe_jax.trees import count

EvalSizes = tuple[tuple[int, ...], ...]
Arrays = dict[str, dict[str, np.ndarray] | None]


def evaluate(
    model: Any,
    lengths: EvalSizes = (),
    sizes: EvalSizes = (),
    split: str = "test",
    tokens: int | None = None,
    examples: int | None = None,
    data: str | None = None,
    paths: tuple[str, ...] = (),
    lossy: bool = False,
    new_tokens: int | None = None,
    contexts: tuple[int, ...] = (),
    stride: int | None = None,
    targets: int | None = None,
    bit_depth: int | None = None,
) -> tuple[dict[str, Any], Arrays]:
    """Returns the evaluation of a model, in the form that `--output` stores, and arrays to draw.

    Args:
      model: a `seqpe_jax.Model`; an export is evaluated up to its range.
      lengths: window lengths, each (length,), of a model of text; sizes: (height, width) of a model of images, or (frames,
        height, width) of a run on video.
      split: "validation" or "test".
      tokens, examples: score at most that many tokens, ask at most that many questions, per length; None = eval.tokens and
        eval.examples of the config.
      data, paths: another data set than the run's (data.name and data.paths); None = the run's.
      lossy: text that does not come back from its tokens is accepted, whatever the config says.
      new_tokens: of an answer at most; None = eval.new_tokens of the config.
      contexts: tokens of the windows under which the same tokens are scored, of a model of text. Where neither lengths,
        sizes nor contexts are given, all that the config's eval section names are measured, or the training length.
      stride, targets: targets of each of these windows, and of all of them at most; None = eval.stride and eval.targets.
      bit_depth: of grey values in an image folder's files of 16 bits; None = the config's, or 0 for other data than its.

    Returns:
      Parameters, and FLOPs of training per token or image (`objectives.flops`), stand beside the results. The results of a
      run on questions hold their "answers" too, (records, hypotheses).

    Raises:
      InputError: a length or size that cannot be evaluated, data that cannot be read, parameters that are damaged.
    """
    limits = requested_limits(
        tokens=tokens,
        examples=examples,
        new_tokens=new_tokens,
        contexts=contexts or None,
        stride=stride,
        targets=targets,
    )
    check_data_kind(model.config, model.folder, lengths, sizes, limits)
    settings = _settings(model.config, limits, data, paths, lossy, lengths, bit_depth)
    sizes = _within_reach(settings, lengths, sizes)
    if settings != model.config:
        original = model
        model = dataclasses.replace(model, config=settings, read=lambda: original.params)
    task, field = model.task, model.task.size_name
    named = bool(lengths or sizes or contexts)
    work = [(task, eval_size) for eval_size in lengths or sizes or (() if named else task.eval_sizes())]
    for further in task.extra_evaluators():
        work += [(further, eval_size) for eval_size in (further.eval_sizes() if contexts or not named else ())]
    for metric_names, eval_size in work:  # before the parameters are read
        check_eval_size(metric_names, model.model_spec.max_grid, eval_size, split)
    _compare_data(model, split, named=data is not None)
    results = [_at(model, metric_names, eval_size, split) for metric_names, eval_size in work]
    guessed = task.no_context_baseline(split)
    model_spec = ModelSpec.of(settings, model.data_spec)  # of the run, where this is its export
    train_loss = TrainLoss(model_spec, task.task_loss, settings.objective)
    flops = train_loss.step_flops(task.example, settings.batch_size, settings.optimizer.accumulate)
    report = {
        "checkpoint": model.folder,
        "step": model.step,
        "task": task.kind,
        "encoding": settings.encoding.name,
        f"training_{field}": settings.data.length if field == "length" else list(settings.data.size),
        "split": split,
        "parameters": count(model_spec.shapes),
        "training_flops": flops / task.count_per_step,
        "results": results,
        **({"without_context": guessed} if guessed is not None else {}),
        **({"made_from": RunDir(model.folder).evaluation_sources(model.step)} if model.folder else {}),
    }
    own = [eval_size for metric_names, eval_size in work if metric_names is task] or [
        eval_size for _, eval_size in work
    ]
    return report, arrays_of(model, max(own, key=max), split)


def _compare_data(model: Any, split: str, named: bool) -> None:
    """Says where a split is not what it was when the run began, and refuses hosts whose data differ.

    Args:
      named: other data than the run's were asked for.

    Raises:
      InputError: hosts differ.
    """
    now = {split: model.task.fingerprint(split)}
    name = model.config.data.name
    processes.check_equal({f"{split} split of {name}": describe_fingerprint(now[split])})
    if model.folder and not named and processes.is_main_process():
        for line in changed_fingerprints(RunDir(model.folder).fingerprints, now):
            print(
                f"note: {name} is not what it was when {model.folder} was trained: {line}", file=sys.stderr, flush=True
            )


def _at(model: Any, task: Evaluator, eval_size: tuple[int, ...], split: str) -> dict[str, Any]:
    """The result of one scale, told as it comes."""
    label = f"{task.size_name} {'x'.join(map(str, eval_size))}"
    line = ProgressLine(1, label=label)
    result = evaluate_at(
        task, model.compiled, model.params, eval_size, split, lambda done, total: line.update(done, total=total)
    )
    line.close()
    metric_names = [f"{result[name]:,} {name}" for name in COUNTED if name in result]
    metric_names += [f"{name} {result[name]:.4g}" for name in task.metric_names if name in result]
    if processes.is_main_process():
        print(f"{label}: {', '.join(metric_names)}", flush=True)
        if cut := result.get("cut_off"):
            print(
                f"{label}: {cut} of {result['examples']} answers take more than {task.config.eval.new_tokens} tokens and "
                "were cut off: --new-tokens gives them more",
                flush=True,
            )
    return result


def arrays_of(model: Any, eval_size: tuple[int, ...], split: str) -> Arrays:
    """Returns what is drawn of a model at a scale: how alike its vectors are, and where the class token looks."""
    similarity = model.compiled.similarity(model.params, model.task.grid_of(eval_size))
    samples = model.task.sample_images(eval_size, split, NUM_ATTENTION_IMAGES)
    if samples is None:
        return {"similarity": similarity, "attention": None}
    images, shown = samples
    return {
        "similarity": similarity,
        "attention": {"images": shown, "attention": model.compiled.class_token_attention(model.params, images)},
    }


COUNTED = ("tokens", "targets", "examples")  # what a result says how many it scored of
NUM_ATTENTION_IMAGES = 4  # of the split, whose attention is drawn


def requested_limits(**limits: int | None) -> dict[str, int]:
    """Returns those limits of an evaluation that were asked for, by their names in a config's eval section."""
    return {name: value for name, value in limits.items() if value is not None}


def check_data_kind(
    settings: config.Config, folder: str, lengths: EvalSizes, sizes: EvalSizes, limits: Mapping[str, int]
) -> None:
    """Refuses what a model of the other kind is asked. Raises: InputError."""
    name = folder or "the model"
    if settings.is_image and (lengths or limits):
        raise InputError(
            f"{name} is a run on images: --lengths, --contexts, --stride, --targets, --tokens, --examples and --new-tokens "
            "are for text, use --sizes"
        )
    if sizes and not settings.is_image:
        raise InputError(f"{name} is a run on text: --sizes is for images, use --lengths")
    for option in ("stride", "targets"):
        if option in limits and lengths and "contexts" not in limits:
            raise InputError(f"--{option} is for --contexts, and --lengths alone are asked for: name --contexts too")
    if "tokens" in limits and "contexts" in limits and not lengths:
        raise InputError("--tokens is for --lengths, and --contexts alone are asked for: use --targets, or name both")


def _within_reach(settings: config.Config, lengths: EvalSizes, sizes: EvalSizes) -> EvalSizes:
    """The sizes, with their frames. Raises: InputError: a length or size that positions do not reach."""
    for length, *_ in lengths:
        config.check_positions(settings, length, "evaluation length")
    for size in sizes:
        config.check_size(settings, size, "evaluation size")
    return tuple(settings.sides_of(size) for size in sizes)


def _settings(
    settings: config.Config,
    limits: Mapping[str, int],
    data: str | None,
    paths: tuple[str, ...],
    lossy: bool,
    lengths: EvalSizes,
    bit_depth: int | None,
) -> config.Config:
    """The model's config with what is asked for in its place. Raises: InputError: values that do not fit."""
    values = config.to_dict(settings)
    values["eval"] |= limits
    if data is not None:
        values["data"] |= {"name": data, "paths": paths, "prompt_weight": 0.0, "question_weight": 0.0, "bit_depth": 0}
    values["data"]["lossy_tokenizer"] |= lossy
    is_qa = registry.get(values["data"]["name"]).kind == registry.DATA_QA
    for name in ("contexts", "stride", "targets"):
        if name in limits and is_qa:
            raise InputError(
                f"--{name} is for text, and {values['data']['name']} has questions: leave it out, and use --lengths"
            )
        if name in limits and not values["eval"]["contexts"]:
            raise InputError(f"--{name} is for --contexts, and none are asked for: name --contexts too")
    if lengths and is_qa:  # which questions are asked depends on the shortest
        values["eval"]["lengths"] = tuple(length for (length,) in lengths)
    if bit_depth is not None:
        if not settings.is_image:
            raise InputError("--bit-depth is for images, and this is a run on text: leave it out")
        values["data"]["bit_depth"] = bit_depth
    found = config.from_dict(values)
    for name in ("examples", "new_tokens"):
        if name in limits and not found.is_qa:
            raise InputError(
                f"--{name.replace('_', '-')} is for questions, and {found.data.name} has none: leave it out, or name "
                "questions with --data"
            )
    return found


def write(report: dict[str, Any], arrays: Arrays, path: AnyPath) -> list[AnyPath]:
    """Writes what `evaluate` returned: the report as JSON, arrays and answers beside it; returns the files, the report last.

    Beside a run's own evaluation.json they have the names that `report` reads; beside another output they begin with its
    name, so that evaluations in one folder keep theirs.

    Raises:
      InputError: answers cannot be written.
    """
    files, begin = [], "" if path.name == EVALUATION_FILE else f"{path.stem}_"
    for result in report["results"]:
        if "answers" in result:
            metrics = [name for name in METRICS if name in result]
            file = path.parent / f"{begin}answers_{result['length']}.jsonl"
            files.append(write_answers(file, *result["answers"], metrics))
    for name, values in arrays.items():
        if values is not None:
            with atomic_file(path.parent / f"{begin}{name}.npz") as part, part.open("wb") as file:
                np.savez_compressed(file, **values)
    results = [{name: value for name, value in result.items() if name != "answers"} for result in report["results"]]
    atomic_write(path, json.dumps(report | {"results": results}, indent=1) + "\n")
    return [*files, path]
