"""Sweep files are read and checked whole; those that ship say what they mean on the command line too."""

import contextlib
import functools
import json
import pathlib
import sys

import pytest
from absl import flags

from seqpe_jax import config
from seqpe_jax.cli import config_flags
from seqpe_jax.errors import InputError
from seqpe_jax.sweeps import spec

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs" / "sweeps").glob("*.py"))
TINY = "from seqpe_jax.sweeps import *\nCONFIG = 'tests/tiny_text.py'\n"


@functools.cache
def shipped(path: pathlib.Path) -> spec.SweepFile:
    with contextlib.chdir(ROOT):
        return spec.read_sweep_file(str(path.relative_to(ROOT)))


def written(folder: pathlib.Path, body: str, head: str = TINY) -> str:
    path = folder / "sweep.py"
    path.write_text(head + body)
    return str(path)


def waiting(best: str, field: str = "seed", every: int = 3, b: str = "'seed': 2") -> str:
    """A sweep of three runs, the last of which waits for the others."""
    both = f"'eval.every': {every}, 'eval.lengths': (16,)"
    return yielding(f"('a', {{{both}, 'seed': 1}})", f"('b', {{{both}, {b}}})", f"('c', {{'{field}': {best}}})")


def yielding(*runs: str) -> str:
    return "def runs():\n" + "".join(f"    yield {run}\n" for run in runs)


def test_product_combines_and_zipped_goes_together():
    found = spec.product({"a": (1, 2)}, spec.zipped({"b": (3, 4), "c": (5, 6)}))
    assert found == [
        {"a": 1, "b": 3, "c": 5},
        {"a": 1, "b": 4, "c": 6},
        {"a": 2, "b": 3, "c": 5},
        {"a": 2, "b": 4, "c": 6},
    ]
    assert spec.product({"a": (1, 2), "b": (3, 4)})[1] == {"a": 1, "b": 4}
    with pytest.raises(InputError, match="'a' is in two"):
        spec.product({"a": (1,)}, spec.zipped({"a": (2,)}))
    with pytest.raises(InputError, match="a 2, b 1"):
        spec.zipped({"a": (1, 2), "b": (3,)})
    with pytest.raises(InputError, match="needs a list"):
        spec.product({"variant": "rotary"})


def parsed(arguments: list[str]) -> config.Config:
    """The config that `train` reads from its options."""
    values = flags.FlagValues()
    config_flags.define_config(values)
    values(["train", *arguments])
    return config_flags.read_config(values)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_sweep_is_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    name = path.relative_to(ROOT)
    sweep = shipped(path)
    document = path.read_text().split('"""')[1]
    assert f"python -m seqpe_jax.sweep --sweep={name} --workdir=runs/" in document and "Hardware: " in document
    assert sweep.trials or sweep.search
    settings = [json.dumps(config.to_dict(trial.settings)) for trial in sweep.trials]
    assert len(set(settings)) == len(settings), "two runs of the sweep are the same"
    for trial in [trial for trial in sweep.trials if not trial.best][:: max(1, len(sweep.trials) // 6)]:
        assert parsed(trial.arguments) == trial.settings


def test_shipped_sweeps_compare_what_they_say():
    sweeps = {path.stem: shipped(path) for path in SHIPPED}
    chosen_with = {"extrapolation": {0}, "moving_digits": {0}}
    for stem, seen in chosen_with.items():
        rows = {}
        for trial in sweeps[stem].trials:
            rows.setdefault(trial.name.rpartition("-")[0], set()).add(trial.settings.seed)
        assert len(rows) > 4 and all(len(seeds) >= 3 and not seeds & seen for seeds in rows.values())
    ablation = {trial.name: trial.settings for trial in sweeps["ablation"].trials}
    for task, field in (("text", "rotary_pairs"), ("questions", "position_heads"), ("digits", "fraction_digits")):
        assert getattr(ablation[f"{task}-full"].encoding, field) > 0
    without = ablation["text-no_contrastive"].objective.contrastive.weight
    assert without == 0 < ablation["text-full"].objective.contrastive.weight
    assert ablation["text-rotation_alone"].encoding.rotary_pairs == ablation["text-full"].encoding.rotary_pairs


@pytest.mark.parametrize("stem", ["study_text", "study_questions", "study_images"])
def test_a_fair_study_offers_its_parts_to_all_with_equal_trials(stem):
    """Also to SeqPE, which begins without its own; the seeds of the tables are not the one that chose."""
    trials = {trial.name: trial for trial in shipped(ROOT / "configs" / "sweeps" / f"{stem}.py").trials}
    finals = [trial for trial in trials.values() if trial.settings.seed]
    for trial in finals:
        variant, _, seed = trial.name.rpartition("-")
        [best] = set(trial.best.values())
        assert len(best.runs) == 12 and {trials[run].settings.seed for run in best.runs} == {0} and int(seed) > 0
        assert {run.rpartition("-")[0] for run in best.runs} == {variant}
        plain = trials[f"{variant}-plain"].settings
        share = 2 if stem == "study_questions" else 1
        assert share * plain.steps == trial.settings.steps and plain.eval.every == plain.steps
        own = plain.encoding
        assert own.rotary_pairs == own.position_heads == plain.objective.zoom.rate == 0 and not own.log_scaling
        gated = [run for run in best.runs if run.endswith("gate")]
        assert gated or variant == "none" or stem == "study_images"  # `none` with a gate is FoX
        assert {trials[run].settings.encoding.kind for run in best.runs} == {trial.settings.encoding.kind}
    shown = {trial.settings.encoding.name.removesuffix("+forget") for trial in finals}
    wanted = {
        "study_text": {*config.kinds_for(1), *config.GATED} - {"rotary_axial"},
        "study_questions": {"seqpe", "fox", "cable", "alibi", "kerple", "rotary"},
        "study_images": {*config.kinds_for(2)},
    }
    assert shown == wanted[stem]


def test_values_of_all_types_reach_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides = {
        "variant": "alibi",
        "steps": 7,
        "optimizer.learning_rate": 1e-3,
        "optimizer.clip": 2,
        "model.scan": True,
        "report.trackers": (),
        "eval.lengths": (16,),
        "data.paths": ("a b", "c"),
        "data.cache_dir": "it's",
    }
    sweep = spec.read_sweep_file(written(tmp_path, yielding(f"('one', {overrides!r})")))
    [trial] = sweep.trials
    assert trial.settings.encoding.kind == "alibi" and trial.settings.data.paths == ("a b", "c")
    assert trial.settings.eval.lengths == (16,) and trial.settings.model.scan
    assert parsed(trial.arguments) == trial.settings


def test_a_trial_may_have_another_config(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    body = yielding("('digits', {'config': 'configs/digits_vit.py', 'variant': 'none'})", "('text', {})")
    digits, text = spec.read_sweep_file(written(tmp_path, body)).trials
    assert digits.config == "configs/digits_vit.py:none" and text.config == "tests/tiny_text.py"


@pytest.mark.parametrize(
    "body,words",
    [
        ("runs = 3\n", ["TypeError"]),
        (
            yielding("('a', {'objective.distillation.weight': 0.0, 'objective.distillation.offsets': 4})"),
            ["run 'a'", "objective.distillation.offsets is not read here"],
        ),
        ("", ["must define CONFIG"]),
        (
            "def runs():\n    n = 0\n    while True:\n        n += 1\n        yield f'r{n}', {}\n",
            ["more than 10,000 runs"],
        ),
        ("def runs(:\n", ["SyntaxError"]),
        ("def runs():\n    yield from 1 / 0\n", ["ZeroDivisionError"]),
        ("def runs():\n    yield from ()\n", ["yields nothing"]),
        (yielding("{}"), ["must yield (name, overrides)", "{}"]),
        (yielding("('a/b', {})"), ["'a/b' cannot name a run"]),
        (yielding("('..', {})"), ["'..' cannot name a run"]),
        (yielding("('a', {})", "('b', {})", "('a', {'seed': 1})"), ["two runs are named 'a'"]),
        (yielding("('a', {})", "('b', {'model.widht': 4})"), ["run 'b'", "'model.widht'", "'model.width'"]),
        (yielding("('a', {'varant': 'rotary'})"), ["run 'a'", "'varant'", "'variant'"]),
        (yielding("('a', {'variant': 'rotory'})"), ["run 'a'", "'rotory'", "'rotary'"]),
        (yielding("('a', {'model.dropout': 1.5})"), ["run 'a'", "below 1", "1.5"]),
        (yielding("('a', {'steps': 'many'})"), ["run 'a'", "steps", "'many'"]),
        (
            yielding("('a', {'encoding.mode': 'rotary', 'objective.contrastive.space': 'vectors'})"),
            ["encoding.qk='none'"],
        ),
        (yielding("('a', {'variant': 'rotary', 'model.heads': 8})"), ["run 'a'", "must be even"]),
        (yielding("('a', {'config': 'configs/nothing.py'})"), ["run 'a'", "configs/nothing.py"]),
        ("SEARCH = Search({'seed': (0, 1)})\n", ["minimise"]),
        ("SEARCH = Search({}, minimise='eval/loss@16')\n", ["ranges"]),
        ("SEARCH = Search({'seed': Range(3, 3)}, minimise='eval/loss@16')\n", ["must rise"]),
        ("SEARCH = Search({'steps': Range(0, 3, log=True)}, minimise='eval/loss@16')\n", ["above 0"]),
        ("SEARCH = Search({'sead': (0, 1)}, {'eval.every': 2}, minimise='eval/loss@16')\n", ["'sead'", "'seed'"]),
        ("SEARCH = Search({'seed': (0, 1)}, minimise='eval/loss@16')\n", ["eval.every"]),
        ("SEARCH = Search({'seed': ((0,), 1)}, {'eval.every': 2}, minimise='eval/loss@16')\n", ["must be numbers"]),
        ("SEARCH = Search({'seed': (0, -1)}, {'eval.every': 2}, minimise='eval/loss@16')\n", ["seed", "at least 0"]),
        ("SEARCH = Search({'seed': (0, 1)}, {'eval.every': 2}, minimise='eval/loss@17')\n", ["eval/NAME@16"]),
        ("SEARCH = Search({'seed': (0, 1)}, {'eval.every': 2}, minimise='eval/los@16')\n", ["'eval/los@16'", "'loss'"]),
        (
            "SEARCH = Search({'seed': (0, 1)}, {'eval.every': 2}, maximise='eval/top1@16')\n",
            ["not measured", "bits_per_byte"],
        ),
        (
            waiting("BestOf(('a', 'x'), 'eval/loss@16')"),
            ["run 'c'", "waits for run 'x', which this sweep does not have", "a, b"],
        ),
        (waiting("BestOf(('a', 'c'), 'eval/loss@16')"), ["run 'c'", "'c'", "only later"]),
        (waiting("BestOf((), 'eval/loss@16')"), ["run 'c'", "names of the runs"]),
        (waiting("BestOf('a', 'eval/loss@16')"), ["run 'c'", "names of the runs"]),
        (waiting("BestOf(('a', 'b'))"), ["run 'c'", "one metric"]),
        (waiting("BestOf(('a', 'b'), 'eval/loss@16', count=2)"), ["run 'c'", "count=2, base=''"]),
        (waiting("BestOf(('a', 'b'), 'eval/loss@16', count=3, base='a')"), ["run 'c'", "1 to 2"]),
        (
            "runs = lambda: choose_parts_then_repeat({'a': {}}, {}, {'seed': (1, 2)}, trials=3, tuning_overrides={}, seeds={'a': (1,)})\n",
            ["'a' has 2 trials instead of 3", "seed more values"],
        ),
        (waiting("BestOf(('a', 'b'), 'eval/los@16')"), ["run 'c'", "'loss'"]),
        (waiting("BestOf(('a', 'b'), 'eval/loss@16')", every=0), ["run 'c'", "eval.every"]),
        (waiting("BestOf(('a', 'b'), 'eval/loss@16')", every=4), ["run 'c'", "run 'a'", "a multiple of eval.every=4"]),
        (waiting("BestOf(('a', 'b'), 'eval/loss@16')", "sede"), ["run 'c'", "'sede'", "'seed'"]),
        (
            waiting("BestOf(('a', 'b'), 'eval/loss@16')", "model.heads", b="'model.heads': 5, 'model.width': 40"),
            ["run 'c', where model.heads can become 5", "model.width=24"],
        ),
        (
            waiting("BestOf(('a', 'b'), 'eval/loss@16'), 'eval.stride': 4"),
            ["run 'c', where seed can become", "eval.stride is not read here, it needs eval.contexts"],
        ),
        (
            waiting("BestOf(('a', 'b'), 'eval/loss@16')")
            + "    yield 'd', {'seed': BestOf(('a', 'b'), 'eval/loss@16'), 'eval.stride': 0}\n",
            ["run 'd', where seed can become", "eval.stride is not read here"],  # although 'c' has the same values
        ),
        (
            yielding("('a', {'variant': 'alibi', 'encoding.scaling': 'yarn'})"),
            ["run 'a'", "encoding.scaling", "rotary"],
        ),
        (yielding("('a', {'variant': 'lookhere'})"), ["run 'a'", "'lookhere' is for images"]),
        ("runs = lambda: tune_then_repeat({'a': {}}, {}, tuning_overrides={}, seeds=(1,))\n", ["one field", "none"]),
        (
            "runs = lambda: tune_then_repeat({'a': {}}, {'seed': (1,)}, tuning_overrides={}, seeds=(1,), same_as={'a': 'b'})\n",
            ["'a'", "the same as 'b'"],
        ),
        (
            "runs = lambda: tune_then_repeat({'a': {}}, {'seed': (1,)}, tuning_overrides={}, seeds=(1,), extra_values={'b': (2,)})\n",
            ["extra_values of 'b'"],
        ),
        (
            "runs = lambda: tune_then_repeat({'a': {}}, {'seed': (1,)}, tuning_overrides={}, seeds=(1,), constants={'b': {'steps': (2,)}})\n",
            ["constants of 'b'"],
        ),
        (
            "runs = lambda: tune_then_repeat({'a': {}}, {'seed': (1,)}, tuning_overrides={}, seeds=(1,), constants={'a': {}})\n",
            ["needs one field"],
        ),
        ("SEARCH = 3\n", ["Search", "int"]),
    ],
)
def test_a_wrong_sweep_is_refused(body, words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError) as refused:
        spec.read_sweep_file(written(tmp_path, body))
    assert str(refused.value).startswith(str(tmp_path))
    for word in words:
        assert word in str(refused.value)


def test_what_is_no_sweep_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no sweep file at"):
        spec.read_sweep_file(str(tmp_path / "none.py"))
    (tmp_path / "list.txt").write_text("a, b")
    with pytest.raises(InputError, match="not a Python file"):
        spec.read_sweep_file(str(tmp_path / "list.txt"))
    with pytest.raises(InputError, match="must define CONFIG"):
        spec.read_sweep_file(written(tmp_path, yielding("('a', {})"), head=""))


def test_tuning_runs_take_extra_values_and_constants():
    field, variants = (
        "optimizer.learning_rate",
        {"a": {"variant": "alibi"}, "b": {"variant": "rotary"}, "c": {"variant": "none"}},
    )
    runs = dict(
        spec.tune_then_repeat(
            variants,
            {field: (1e-3, 2e-3)},
            tuning_overrides={"seed": 0},
            seeds=(1,),
            minimise="loss",
            same_as={"c": "a"},
            extra_values={"a": (4e-3,)},
            constants={"b": {"encoding.theta": (10.0, 100.0)}},
        )
    )
    tuning = {
        "a": [f"a-learning_rate={rate}" for rate in (0.001, 0.002, 0.004)],
        "b": [f"b-learning_rate={rate},theta={theta}" for rate in (0.001, 0.002) for theta in (10, 100)],
    }
    assert list(runs) == [*tuning["a"], *tuning["b"], "a-1", "b-1", "c-1"]
    assert runs["a-learning_rate=0.004"] == {"variant": "alibi", "seed": 0, field: 4e-3}
    assert runs[tuning["b"][1]] == {"variant": "rotary", "seed": 0, field: 1e-3, "encoding.theta": 100.0}
    assert [runs[name][field].runs for name in ("a-1", "b-1", "c-1")] == [
        tuple(tuning["a"]),
        tuple(tuning["b"]),
        tuple(tuning["a"]),
    ]
    assert runs["b-1"]["encoding.theta"] is runs["b-1"][field] and "encoding.theta" not in runs["c-1"]


def test_every_variant_gets_the_same_number_of_trials():
    runs = dict(
        spec.choose_parts_then_repeat(
            {"a": {"variant": "alibi"}, "n": {"variant": "none"}},
            {"a": {"pairs": {"encoding.rotary_pairs": 4}, "log": {"encoding.log_scaling": True}}},
            {"optimizer.learning_rate": (4.0, 2.0, 8.0, 1.0, 16.0, 3.0, 5.0)},
            trials=7,
            tuning_overrides={"seed": 0},
            seeds={"a": (1, 2), "n": (1,)},
            minimise="loss",
            constants={"a": [{"encoding.slope_scale": 0.5}]},
        )
    )
    names = {"a": ["plain", "pairs", "log", "two", "learning_rate=2", "learning_rate=8", "constant1"]}
    names["n"] = ["plain", *(f"learning_rate={rate}" for rate in (2, 8, 1, 16, 3, 5))]
    assert list(runs) == [*(f"{name}-{run}" for name, own in names.items() for run in own), "a-1", "n-1", "a-2"]
    rate = "optimizer.learning_rate"
    assert runs["a-pairs"] == {"variant": "alibi", "seed": 0, rate: 4.0, "encoding.rotary_pairs": 4}
    two = spec.BestOf(("a-pairs", "a-log"), "loss", count=2, base="a-plain")
    assert runs["a-two"] == {
        "variant": "alibi",
        "seed": 0,
        rate: 4.0,
        "encoding.rotary_pairs": two,
        "encoding.log_scaling": two,
    }
    assert runs["a-learning_rate=8"]["encoding.rotary_pairs"].runs == ("a-plain", "a-pairs", "a-log", "a-two")
    assert (
        runs["a-constant1"][rate].runs[-1] == "a-learning_rate=8" and runs["a-constant1"]["encoding.slope_scale"] == 0.5
    )
    assert runs["a-2"].keys() == {
        "variant",
        "seed",
        rate,
        "encoding.rotary_pairs",
        "encoding.log_scaling",
        "encoding.slope_scale",
    }
    assert runs["a-2"]["encoding.slope_scale"].runs == tuple(f"a-{run}" for run in names["a"])


def test_older_names_of_helpers_work_with_one_line_of_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.delitem(sys.modules, "seqpe_jax.sweeps.points", raising=False)
    common = "{'variant': 'alibi', 'steps': 2, 'eval.every': 2, 'eval.lengths': (16,)}"
    head = "from seqpe_jax.sweeps.points import two_stages\nCONFIG = 'tests/tiny_text.py'\n"
    body = (
        f"runs = lambda: two_stages(ways={{'a': {common}, 'b': {common}}}, tried={{'batch_size': (8, 16)}}, "
        "trial={'seed': 0}, seeds=(1,), minimise='eval/loss@16', like={'b': 'a'}, further={'a': (24,)})\n"
    )
    names = [trial.name for trial in spec.read_sweep_file(written(tmp_path, body, head)).trials]
    assert names == ["a-batch_size=8", "a-batch_size=16", "a-batch_size=24", "a-1", "b-1"]
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: seqpe_jax.sweeps.points is deprecated")
