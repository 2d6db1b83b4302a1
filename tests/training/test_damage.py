"""Damage to any file of a run's folder: the newest good checkpoint is used, or one line says what is wrong."""

import json
import re
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import seqpe_jax
from seqpe_jax import checksums
from seqpe_jax.checksums import ORBAX_METADATA
from seqpe_jax.errors import InputError
from seqpe_jax.run_dir import META_FILE, OUTPUT_FILES, RunDir
from seqpe_jax.training import clock, loop
from seqpe_jax.training.checkpoint import Checkpointer
from seqpe_jax.training.loop import train_and_evaluate
from seqpe_jax.trees import flatten_dict
from tests.tiny import older, tiny_config, train
from tests.training.test_checkpoint import Together, files_of, flip, largest
from tests.training.test_commands import word_tokenizer
from tests.training.test_resume import CLOCK

pytestmark = pytest.mark.slow

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
def trained(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(settings, workdir)
    return workdir


def bits(params):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def rewritten(path, change):
    path.write_bytes(change(path.read_bytes()))


def not_a_number(run):
    """A NaN inside an array, with digests that fit: as older versions saved it."""
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(newest(run) / "state").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        stored = reader.restore(newest(run) / "state", args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    name = max(flatten_dict(stored["params"]), key=lambda name: flatten_dict(stored["params"])[name].size)
    flatten_dict(stored["params"])[name].flat[7] = np.nan
    again = Checkpointer(run.parent / "again")
    again.save(6, stored, {})
    again.close()
    shutil.rmtree(newest(run))
    (run.parent / "again" / "checkpoints" / "6").rename(newest(run))


def newest(run):
    return run / "checkpoints" / "6"


def state(run, name):
    return newest(run) / "state" / name


# What is done to a run of steps 2, 4 and 6 -> the step that is then read, or words of the line that refuses to read it, and
# the words of the line with which `train` refuses to go on; "" = it ends with the state and the metrics of the whole run.
CASES = {
    "a byte flipped in an array": (
        lambda run: flip(largest(newest(run)), largest(newest(run)).stat().st_size // 2),
        4,
        "",
    ),
    "an array truncated": (lambda run: rewritten(largest(newest(run)), lambda held: held[:100]), 4, ""),
    "an array emptied": (lambda run: rewritten(largest(newest(run)), lambda _: b""), 4, ""),
    "an array longer": (lambda run: rewritten(largest(newest(run)), lambda held: held + b"0"), 4, ""),
    "an array's file gone": (lambda run: largest(newest(run)).unlink(), 4, ""),
    "the state gone": (lambda run: shutil.rmtree(newest(run) / "state"), 4, ""),
    "the metadata gone": (lambda run: shutil.rmtree(newest(run) / "meta"), 4, ""),
    "the tree of arrays gone": (lambda run: state(run, "_METADATA").unlink(), 4, ""),
    "the shardings gone": (lambda run: state(run, "_sharding").unlink(), 4, ""),
    "the manifest gone": (lambda run: state(run, "manifest.ocdbt").unlink(), 4, ""),
    "the mark of a finished save gone": (lambda run: (newest(run) / ORBAX_METADATA).unlink(), 4, ""),
    "digests torn": (lambda run: rewritten(newest(run) / checksums.DIGESTS_FILE, lambda held: held[:40]), 4, ""),
    "digests that are none": (lambda run: (newest(run) / checksums.DIGESTS_FILE).write_text("[]"), 4, ""),
    "a digest that is no text": (
        lambda run: rewritten(
            newest(run) / checksums.DIGESTS_FILE, lambda held: re.sub(rb': "[0-9a-f]{64}"', b": 7", held)
        ),
        4,
        "",
    ),
    "digests nested deep": (lambda run: (newest(run) / checksums.DIGESTS_FILE).write_text(NESTED), 4, ""),
    "an empty folder of a later step": (lambda run: newest(run).with_name("30").mkdir(), 6, ""),
    "a save cut short": (
        lambda run: shutil.copytree(newest(run), newest(run).with_name("8.orbax-checkpoint-tmp")),
        6,
        "",
    ),
    "a step under another number": (lambda run: newest(run).rename(newest(run).with_name("9")), 4, ""),
    "another step under its number": (
        lambda run: (shutil.rmtree(newest(run)), shutil.copytree(newest(run).with_name("4"), newest(run))),
        4,
        "",
    ),
    "a foreign file among the checkpoints": (lambda run: (run / "checkpoints" / "12").write_text("a letter"), 6, ""),
    "a foreign file in a checkpoint": (lambda run: (newest(run) / "letter.txt").write_text("a letter"), 6, ""),
    "a number that is none in an array": (not_a_number, "is of no use: its .* not a number", "is of no use"),
    "an older one damaged": (lambda run: flip(largest(newest(run).with_name("2")), 50), 6, ""),
    "all checkpoints damaged": (
        lambda run: [flip(largest(newest(run).with_name(step)), 50) for step in "246"],
        "all checkpoints .*are damaged; of the newest",
        "all checkpoints .*are damaged",
    ),
    "no checkpoints": (
        lambda run: shutil.rmtree(run / "checkpoints"),
        "no checkpoints in",
        "metrics up to step 6, but .* is gone",
    ),
    "the last line of metrics torn": (lambda run: rewritten(run / "metrics.jsonl", lambda held: held[:-20]), 6, ""),
    "a line of metrics torn": (
        lambda run: rewritten(run / "metrics.jsonl", lambda held: held.replace(b'"step": 3', b'"st', 1)),
        6,
        "line 4",
    ),
    "a step of metrics that is no number": (
        lambda run: rewritten(run / "metrics.jsonl", lambda held: held.replace(b'"step": 3', b'"step": "3"', 1)),
        6,
        "line 4 is no object with a step .its step must be a whole number",
    ),
    "metrics that are none": (
        lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\x00\n[]\n"),
        6,
        "line 1 is no object",
    ),
    "metrics gone": (lambda run: (run / "metrics.jsonl").unlink(), 6, ""),
    "an empty config": (lambda run: (run / "config.json").write_text(""), "config.json has changed", "config.json"),
    "no config": (lambda run: (run / "config.json").unlink(), "config.json", "config.json"),
    "sizes gone": (lambda run: (run / "sizes.json").unlink(), "sizes.json is missing, which", "sizes.json is missing"),
    "digests of small files gone": (
        lambda run: (run / checksums.DIGESTS_FILE).unlink(),
        "digests.json is missing, which this run",
        "digests.json is missing",
    ),
    "digests of small files torn": (
        lambda run: rewritten(run / checksums.DIGESTS_FILE, lambda held: held[:90]),
        "digests.json is damaged: put",
        "is damaged",
    ),
    "an older run, a config that is null": (
        lambda run: (older(run), (run / "config.json").write_text("null")),
        "is no object of fields",
        "config.json",
    ),
    "an older run, a config nested deep": (
        lambda run: (older(run), (run / "config.json").write_text(NESTED)),
        "config.json cannot be read",
        "config.json",
    ),
    "an older run, sizes nested deep": (
        lambda run: (older(run), (run / "sizes.json").write_text(NESTED)),
        "sizes.json cannot be read",
        "sizes.json",
    ),
    "an older run, sizes gone": (lambda run: (older(run), (run / "sizes.json").unlink()), 6, ""),
    "a tokenizer torn": (
        lambda run: rewritten(run / "tokenizer.json", lambda held: held[:90]),
        "tokenizer",
        "tokenizer",
    ),
    "an empty tokenizer": (lambda run: (run / "tokenizer.json").write_text(""), "tokenizer.json", "tokenizer.json"),
}


RESUMED = (  # the state and the metrics after resuming are compared for these
    "a byte flipped in an array",
    "digests torn",
    "a step under another number",
    "a save cut short",
    "the last line of metrics torn",
    "an older run, sizes gone",
)


def damaged(what, trained, tmp_path):
    """Returns a damaged copy of a run."""
    run = tmp_path / what.replace(" ", "_") / "run"
    shutil.copytree(trained, run)
    CASES[what][0](run)
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


@pytest.mark.parametrize("what", RESUMED)
def test_a_damaged_run_resumes_to_the_same_state_and_metrics(settings, trained, tmp_path, what, monkeypatch):
    run = damaged(what, trained, tmp_path)
    content, saved, clocks = contents(run), RunDir(run).require_latest_step(), []
    monkeypatch.setattr(
        loop, "TrainingClock", lambda *given, **named: clocks.append(named) or clock.TrainingClock(*given, **named)
    )
    train_and_evaluate(settings, run)
    starts = RunDir(run).starts()
    assert [start["step"] for start in starts] == [0, saved]
    for named in clocks:  # the goodput is over all starts
        stored = json.loads((run / "checkpoints" / str(saved) / META_FILE).read_text())["productive_seconds"]
        assert named == {"productive": stored, "first_start": starts[0]["time"]} and stored > 0
    assert len(clocks) == 1 or saved == settings.steps
    assert bits(seqpe_jax.load(run).params) == bits(seqpe_jax.load(trained).params)
    assert measured(run) == measured(trained) and content <= contents(run)


def test_no_flipped_bit_of_a_small_file_is_taken_for_true(trained, tmp_path):
    """Some of them would change a field of the config, or the tokens of a text."""
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoints"))
    names = set(json.loads((run / checksums.DIGESTS_FILE).read_text())["files"])
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
    listed = json.loads((run / checksums.DIGESTS_FILE).read_text())
    del listed["files"]["config.json"]
    (run / checksums.DIGESTS_FILE).write_text(json.dumps(listed))
    assert RunDir(run).config_values["eval"]["tokens"] == 99
    (run / checksums.DIGESTS_FILE).write_text('{"files": {}}')  # as the message about a lost list says
    (run / "sizes.json").unlink()
    assert RunDir(run).config_values["eval"]["tokens"] == 99


def test_a_run_of_which_no_checkpoint_is_left_says_that_it_begins_anew(settings, trained, tmp_path, capsys):
    """As one does that was killed before its first save."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for step in (2, 4, 6):
        shutil.rmtree(run / "checkpoints" / str(step))
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


def measured(run):
    """The lines of metrics, without times and rates."""
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in RunDir(run).read_metrics()]
