"""Sources of text drawn by weight: which window has a number, changes of weights, metrics by source, refusals."""

import dataclasses
import json

import pytest

from seqpe_jax import config
from seqpe_jax.data import loader
from seqpe_jax.data.prepare import prepare
from seqpe_jax.errors import InputError
from seqpe_jax.tasks.language_modeling import LanguageModeling
from seqpe_jax.training.loop import train_and_evaluate
from tests.tiny import tiny_config


def test_examples_are_a_function_of_seed_and_number():
    """Shares hold in every stretch, each source reads on across blocks and changes of weights, and epochs differ."""
    sources = {"b": range(7), "a": range(100, 105)}
    phases = [(0, {"a": 1, "b": 3}), (12_345, {"a": 1, "b": 1})]
    mixture = loader.Mixture(sources, phases, 3)
    places = [mixture.place(number) for number in range(30_000)]
    for source in (0, 1):
        assert [index for own, index in places if own == source] == list(range(sum(own == source for own, _ in places)))
    assert sum(source for source, _ in places[:10_000]) == 7_500 and sum(source for source, _ in places[:100]) > 60
    assert mixture.given(12_345) == {"a": 3_130, "b": 9_215}
    assert list(mixture.given(30_000).values()) == [sum(own == source for own, _ in places) for source in (0, 1)]
    unchanged = loader.Mixture(sources, phases[:1], 3)
    assert places[:12_345] == [unchanged.place(number) for number in range(12_345)]
    own = [mixture[number] for number in range(60) if places[number][0] == 1]
    assert sorted(own[:7]) == sorted(own[7:14]) == list(range(7)) and own[:7] != own[7:14]
    thirds = loader.Mixture({"a": range(50), "b": range(50)}, [(0, {"a": 1, "b": 2})], 3)
    assert thirds.given(30_000)["a"] == pytest.approx(10_000, abs=30)
    drawn = [(thirds.place(number)[0], thirds[number]) for number in range(200)]
    assert [index for source, index in drawn if source][:50] != [index for source, index in drawn if not source][:50]
    batches = loader.TrainLoader(mixture, batch_size=4, seed=3, rows=(1, 3))
    assert batches.batch(20).tolist() == [mixture[81], mixture[83]]


@pytest.fixture
def settings(tmp_path):
    """A run of two steps on two sources, of which one is prepared."""
    for name, text in (("few", "a b c d e f g\n" * 60), ("many", "0 1 2 3 4 5\n" * 900)):
        records = [{"text": text} for _ in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = {name: {"paths": (str(tmp_path / f"{name}.jsonl"),), "weight": 1.0} for name in ("few", "many")}
    made = tiny_config(
        variant="alibi",
        steps=2,
        data__name="text",
        data__mixture=sources,
        data__packing="documents",
        data__tokenizer="bytes_eos",
        data__cache_dir=str(tmp_path / "cache"),
        eval__every=2,
        eval__lengths=(16,),
        optimizer__schedule="constant",
    )
    one = dataclasses.replace(made.data, mixture=(), paths=made.data.mixture[0].paths)
    prepare(one, tmp_path / "prepared", progress=False)
    with pytest.raises(InputError, match="data.mixture is prepared one source at a time"):
        prepare(made.data, tmp_path / "prepared", progress=False)
    few = dataclasses.replace(made.data.mixture[0], prepared=str(tmp_path / "prepared"))
    return dataclasses.replace(made, data=dataclasses.replace(made.data, mixture=(few, made.data.mixture[1])))


@pytest.mark.slow
def test_a_run_and_a_change_of_its_weights(settings, tmp_path, capsys):
    train_and_evaluate(settings, tmp_path / "run")
    lines = capsys.readouterr().out
    assert "few: 0.5 of the windows" in lines and "epochs in 2 steps" in lines and "attention stays inside" in lines
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {name for line in metrics for name in line}
    assert {"eval/loss@16", "source/few/loss@16", "source/many/loss@16"} <= found
    few, many = settings.data.mixture
    weighed = (few, dataclasses.replace(many, weight=3.0))
    changed = dataclasses.replace(settings, steps=4, data=dataclasses.replace(settings.data, mixture=weighed))
    with pytest.raises(InputError, match="data.mixture.many.weight: 1.0 -> 3.0.*--change=data.mixture"):
        train_and_evaluate(changed, tmp_path / "run")
    phases = [(0, {"few": 1.0, "many": 1.0}), (2, {"few": 1.0, "many": 3.0})]
    assert LanguageModeling(changed, run_dir=tmp_path / "run")._mixture_phases() == phases
    train_and_evaluate(changed, tmp_path / "run", change=["data.mixture"])
    assert "data.mixture.many.weight: 1.0 -> 3.0" in capsys.readouterr().out
    assert LanguageModeling(changed, run_dir=tmp_path / "run")._mixture_phases() == phases
    moved = (few, dataclasses.replace(weighed[1], paths=few.paths))
    changed = dataclasses.replace(changed, data=dataclasses.replace(settings.data, mixture=moved))
    with pytest.raises(InputError, match="data.mixture.many.paths"):
        train_and_evaluate(changed, tmp_path / "run", change=["data.mixture"])
    many = tmp_path / "many.jsonl"
    many.write_text(many.read_text().replace("0", "9"))
    with pytest.raises(InputError, match="data of the run of .* have changed since it began: train: "):
        train_and_evaluate(dataclasses.replace(settings, steps=6), tmp_path / "run", change=["data.mixture"])


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"data__mixture": {"a": {"path": "x"}}}, "unknown config field 'data.mixture.a.path'"),
        ({"data__mixture": {"a": 1.0}}, "must be a dict of sources"),
        ({"data__mixture": {"a/b": {"paths": ("x",)}}}, "a source's name has letters"),
        ({"data__mixture": {"a": {}}}, "data.mixture.a: data.name='text' needs data.paths"),
        ({"data__paths": ("x",)}, "leave data.paths and data.prepared out"),
        ({"eval__contexts": (16,)}, "eval.contexts are measured on one source"),
        ({"data__name": "stdlib_text"}, "data.mixture.a: data.name='stdlib_text' takes no data.paths"),
        (
            {"data__mixture": {"a": {"paths": ("x",), "weight": 1e-5}, "b": {"paths": ("x",)}}},
            "'a' has a share of 1e-05",
        ),
    ],
)
def test_what_is_no_mixture_is_refused(fields, words):
    with pytest.raises(InputError, match=words):
        tiny_config(**{"data__name": "text", "data__mixture": {"a": {"paths": ("x",)}}} | fields)


def test_a_mixture_is_stored_by_name():
    made = tiny_config(data__name="text", data__mixture={name: {"paths": [name]} for name in ("b", "a")})
    assert config.from_dict(json.loads(json.dumps(config.to_dict(made)))) == made
    assert list(config.to_dict(made)["data"]["mixture"]) == ["a", "b"]
