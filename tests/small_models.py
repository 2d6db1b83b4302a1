"""Commands at a size that takes seconds: what a page's command does, with a smaller model, less data and fewer steps."""

import dataclasses
import os
from collections.abc import Iterable

import seqpe_jax.sweeps.search  # noqa: F401  commands find it imported
from seqpe_jax.cli import common
from seqpe_jax.config import Config, ContrastiveConfig, DistillationConfig, MeshConfig, from_dict, io, to_dict
from seqpe_jax.data import loader
from seqpe_jax.sweeps import spec

FOLDER = "SEQPE_JAX_TESTS_FOLDER"  # where commands run
TEXTS = "path/to/texts"  # in that folder, as the pages write it
PHOTOS = "ROOT"
QUESTIONS = "questions.jsonl"
_run, _given, _trials, _read = common.run, io.from_user_values, spec._checked_trials, spec.read_sweep_file


class FewExamples(loader.EvalBatches):
    """The first examples of a split."""

    def __init__(self, source, batch_size, count, *rest, **named):
        super().__init__(source, batch_size, min(count, 8), *rest, **named)


def _run_there(main, reads_checkpoints=False):
    os.chdir(os.environ[FOLDER])
    _run(main)


def shrink(config: Config) -> Config:
    """Returns a config with the parts of another one, each small; the user's own fields have been checked before."""
    model, encoding, objective, evaluation = config.model, config.encoding, config.objective, config.eval
    axes = len(config.grid)
    data, patch, best = config.data, model.patch, config.checkpoint.best
    if config.steps > 5000:  # a recipe of the paper, which chooses by lengths and sizes that are too large here
        evaluation, best = dataclasses.replace(evaluation, every=0), ""
    if data.name in ("stdlib_text", "text", "wikitext103"):
        data = dataclasses.replace(data, name="text_files", paths=(TEXTS,), mixture=(), split_on="")
    if data.name == "stdlib_qa":
        data = dataclasses.replace(data, name="qa_jsonl", paths=(QUESTIONS,))
    if data.name == "imagenet2012":
        data = dataclasses.replace(data, name="image_folder", paths=(PHOTOS,), size=(16, 16))
        patch, evaluation = (8, 8), dataclasses.replace(evaluation, sizes=())
    if not config.is_image:
        data = dataclasses.replace(data, length=min(data.length, 64))
        decides = best.partition("@")[2]
        lengths = tuple(length for length in evaluation.lengths if length in (64, 128, 256) or str(length) == decides)
        contexts = tuple(context for context in evaluation.contexts if context <= 128)
        evaluation = dataclasses.replace(evaluation, lengths=lengths, tokens=1024, contexts=contexts, targets=256)
    if config.is_qa:
        evaluation = dataclasses.replace(evaluation, examples=2, new_tokens=2)
    evaluation = dataclasses.replace(evaluation, sizes=evaluation.sizes[:1], frames=evaluation.frames[:1])
    if encoding.kind == "seqpe":
        encoding = dataclasses.replace(
            encoding,
            layers=1,
            width=16,
            heads=2,
            position_heads=min(1, encoding.position_heads),
            rotary_heads=min(1, encoding.rotary_heads),
            feature_width=min(4, encoding.feature_width),
        )
        objective = (
            dataclasses.replace(  # without the terms on vectors, which compile longest: test_configs.py trains them
                objective,
                shift=dataclasses.replace(objective.shift, sets=1),
                contrastive=ContrastiveConfig(weight=0.0),
                distillation=DistillationConfig(weight=0.0),
            )
        )
    small = dataclasses.replace(
        config,
        steps=min(4, max(2, config.steps // 750)),
        batch_size=8,
        data=data,
        mesh=MeshConfig(),
        model=dataclasses.replace(model, layers=1, width=48, heads=4, mlp_width=0, patch=patch),
        encoding=dataclasses.replace(encoding, rotary_pairs=min(axes, encoding.rotary_pairs)),
        objective=objective,
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=0, decay_steps=0, accumulate=1),
        eval=dataclasses.replace(evaluation, every=min(1, evaluation.every), batch_tokens=4096),
        checkpoint=dataclasses.replace(config.checkpoint, every=1, keep_every=0, best=best),
        report=dataclasses.replace(config.report, every=1, trackers=()),
    )
    return from_dict(to_dict(small))


def _one_trial(path: str) -> spec.SweepFile:
    """A sweep file with one trial of its search."""
    sweep = _read(path)
    return dataclasses.replace(sweep, search=sweep.search and dataclasses.replace(sweep.search, trials=1))


def _one(runs: Iterable[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """A run without an encoder of positions, if a sweep has such, which compiles soonest."""
    found = list(runs)
    return ([run for run in found if run[1].get("variant") == "rotary"] or found)[:1]


def install() -> None:
    """Makes the commands of this process small."""
    common.run = _run_there
    io.from_user_values = lambda *values: shrink(_given(*values))
    spec._checked_trials = lambda base, runs: _trials(base, _one(runs))
    spec.read_sweep_file = _one_trial
    loader.EvalBatches = FewExamples
