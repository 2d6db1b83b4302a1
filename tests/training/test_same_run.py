"""Checks before a run starts or resumes in a folder: same run, same data, room on the disk."""

import json
import shutil
import time

import pytest

import seqpe_jax
from seqpe_jax import config
from seqpe_jax.config.encodings import all_fields
from seqpe_jax.errors import Failure, InputError
from seqpe_jax.run_dir import RunDir
from seqpe_jax.tasks.language_modeling import LanguageModeling
from seqpe_jax.training import loop, resume
from seqpe_jax.training.loop import train_and_evaluate
from seqpe_jax.training.metrics_writer import MetricsWriter
from seqpe_jax.training.resume import check_same_run, check_space, random_bits_of, with_random_bits
from seqpe_jax.training.trainer import Trainer
from tests.run_files import arrays, bits, measured
from tests.tiny import tiny_config, train
from tests.training.test_trainer import written

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize("variant", ["seqpe", "rotary"])
def test_an_older_run_goes_on(tmp_path, variant):
    """Its file lacks fields that were added since, and holds values that nothing reads."""
    settings, added = tiny_config(variant=variant), dict.fromkeys(("fraction_digits", "resize", "log_scaling"))
    unread = {name: value for name, value in all_fields().items() if name not in config.to_dict(settings)["encoding"]}
    unread |= {"theta": 100.0} if variant == "seqpe" else {"width": 96, "qk": "multi", "scalar_scale": 2.0}
    written(tmp_path, settings, **{**unread, **added})
    check_same_run(settings, RunDir(tmp_path), 2)
    with pytest.raises(InputError, match="it differs in encoding.log_scaling: False -> True. Use a new --workdir"):
        check_same_run(tiny_config(variant=variant, encoding__log_scaling=True), RunDir(tmp_path), 2)


def test_a_run_keeps_the_random_bits_that_it_began_with(tmp_path):
    """Also where a new one would have others, as on another kind of device."""
    settings = tiny_config()
    assert settings.precision.random_bits == "auto"
    written(tmp_path, with_random_bits(settings, "rbg"))
    check_same_run(settings, RunDir(tmp_path), 2)
    assert random_bits_of(RunDir(tmp_path)) == "rbg"
    with pytest.raises(InputError, match="it differs in precision.random_bits: rbg -> threefry. Use a new"):
        check_same_run(tiny_config(precision__random_bits="threefry"), RunDir(tmp_path), 2)


def test_a_run_from_before_there_was_a_choice_has_threefry(tmp_path):
    written(tmp_path, tiny_config())
    values = json.loads((tmp_path / "config.json").read_text())
    del values["precision"]["random_bits"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert random_bits_of(RunDir(tmp_path)) == "threefry"
    check_same_run(tiny_config(), RunDir(tmp_path), 2)
    check_same_run(tiny_config(precision__random_bits="threefry"), RunDir(tmp_path), 2)
    with pytest.raises(InputError, match="precision.random_bits: threefry -> rbg"):
        check_same_run(tiny_config(precision__random_bits="rbg"), RunDir(tmp_path), 2)


def test_a_run_may_go_on_with_steps_skipped_from_there(tmp_path):
    written(tmp_path, tiny_config())
    check_same_run(tiny_config(optimizer__non_finite="skip", optimizer__skips=2), RunDir(tmp_path), 2)


def test_a_run_may_go_on_with_prepared_data_and_other_threads(tmp_path):
    """Where its examples are made changes none; that the data are the same, their fingerprint says."""
    written(tmp_path, tiny_config())
    check_same_run(tiny_config(data__prepared="prepared/text", data__threads=4), RunDir(tmp_path), 2)


def test_a_run_that_resumes_keeps_the_checkpoint_that_it_began_with(tmp_path, monkeypatch):
    written(tmp_path, tiny_config(init_from="runs/a"))
    check_same_run(tiny_config(init_from="runs/a"), RunDir(tmp_path), 2)
    check_same_run(tiny_config(), RunDir(tmp_path), 2)
    with pytest.raises(
        InputError, match="began with init_from=runs/a: init_from=runs/b is read only when a run begins"
    ):
        check_same_run(tiny_config(init_from="runs/b"), RunDir(tmp_path), 2)
    monkeypatch.setattr(Trainer, "of", lambda settings, **_: settings)
    assert loop.make_trainer(tiny_config(), RunDir(tmp_path), 2).init_from == "runs/a"


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 3 * 2**20))
    check_space(RunDir(tmp_path / "a" / "b"), 3 * 2**19, 2)
    check_space(RunDir(tmp_path), 3 * 2**20, 1)
    with pytest.raises(InputError, match="has 3.0 MiB of free space, and 2 checkpoint.s. of this model take 4.0"):
        check_space(RunDir(tmp_path / "a" / "b"), 2**21, 2)
    with pytest.raises(InputError, match="and 1 checkpoint.s. of this model take 4.0"):
        check_space(RunDir(tmp_path), 2**22, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    check_space(RunDir(tmp_path), 2**40, 3)  # a file system that does not tell
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1000))
    with pytest.raises(InputError, match="has 0.0 MiB of free space, and 3 checkpoint"):
        train_and_evaluate(tiny_config(steps=9), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_save_that_takes_too_long_for_a_preemption_is_reported_at_the_start(tmp_path, monkeypatch, capsys):
    assert all(0 < seconds < 60 for seconds in resume.save_seconds(tmp_path, 2**20)) and not any(tmp_path.iterdir())
    assert resume.slow_save_warning(RunDir(tmp_path), 2**20) == ""
    asked = []
    monkeypatch.setattr(
        resume, "save_seconds", lambda folder, size: asked.append(size) or (0.75 * size / 2**20, 0.25 * size / 2**20)
    )
    assert resume.slow_save_warning(RunDir(tmp_path), 30 * 2**20) == ""
    reported = resume.slow_save_warning(RunDir(tmp_path), 320 * 2**20)
    assert reported.startswith("warning: a save takes about 320 s (320 MiB at 1.0 MiB/s, as measured in")
    assert "run, 25% of it to read it back for its checksums" in reported.replace(str(tmp_path), "run")
    assert "\n" not in reported
    assert asked == [30 * 2**20, resume.PROBE_BYTES], "no more is written than is saved, and not more than needed"
    monkeypatch.setattr(resume, "save_seconds", lambda folder, size: (size / 1000, 0.0))
    train(tiny_config(variant="none", steps=1, eval__every=0), tmp_path / "run")
    assert "warning: a save takes about" in capsys.readouterr().out


@pytest.mark.parametrize(
    "values, words",
    [
        ({"export": {}, "data": {}, "model": {}, "encoding": {}}, "holds an export, which training would overwrite"),
        (
            {"model_type": "gpt2", "n_layer": 2},
            "holds the config.json of something else, which training would overwrite",
        ),
        ([], "is no object of fields, as `train` writes it"),
    ],
)
def test_a_folder_of_another_kind_is_not_trained_in(tmp_path, values, words):
    text = json.dumps(values)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=words):
        train_and_evaluate(tiny_config(), tmp_path)
    assert (tmp_path / "config.json").read_text() == text


LENGTHS = {"steps": 6, "checkpoint__every": 2, "eval__every": 0}


@pytest.mark.parametrize(
    "schedule, fields, step, refused",
    [
        ("linear", {"steps": 6}, 6, ""),
        (
            "linear",
            {"steps": 8},
            4,
            "was to take 6 steps, .*optimizer.schedule='linear'.: add --extend=true to continue to 8",
        ),
        ("cosine", {"steps": 8}, 4, "add --extend=true"),
        ("constant", {"steps": 8}, 6, ""),
        ("constant", {"steps": 2}, 4, "has 4 steps already: set steps to 4 or more, got 2"),
        ("wsd", {"steps": 8, "optimizer__decay_steps": 2}, 4, ""),
        ("wsd", {"steps": 8, "optimizer__decay_steps": 2}, 6, "add --extend=true"),
        ("wsd", {"steps": 8, "optimizer__decay_steps": 6}, 4, "add --extend=true"),
        ("wsd", {"steps": 6, "optimizer__decay_steps": 2}, 6, ""),
    ],
)
def test_more_steps(tmp_path, schedule, fields, step, refused):
    known = {"optimizer__schedule": schedule} | ({"optimizer__decay_steps": 2} if schedule == "wsd" else {})
    written(tmp_path, tiny_config(**LENGTHS, **known))
    settings = tiny_config(**LENGTHS | known | fields)
    if refused:
        with pytest.raises(InputError, match=refused) as caught:
            check_same_run(settings, RunDir(tmp_path), step)
        assert "\n" not in str(caught.value)
    else:
        check_same_run(settings, RunDir(tmp_path), step)
    if "extend" in refused:
        check_same_run(settings, RunDir(tmp_path), step, extend=True)


@pytest.mark.parametrize(
    "fields, change, refused",
    [
        ({"optimizer__learning_rate": 1e-3, "objective__contrastive__weight": 0.5}, ("optimizer.learning_rate",), ""),
        ({"optimizer__schedule": "constant"}, ("optimizer.schedule",), ""),
        ({"model__width": 48}, ("model.width",), "--change=model.width: what the run has saved depends on this"),
        ({}, ("model.widht",), "--change: unknown config field 'model.widht'"),
        ({}, ("steps",), "--change=steps: --extend=true"),
        ({"optimizer__clip": 0.0}, ("optimizer.clip",), "optimizer.clip: 1.0 -> 0.0 would add or remove arrays"),
    ],
)
def test_a_field_may_change(tmp_path, fields, change, refused):
    written(tmp_path, tiny_config())
    settings, run = tiny_config(**fields), RunDir(tmp_path)
    if refused:
        with pytest.raises(InputError, match=refused):
            check_same_run(settings, run, 2, change=change)
        return
    names = [name.replace("__", ".") for name in fields]
    with pytest.raises(InputError, match=f"or --change=.*{names[0]}.* to change them from step 2 on"):
        check_same_run(settings, run, 2)
    lines = check_same_run(settings, run, 2, change=names)
    assert sorted(line.partition(":")[0] for line in lines) == sorted(names)
    run.record_change(2, settings)
    run.record_change(2, settings)  # a start that was killed before it wrote config.json
    [entry] = run.config_history()
    assert entry["step"] == 2 and sorted(entry["changes"]) == sorted(names)
    run.write_config(config.to_dict(settings))
    run.record_change(4, settings)
    assert len(run.config_history()) == 1 and check_same_run(settings, run, 4, change=names) == []


@pytest.mark.slow
def test_a_run_extended_before_its_decay_is_one_that_was_that_long_from_the_beginning(tmp_path, monkeypatch):
    """Bit for bit: the order of the data, sampled positions, masks of the device's own bits and the learning rates go on."""
    monkeypatch.setenv("SEQPE_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("a line of text, and another one\n" * 60)
    fields = LENGTHS | {
        "optimizer__schedule": "wsd",
        "optimizer__decay_steps": 2,
        "optimizer__freeze": ("model/token_embedding/*",),
        "optimizer__freeze_steps": 5,  # thawed after the resume
        "optimizer__encoder_learning_rate": 1e-3,
        "data__name": "text_files",
        "data__paths": (str(tmp_path / "text.txt"),),
        "precision__random_bits": "rbg",
        "model__dropout": 0.1,
        "encoding__dropout": 0.1,
        "objective__shift__rate": 0.3,
    }
    train(tiny_config(**fields), tmp_path / "short")
    shutil.rmtree(tmp_path / "short" / "checkpoints" / "6")  # as if it had been stopped there
    longer = tiny_config(**fields | {"steps": 8})
    train(longer, tmp_path / "short")
    train(longer, tmp_path / "long")
    runs = (tmp_path / "short", tmp_path / "long")
    first, second = ((measured(run), bits(arrays(run, 8))) for run in runs)
    assert first == second and len(first[0]) == 8 and len(first[1]) > 50
    assert json.loads((tmp_path / "short" / "config.json").read_text())["steps"] == 8


@pytest.mark.slow
def test_a_folder_begun_anew_keeps_nothing_of_the_start_before(tmp_path, monkeypatch):
    """That one saved nothing; its tokenizer would be taken for the new run's."""
    monkeypatch.setenv("SEQPE_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("a line of text, and another one\n" * 60)
    workdir = tmp_path / "run"
    written(workdir, tiny_config(seed=7, variant="none"))
    for name in ("tokenizer.json", "classes.json", "tokenizer_config.json"):
        (workdir / name).write_text("{}")
    fields = {"steps": 1, "data__name": "text_files", "data__paths": (str(tmp_path / "text.txt"),), "eval__every": 0}
    train(tiny_config(variant="none", **fields), workdir)
    assert not {"tokenizer.json", "classes.json", "tokenizer_config.json"} & {path.name for path in workdir.iterdir()}
    assert seqpe_jax.load(workdir).tokenizer.name == "bytes"


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_data_in_its_own_folder_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SEQPE_JAX_CACHE", str(tmp_path / "cache"))
    text, run, moved = tmp_path / "text.txt", tmp_path / "run", tmp_path / "moved"
    text.write_text("a line of text, and another one\n" * 60)
    settings = tiny_config(
        variant="none",
        steps=4,
        eval__every=0,
        eval__lengths=(16,),
        eval__tokens=64,
        data__name="text_files",
        data__paths=(str(text),),
        checkpoint__keep=2,
    )

    def write(writer, step, *given, **named):  # somebody moves the folder while the third step is reported
        if step == 3:
            while not (run / "checkpoints" / "2").exists():
                time.sleep(0.01)
            run.rename(moved)
        line(writer, step, *given, **named)

    line = MetricsWriter.write
    with monkeypatch.context() as moving:
        moving.setattr(MetricsWriter, "write", write)
        with pytest.raises(Failure, match="was removed, moved or emptied while it trained"):
            train(settings, run)
    assert not run.exists() and sorted(path.name for path in (moved / "checkpoints").iterdir()) == ["2"]
    train(settings, moved)
    assert "resuming at step 2" in capsys.readouterr().out
    seqpe_jax.load(moved).evaluate()
    assert "has changed since" not in capsys.readouterr().err

    stored = json.loads((moved / "data.json").read_text())
    assert stored.keys() == {"train", "validation", "test"} and stored["train"]["tokens"] == 1728
    shutil.rmtree(moved / "checkpoints" / "4")
    text.write_text("another line of text, and one more\n" * 90)
    with pytest.raises(InputError) as caught:
        train(settings, moved)
    assert str(caught.value) == (
        f"the data of the run of {moved} have changed since it began: train: 1,728 tokens (fingerprint "
        f"{stored['train']['fingerprint'][:12]}) -> 2,835 tokens (fingerprint {fingerprint(settings, 'train')[:12]}). Put "
        f"the data back as they were, or begin a new run with its parameters: a new --workdir and --init-from={moved}"
    )
    assert not (moved / "checkpoints" / "4").exists() and json.loads((moved / "data.json").read_text()) == stored
    seqpe_jax.load(moved).evaluate()
    reported = capsys.readouterr().err
    assert f"note: text_files has changed since {moved} was trained: test: " in reported
    assert reported.count("has changed since") == 1

    listed = json.loads((moved / "digests.json").read_text())  # as an older version left it
    del listed["files"]["data.json"]
    (moved / "digests.json").write_text(json.dumps(listed))
    (moved / "data.json").unlink()
    train(settings, moved)
    assert "an older version stored no fingerprints of the data" in capsys.readouterr().out
    assert json.loads((moved / "data.json").read_text())["train"]["fingerprint"] == fingerprint(settings, "train")


def fingerprint(settings, split):
    return LanguageModeling(settings).fingerprint(split)["fingerprint"]
