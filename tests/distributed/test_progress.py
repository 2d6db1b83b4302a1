"""metrics.jsonl keeps what it should; the progress line says what it must."""

import errno
import io
import json
import types

import pytest
from tensorboardX.event_file_writer import EventsWriter

from seqpe_jax.distributed.progress import ProgressLine
from seqpe_jax.errors import Failure, InputError
from seqpe_jax.run_dir import RunDir
from seqpe_jax.training.metrics_writer import MetricsWriter


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, {"train/loss": 0.1 * step}, time=float(step))
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')
    assert [line["step"] for line in RunDir(tmp_path).read_metrics()] == [1, 2, 3, 4, 5]
    writer = MetricsWriter(tmp_path, 3)
    writer.write(4, {"train/loss": 1 / 3}, time=9.0)
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1] == {"step": 4, "time": 9.0, "train/loss": 1 / 3}


def test_a_broken_line_in_the_middle_is_named_and_nothing_is_lost(tmp_path):
    text = '{"step": 1}\n{"st\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match="metrics.jsonl, line 2"):
        MetricsWriter(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_tensorboard_events_are_written(tmp_path):
    writer = MetricsWriter(tmp_path, trackers=("tensorboard",))
    writer.write(1, {"train/loss": 2.0}, time=0.0)
    writer.close()
    assert [path.name.startswith("events") for path in (tmp_path / "tensorboard").iterdir()] == [True]


def test_metrics_wait_for_space_on_the_disk(tmp_path, monkeypatch, capsys):
    """The file takes half of a line, then nothing, then all; an event file fails once."""
    writer = MetricsWriter(tmp_path, trackers=("tensorboard",))
    file, space = writer._file, [20, 0, 0, 10**6]

    def write(content):
        if not space[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return file.write(content[: space[0]])

    writer._file = types.SimpleNamespace(write=write, close=file.close)
    flush = EventsWriter.flush

    def flush_events(self):
        write(b"")
        flush(self)

    monkeypatch.setattr(EventsWriter, "flush", flush_events)
    for step in range(1, 4):
        writer.write(step, {"train/loss": 1.0}, time=0.0)
        del space[0]
        writer.flush()
    shown = capsys.readouterr().err
    assert shown.count("space again") == 2
    writer.close()
    assert [line["step"] for line in RunDir(tmp_path).read_metrics()] == [1, 2, 3]
    events = list((tmp_path / "tensorboard").iterdir())
    assert events and max(path.stat().st_size for path in events) > 100

    writer = MetricsWriter(tmp_path, 3)
    writer._file = types.SimpleNamespace(write=write, close=writer._file.close)
    space[:] = [0]
    writer.write(4, {"train/loss": 1.0}, time=0.0)
    with pytest.raises(Failure, match="no space for the last 1 lines of .*metrics.jsonl"):
        writer.close()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_line_is_rewritten_on_a_terminal_and_rare_in_a_log():
    for stream in (Terminal(), io.StringIO()):
        line = ProgressLine(100, stream=stream)
        for step in range(51, 101):
            line.update(step, loss=1.25)
        line.close()
        text = stream.getvalue()
        assert text.count("step 51/100") == 1 and text.count("step 100/100") == 1
        assert "100%" in text and "loss 1.2500" in text
        assert ("\r" in text) == stream.isatty()
        assert text.count("step") == 2


def test_hours_are_reported_as_hours_and_slow_steps_have_a_rate(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("seqpe_jax.distributed.progress.clock.monotonic", lambda: now[0])
    stream = io.StringIO()
    line = ProgressLine(1001, stream=stream)
    line.update(1)
    now[0] = 40.0
    line.update(11)
    assert stream.getvalue().splitlines()[-1] == "step 11/1001  1%  1:06:00 left  0.250/s"


@pytest.mark.parametrize(
    "line", ['{"step": "2"}', '{"step": null}', '{"step": true}', '{"step": 2, "a": "b"}', "[" * 100_000]
)
def test_a_line_of_something_else_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(InputError, match="metrics.jsonl, line 2 is no object with a step"):
        RunDir(tmp_path).read_metrics()
