"""Damage to any file of a run's folder: the newest good checkpoint is used, or one line says what is wrong."""

import json
import re
import shutil

import numpy as np
import pytest

import seqpe_jax
from seqpe_jax.checksums import DIGESTS_FILE, ORBAX_METADATA
from seqpe_jax.errors import InputError
from seqpe_jax.run_dir import META_FILE, OUTPUT_FILES, RunDir
from seqpe_jax.training import clock, loop
from seqpe_jax.training.checkpoint import Checkpointer
from seqpe_jax.training.loop import train_and_evaluate
from seqpe_jax.trees import flatten_dict
from tests.run_files import arrays, bits, files_of, flip, largest, measured, stored_state
from tests.tiny import older, tiny_config, train
from tests.training.test_checkpoint import Together
from tests.training.test_commands import word_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

NESTED = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("a line of text and another one\n" * 400)
    word_tokenizer(folder / "tokenizer.json", ["a", "line", "of", "text", "and", "another", "one"])
    return tiny_config(
        variant="none",
        steps=6,
        checkpoint__keep=3,
        eval__every=2,
        eval__lengths=(16,),
        eval__tokens=64,
        data__name="text_files",
        data__paths=(str(folder / "text.txt"),),
        data__cache_dir=str(folder / "cache"),
        data__tokenizer=str(folder / "tokenizer.json"),
        data__lossy_tokenizer=True,
        checkpoint__best="loss@16",
    )


@pytest.fixture(scope="module")
def trained(one_device, settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(settings, workdir)
    return workdir


def rewritten(path, change):
    path.write_bytes(change(path.read_bytes()))


def cut(path, count):
    rewritten(path, lambda content: content[:count])


def not_a_number(run, step):
    """A NaN inside an array, with digests that fit: as older versions saved it."""
    stored = stored_state(step)
    name = max(flatten_dict(stored["params"]), key=lambda name: flatten_dict(stored["params"])[name].size)
    flatten_dict(stored["params"])[name].flat[7] = np.nan
    again = Checkpointer(run.parent / "again")
    again.save(6, stored, {})
    again.close()
    shutil.rmtree(step)
    (run.parent / "again" / "checkpoints" / "6").rename(step)


def of_older_version(change):
    """Damage of a run that has no checksums of small files."""
    return lambda run, _: (older(run), change(run))


def digests(content):
    """Other checksums of a checkpoint."""
    return lambda _, step: (step / DIGESTS_FILE).write_text(content)


def metrics(old, new):
    """A part of a line of metrics replaced by another."""
    return lambda run, _: rewritten(run / "metrics.jsonl", lambda content: content.replace(old, new, 1))


def torn(run, step):
    """A byte flipped, and what a kill during a save and in a line of metrics leaves."""
    flip(largest(step))
    shutil.copytree(step, step.with_name("8.orbax-checkpoint-tmp"))
    cut(run / "metrics.jsonl", -20)


# Damage of a run with steps 2, 4 and 6, given its folder and that of step 6 -> the step that is then read, or words of the
# line that refuses to read it, and words of the line with which `train` refuses it; "" = it resumes.
OF_CHECKPOINTS = {  # and step 4 is read
    "a byte flipped": lambda run, step: flip(largest(step)),
    "an array truncated": lambda run, step: cut(largest(step), 100),
    "an array emptied": lambda run, step: cut(largest(step), 0),
    "an array longer": lambda run, step: rewritten(largest(step), lambda content: content + b"0"),
    "an array's file gone": lambda run, step: largest(step).unlink(),
    "the state gone": lambda run, step: shutil.rmtree(step / "state"),
    "the metadata gone": lambda run, step: shutil.rmtree(step / "meta"),
    "the tree of arrays gone": lambda run, step: (step / "state" / "_METADATA").unlink(),
    "the shardings gone": lambda run, step: (step / "state" / "_sharding").unlink(),
    "the manifest gone": lambda run, step: (step / "state" / "manifest.ocdbt").unlink(),
    "the mark of a finished save gone": lambda run, step: (step / ORBAX_METADATA).unlink(),
    "digests torn": lambda run, step: cut(step / DIGESTS_FILE, 40),
    "digests that are none": digests("[]"),
    "digests nested deep": digests(NESTED),
    "digests gone": lambda run, step: (step / DIGESTS_FILE).unlink(),
    "digests gone, and the files of step 4": lambda run, step: (
        shutil.copytree(step.with_name("4"), step, dirs_exist_ok=True),
        (step / DIGESTS_FILE).unlink(),
    ),
    "a digest that is no text": lambda run, step: rewritten(
        step / DIGESTS_FILE, lambda content: re.sub(rb': "[0-9a-f]{64}"', b": 7", content)
    ),
    "a step under another number": lambda run, step: step.rename(step.with_name("9")),
    "another step under its number": lambda run, step: (
        shutil.rmtree(step),
        shutil.copytree(step.with_name("4"), step),
    ),
    "what a kill leaves": torn,
}
HARMLESS = {  # and step 6 is read
    "an empty folder of a later step": lambda run, step: step.with_name("30").mkdir(),
    "a save cut short": lambda run, step: shutil.copytree(step, step.with_name("8.orbax-checkpoint-tmp")),
    "a foreign file among the checkpoints": lambda run, step: step.with_name("12").write_text("a letter"),
    "a foreign file in a checkpoint": lambda run, step: (step / "letter.txt").write_text("a letter"),
    "an older one damaged": lambda run, step: flip(largest(step.with_name("2"))),
    "the last line of metrics torn": lambda run, step: cut(run / "metrics.jsonl", -20),
    "metrics gone": lambda run, step: (run / "metrics.jsonl").unlink(),
    "an older run, sizes gone": of_older_version(lambda run: (run / "sizes.json").unlink()),
}
CASES = {name: (damage, 4, "") for name, damage in OF_CHECKPOINTS.items()}
CASES |= {name: (damage, 6, "") for name, damage in HARMLESS.items()}
CASES |= {
    "a number that is none in an array": (not_a_number, "is of no use: its .* not a number", "is of no use"),
    "all checkpoints damaged": (
        lambda run, step: [flip(largest(step.with_name(name))) for name in "246"],
        "all checkpoints .*are damaged; of the newest",
        "all checkpoints .*are damaged",
    ),
    "no checkpoints": (
        lambda run, step: shutil.rmtree(step.parent),
        "no checkpoints in",
        "metrics up to step 6, but .* is gone",
    ),
    "a line of metrics torn": (metrics(b'"step": 3', b'"st'), 6, "line 4"),
    "a step of metrics that is no number": (
        metrics(b'"step": 3', b'"step": "3"'),
        6,
        "line 4 is no object with a step .its step must be a whole number",
    ),
    "metrics that are none": (
        lambda run, step: (run / "metrics.jsonl").write_bytes(b"\xff\x00\n[]\n"),
        6,
        "line 1 is no object",
    ),
    "an empty config": (lambda run, step: cut(run / "config.json", 0), "config.json has changed", "config.json"),
    "no config": (lambda run, step: (run / "config.json").unlink(), "config.json", "config.json"),
    "sizes gone": (lambda run, step: (run / "sizes.json").unlink(), "sizes.json is missing, which", "is missing"),
    "digests of small files gone": (
        lambda run, step: (run / DIGESTS_FILE).unlink(),
        "digests.json is missing, which this run",
        "digests.json is missing",
    ),
    "digests of small files torn": (
        lambda run, step: cut(run / DIGESTS_FILE, 90),
        "digests.json is damaged: put",
        "is damaged",
    ),
    "an older run, a config that is null": (
        of_older_version(lambda run: (run / "config.json").write_text("null")),
        "is no object of fields",
        "config.json",
    ),
    "an older run, a config nested deep": (
        of_older_version(lambda run: (run / "config.json").write_text(NESTED)),
        "config.json cannot be read",
        "config.json",
    ),
    "an older run, sizes nested deep": (
        of_older_version(lambda run: (run / "sizes.json").write_text(NESTED)),
        "sizes.json cannot be read",
        "sizes.json",
    ),
    "a tokenizer torn": (lambda run, step: cut(run / "tokenizer.json", 90), "tokenizer", "tokenizer"),
    "an empty tokenizer": (lambda run, step: cut(run / "tokenizer.json", 0), "tokenizer.json", "tokenizer.json"),
}


def damaged(what, trained, tmp_path):
    """Returns a damaged copy of a run."""
    run = tmp_path / what.replace(" ", "_") / "run"
    shutil.copytree(trained, run)
    CASES[what][0](run, run / "checkpoints" / "6")
    return run


def test_damage_is_found_by_who_reads_and_by_who_trains(settings, trained, tmp_path):
    for what, (_, read, refused) in CASES.items():
        run = damaged(what, trained, tmp_path)
        content = contents(run)
        if isinstance(read, int):
            assert RunDir(run).require_latest_step() == read, what
            assert [one.require_latest_step() for one in Together(2).check(run, "eval/loss@16")] == [read, read], what
        else:
            in_one_line(read, lambda run=run: seqpe_jax.load(run))
        assert contents(run) == content, f"{what}: reading changes nothing"
        if refused:
            in_one_line(refused, lambda run=run: (train_and_evaluate(settings, run), seqpe_jax.load(run)))
        else:
            RunDir(run).quarantine("eval/loss@16")
            assert RunDir(run).require_latest_step() == read, what
        assert content <= contents(run), f"{what}: nothing is deleted"


@pytest.mark.parametrize("what", ["what a kill leaves", "a step under another number"])
def test_a_damaged_run_resumes_to_the_same_state_and_metrics(settings, trained, tmp_path, what, capsys, monkeypatch):
    run, step = damaged(what, trained, tmp_path), 9 if "number" in what else 6
    content, clocks = contents(run), []
    seqpe_jax.load(run)
    err = capsys.readouterr().err
    assert f"checkpoints/{step} is damaged (" in err and "step 4 is read in its place" in err, err
    monkeypatch.setattr(
        loop, "TrainingClock", lambda *given, **named: clocks.append(named) or clock.TrainingClock(*given, **named)
    )
    train_and_evaluate(settings, run)
    assert f"renamed to {step}.damaged" in capsys.readouterr().out
    starts = RunDir(run).starts()
    assert [start["step"] for start in starts] == [0, 4]
    stored = json.loads((run / "checkpoints" / "4" / META_FILE).read_text())["productive_seconds"]
    # The goodput is over all starts.
    assert clocks == [{"productive": stored, "first_start": starts[0]["time"]}] and stored > 0
    assert bits(arrays(run, 6)) == bits(arrays(trained, 6))
    assert measured(run) == measured(trained) and content <= contents(run)


def test_no_flipped_bit_of_a_small_file_is_taken_for_true(trained, tmp_path):
    """Some of them would change a field of the config, or the tokens of a text."""
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoints"))
    names = set(json.loads((run / DIGESTS_FILE).read_text())["files"])
    assert names == {"config.json", "sizes.json", "data.json", "tokenizer.json"}
    assert {path.name for path in trained.iterdir()} <= OUTPUT_FILES, "each is refused as an output"
    for name in names:
        held = (run / name).read_bytes()
        for bit in range(0, 8 * len(held), 53):
            flipped = bytearray(held)
            flipped[bit // 8] ^= 1 << bit % 8
            (run / name).write_bytes(flipped)
            with pytest.raises(InputError, match=f"{name} has changed since it was written: put back a copy"):
                _ = RunDir(run).config_values
        (run / name).write_bytes(held)
    values = RunDir(run).config_values

    values["eval"]["tokens"] = 99  # by hand, as the line says how
    (run / "config.json").write_text(json.dumps(values))
    in_one_line("remove the entry of config.json from .*digests.json", lambda: RunDir(run).config_values)
    listed = json.loads((run / DIGESTS_FILE).read_text())
    del listed["files"]["config.json"]
    (run / DIGESTS_FILE).write_text(json.dumps(listed))
    assert RunDir(run).config_values["eval"]["tokens"] == 99
    (run / DIGESTS_FILE).write_text('{"files": {}}')  # as the message about a lost list says
    (run / "sizes.json").unlink()
    assert RunDir(run).config_values["eval"]["tokens"] == 99


def test_a_run_of_which_no_checkpoint_is_left_says_that_it_begins_anew(settings, trained, tmp_path, capsys):
    """As one does that was killed before its first save."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for step in (2, 4, 6):
        shutil.rmtree(run / "checkpoints" / str(step))
    in_one_line("no finished checkpoint", lambda: seqpe_jax.load(run))
    train_and_evaluate(settings, run)
    assert "no checkpoint, though 6 steps were done: starting anew" in capsys.readouterr().out
    assert measured(run) == measured(trained)


def in_one_line(words, call):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def contents(run):
    """The contents of a run's files, without the metrics and the starts, which are rewritten when it resumes."""
    return {path.read_bytes() for path in files_of(run) if path.name not in ("metrics.jsonl", "starts.jsonl")}
