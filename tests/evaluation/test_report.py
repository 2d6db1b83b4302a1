"""Reports of run folders: what is missing is shown as missing, and numbers are those of the files."""

import csv
import json

import numpy as np
import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.evaluation import report, tables


def make_run(folder, kind="seqpe", seed=0, bits=((16, 2.0), (64, 3.0)), metrics=True, **config):
    folder.mkdir(parents=True)
    fields = {"seed": seed, "steps": 4, "batch_size": 2}
    fields |= {"data": {"name": "text_files", "length": 16}, "encoding": {"kind": kind}}
    (folder / "config.json").write_text(json.dumps(fields | config))
    if metrics:
        lines = [
            {"step": n, "time": 2.0 * n, "train/term/task": 5.0 - n, "train/tokens_per_second": 100.0 * n}
            for n in range(1, 5)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "ti')
    if bits:
        results = [
            {"length": length, "tokens": 640, "loss": value / 2, "perplexity": 2 * value, "bits_per_byte": value,
             "loss_by_position": {"position": [0.0, 1.0], "loss": [3.0, 2.0]}}
            for length, value in bits
        ]  # fmt: skip
        (folder / "evaluation.json").write_text(json.dumps({"parameters": 1234, "results": results}))
    if kind == "seqpe":
        np.savez(folder / "similarity.npz", pivots=[4, 8], positions=np.arange(16), cosine=np.random.rand(2, 16))


def test_a_folder_of_runs(tmp_path):
    make_run(tmp_path / "runs" / "seqpe")
    make_run(tmp_path / "runs" / "alibi", "alibi", bits=((16, 2.5),))
    make_run(tmp_path / "runs" / "rotary", "rotary", bits=(), metrics=False)
    (tmp_path / "runs" / "report").mkdir()
    main = report.write_report(tmp_path / "runs", tmp_path / "out")
    assert main.splitlines() == [
        "| encoding | 16 (1x) | 64 (4x) |", "| --- | ---: | ---: |", "| seqpe | **2.000** | **3.000** |",
        "| alibi | 2.500 | - |", "| rotary | - | - |",
    ]  # fmt: skip
    page = (tmp_path / "out" / "report.md").read_text()
    assert main in page and "| rotary | rotary | - | - | - | - |" in page
    assert "| seqpe | seqpe | 1,234 | 4 | 8 | 250 |" in page
    for name in ("extrapolation", "training_curves", "loss_by_position", "similarity_seqpe"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000 and f"({name}.png)" in page
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [(row["run"], row["length"], row["bits_per_byte"]) for row in rows] == [
        ("seqpe", "16", "2.0"), ("seqpe", "64", "3.0"), ("alibi", "16", "2.5"),
    ]  # fmt: skip
    assert rows[0]["word_perplexity"] == "" and "differ" not in page


def test_seeds_are_averaged_and_differences_told(tmp_path):
    make_run(tmp_path / "a", seed=0, bits=((16, 2.0),))
    make_run(tmp_path / "b", seed=1, bits=((16, 3.0),), steps=8)
    runs = report.find_runs(tmp_path)
    assert "**2.500** ± 0.707" in tables.by_length(runs, "bits_per_byte")
    assert report.differences(runs) == ["steps: 4 (a); 8 (b)", "seed: 0 (a); 1 (b)"]


def test_one_run_that_has_only_begun(tmp_path):
    make_run(tmp_path / "run", "none", bits=(), metrics=False)
    report.write_report(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.md", "results.csv"]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        report.find_runs(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no run"):
        report.find_runs(tmp_path)
    make_run(tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").write_text("{")
    with pytest.raises(InputError, match="evaluation.json is not JSON"):
        report.find_runs(tmp_path)
