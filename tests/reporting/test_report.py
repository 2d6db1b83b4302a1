"""Reports of run folders: numbers are those of the files, missing ones are shown as missing."""

import csv
import json

import numpy as np
import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.metric_registry import METRICS
from seqpe_jax.reporting import plots, report, tables
from seqpe_jax.reporting.plot_style import row_styles
from seqpe_jax.reporting.study import differences, read_study


def make_run(folder, kind="seqpe", seed=0, bits=((16, 2.0), (64, 3.0)), metrics=True, **config):
    folder.mkdir(parents=True)
    fields = {"seed": seed, "steps": 4, "batch_size": 2}
    fields |= {"data": {"name": "text_files", "length": 16}, "encoding": {"kind": kind}}
    (folder / "config.json").write_text(json.dumps(fields | config))
    if metrics:
        lines = [
            {
                "step": n,
                "time": 2.0 * n,
                "train/term/task": 5.0 - n,
                "train/tokens_per_second": 100.0 * n,
                "train/step_seconds": 0.01 * n,
                "train/data_seconds": 0.002 * n,
                "train/goodput": 0.2 * n,
            }
            for n in range(1, 5)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "ti')
    if bits:
        results = [
            {
                "length": length,
                "tokens": 640,
                "loss": value / 2,
                "perplexity": 2 * value,
                "bits_per_byte": value,
                "loss_by_position": {"position": [0.0, 1.0], "loss": [3.0, 2.0]},
            }
            for length, value in bits
        ]
        work = {"parameters": 1234, "training_flops": 2752764.75}
        (folder / "evaluation.json").write_text(json.dumps(work | {"results": results}))
    if kind == "seqpe":
        positions = np.arange(16)[:, None]
        arrays = {"pivots": positions[[4, 8]], "positions": positions, "cosine": np.random.rand(2, 16)}
        np.savez(folder / "similarity.npz", **arrays)


def test_encodings_with_gates_have_names_and_lines_of_their_own(tmp_path):
    """Also runs of versions in which FoX and CABLE were kinds."""
    named = {
        "fox": {"kind": "none", "gate": "forget"},
        "cable": {"kind": "cable", "gate_bias": 0.0},
        "alibi": {"kind": "alibi"},
        "alibi+cable": {"kind": "alibi", "gate": "cable"},
        "none": {"kind": "none"},
    }
    for number, encoding in enumerate(named.values()):
        make_run(tmp_path / str(number), encoding=encoding, metrics=False)
    study = read_study(tmp_path)
    assert study.rows == list(named)
    assert len(set(row_styles(study).values())) == len(named)


def test_a_folder_of_runs(tmp_path):
    make_run(tmp_path / "runs" / "a b")
    make_run(tmp_path / "runs" / "alibi", "alibi", bits=((16, 2.5),))
    make_run(tmp_path / "runs" / "rotary", "rotary", bits=(), metrics=False)
    in_contexts(tmp_path / "runs" / "a b", {16: 2.0, 64: 1.75})
    (tmp_path / "runs" / "report").mkdir()
    main = report.write_report(tmp_path / "runs", tmp_path / "out")
    assert main.splitlines() == [
        "| encoding | 16 (1x) | 64 (4x) | parameters | FLOPs per token |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| seqpe | **2.000** | **3.000** | 1,234 | 2.75 M |",
        "| alibi | 2.500 | - | 1,234 | 2.75 M |",
        "| rotary | - | - | - | - |",
    ]
    page = (tmp_path / "out" / "report.md").read_text()
    assert main in page and "| rotary | rotary | 0 | unfinished: step 0 of 4 | - | - | - |" in page
    assert (
        "| rotary | - | - | - | - | - | - | - |" in page
        and "| seqpe | 1,234 | 25.0 | 5.0 | 250 | 8 | 80% | - |" in page
    )
    assert (
        "## Bits per byte by context (lower is better)" in page and "| seqpe | **2.000** | **1.750** | -0.250 |" in page
    )
    assert page.index("(contexts.png)") < page.index("(extrapolation.png)")
    for name in ("contexts", "extrapolation", "training_curves", "loss_by_position", "similarity_a b"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000
        assert f"({name.replace(' ', '%20')}.png)" in page
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [(row["run"], row["length"], row["bits_per_byte"]) for row in rows] == [
        ("a b", "16", "2.0"),
        ("a b", "64", "3.0"),
        ("a b", "", "2.0"),
        ("a b", "", "1.75"),
        ("alibi", "16", "2.5"),
        ("rotary", "", ""),
    ]
    assert rows[0]["word_perplexity"] == "" and "The runs differ" not in page
    sentence = "At 16 seqpe has the best value, 0.500 ahead of alibi; one seed each, so no test."
    assert f"Bits per byte, lower is better:\n\n- {sentence}\n\n" in page


def in_contexts(folder, bits, targets=640):
    """Adds to a run's evaluation that of the same tokens under several contexts."""
    path = folder / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["results"] += [
        {"context": context, "targets": targets, "stride": 8, "loss": value / 2, "bits_per_byte": value}
        for context, value in bits.items()
    ]
    path.write_text(json.dumps(evaluation))


def test_the_gain_from_context_is_that_of_the_same_tokens(tmp_path):
    """A table of its own, and a plot of differences whose zero is the value under the smallest context."""
    for seed, kind, bits in (
        (0, "fire", {16: 2.0, 64: 1.75}),
        (1, "fire", {16: 2.5, 64: 2.0}),
        (0, "alibi", {16: 2.0, 64: 3.0}),
    ):
        make_run(tmp_path / f"{kind}-{seed}", kind, seed=seed, bits=((16, 9.0), (64, 8.0)))
        in_contexts(tmp_path / f"{kind}-{seed}", bits)
    study = read_study(tmp_path)
    table = tables.by_context(study)
    assert table.note.startswith("The same 640 tokens, with at most so many tokens of context before each.")
    assert tables.markdown(table).splitlines() == [
        "| encoding | 16 | 64 | from 16 to 64 |",
        "| --- | ---: | ---: | ---: |",
        "| alibi | **2.000** | 3.000 | +1.000 |",
        "| fire | 2.250 ± 3.177 | **1.875** ± 1.588 | -0.375 ± 1.588 |",
    ]
    assert "without a gain from context" in tables.by_size(study, "text", METRICS["text"][0]).note
    [zero, *curves] = plots.contexts(study).figure.axes[0].get_lines()
    assert set(zero.get_ydata()) == {0.0} and [list(curve.get_ydata()) for curve in curves[:2]] == [
        [0, 1.0],
        [0, -0.375],
    ]
    rows = list(csv.DictReader(tables.results_csv(study).splitlines()))
    assert [(row["run"], row["length"], row["context"], row["targets"], row["bits_per_byte"]) for row in rows[:4]] == [
        ("alibi-0", "16", "", "", "9.0"),
        ("alibi-0", "64", "", "", "8.0"),
        ("alibi-0", "", "16", "640", "2.0"),
        ("alibi-0", "", "64", "640", "3.0"),
    ]
    assert differences(study) == ["seed: [0] (alibi); [0, 1] (fire)"]


def test_contexts_alone_are_an_evaluation_and_other_tokens_are_noted(tmp_path):
    make_run(tmp_path / "a", bits=())
    (tmp_path / "a" / "evaluation.json").write_text('{"results": []}')
    make_run(tmp_path / "b", "alibi", bits=((16, 9.0), (64, 8.0)))
    for name, targets in (("a", 640), ("b", 320)):
        in_contexts(tmp_path / name, {16: 2.0}, targets)
    path = tmp_path / "b" / "evaluation.json"
    path.write_text(path.read_text().replace('"tokens": 640', '"tokens": 641', 1))  # as an older version counted
    study = read_study(tmp_path)
    assert [run.state for run in study.runs] == ["finished", "finished"]
    notes = report.notes(study)
    assert "The runs differ in [context, targets, stride] evaluated: [[16, 640, 8]] (a); [[16, 320, 8]] (b)" in notes
    assert "The lengths of b were evaluated on different tokens, and do not compare: evaluate again" in notes
    assert "| seqpe | **2.000** |" in tables.markdown(tables.by_context(study))


def test_runs_of_one_encoding_that_differ_in_more_than_the_seed_are_not_averaged(tmp_path, without_plots):
    make_run(tmp_path / "b", bits=((16, 2.0),), encoding={"kind": "seqpe", "mode": "attn_bias"})
    make_run(tmp_path / "c", bits=((16, 3.0),), encoding={"kind": "seqpe", "mode": "attn_scalar"})
    report.write_report(tmp_path, tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| seqpe (mode=attn_bias) | **2.000** |" in page and "| seqpe (mode=attn_scalar) | 3.000 |" in page
    assert "±" not in page and "| encoding.mode | attn_bias | seqpe (mode=attn_bias) |" in page


def test_rows_are_named_by_what_differs_from_most(tmp_path):
    other = {"steps": 8, "data": {"name": "x", "length": 16}}
    variants = {
        "base": {},
        "base-1": {"seed": 1},
        "apart": {"contrastive": 0.0},
        "alone": {"distillation": 0.0},
        "both": other,
    }
    for name, variant in variants.items():
        losses = {term: {"weight": variant.pop(term, 0.1)} for term in ("contrastive", "distillation")}
        make_run(tmp_path / name, objective=losses, **variant)
    make_run(tmp_path / "alibi", "alibi", steps=9)
    assert {run.name: run.row for run in read_study(tmp_path).runs} == {
        "alone": "seqpe (distillation.weight=0.0)",
        "apart": "seqpe (contrastive.weight=0.0)",
        "base": "seqpe",
        "base-1": "seqpe",
        "both": "seqpe (steps=8, name=x)",
        "alibi": "alibi",
    }


def test_rows_of_a_sweep_have_the_names_of_their_runs_without_the_seed(tmp_path):
    variants = {
        "full": {},
        "off": {"objective": {"weight": 0.0}},
        "on-0": {"steps": 9},
        "on-1": {"steps": 9, "seed": 1},
    }
    for name, variant in variants.items():
        make_run(tmp_path / name, **variant)
    make_run(tmp_path / "baseline", "alibi")
    points = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/config.json")}
    (tmp_path / "sweep.json").write_text(json.dumps({"points": {n: {"settings": points[n]} for n in sorted(points)}}))
    study = read_study(tmp_path)
    assert {run.name: run.row for run in study.runs} == {
        "full": "full",
        "off": "off",
        "on-0": "on",
        "on-1": "on",
        "baseline": "alibi",
    }
    cost = tables.training_cost(study)
    alone = dict(zip(cost.header, (cell.text for cell in cost.rows[0]), strict=True))
    assert alone["run"] == "full" and alone["step (ms)"] == "25.0"
    assert alone["wait for data (ms)"] == "5.0" and alone["goodput"] == "80%", "a mean, and the last one"


def test_unfinished_and_stale_results_are_noted(tmp_path):
    make_run(tmp_path / "a", steps=9)
    make_run(tmp_path / "b", "alibi", steps=9)
    for name, values in (("a", {"step": 2, "split": "test"}), ("b", {"step": 4, "split": "validation"})):
        path = tmp_path / name / "evaluation.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    assert report.notes(read_study(tmp_path)) == [
        'The runs differ in evaluated split: "test" (a); "validation" (b)',
        "a is not finished: step 4 of 9",
        "a was evaluated at step 2, but its last reported step is 4",
        "b is not finished: step 4 of 9",
    ]


def test_an_unfinished_run_does_not_count_where_another_has_finished(tmp_path):
    make_run(tmp_path / "a", bits=((16, 2.0),))
    make_run(tmp_path / "b", seed=1, bits=((16, 3.0),))
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 3}\n')
    make_run(tmp_path / "c", "alibi", bits=((16, 4.0),), metrics=False)
    study = read_study(tmp_path)
    table = tables.markdown(tables.by_size(study, "text", METRICS["text"][0]))
    assert "| seqpe | **2.000** (1 of 2) |" in table and "| alibi | 4.000 |" in table
    left_out = "b is not finished: step 3 of 4, so its results are left out where others of its row have finished"
    assert left_out in report.notes(study) and "b,seqpe,unfinished: step 3 of 4," in tables.results_csv(study)


def test_numbers_that_are_huge_or_not_finite(tmp_path, without_plots):
    make_run(tmp_path / "a", bits=((16, float("nan")),))
    make_run(tmp_path / "b", "alibi", bits=((16, 1e200),))
    report.write_report(tmp_path, tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| seqpe | nan |" in page and "| alibi | **1e+200** |" in page


def test_seeds_are_averaged_and_differences_noted(tmp_path):
    make_run(tmp_path / "a", seed=0, bits=((16, 2.0),))
    make_run(tmp_path / "b", seed=1, bits=((16, 3.0),))
    study, metric = read_study(tmp_path), METRICS["text"][0]
    assert "| seqpe | 2.500 ± 6.353 |" in tables.markdown(tables.by_size(study, "text", metric))
    assert differences(study) == []
    make_run(tmp_path / "c", "alibi", bits=((16, 2.0),), steps=8)
    study = read_study(tmp_path)
    assert differences(study) == ["steps: 4 (a, b); 8 (c)", "seed: [0, 1] (seqpe); [0] (alibi)"]


def test_one_run_that_has_only_begun(tmp_path):
    make_run(tmp_path / "run", "none", bits=(), metrics=False)
    assert "No run has been evaluated yet" in report.write_report(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.md", "results.csv"]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        read_study(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no run"):
        read_study(tmp_path)
    make_run(tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be made a folder"):
        report.write_report(tmp_path / "run", tmp_path / "file")
    with pytest.raises(InputError, match="no such directory"):
        read_study(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[]", "config.json has no int 'seed'"),
        ("config.json", '{"seed": 0, "data": {"length": 16}, "encoding": 3}', "no str 'encoding.kind'"),
        ("evaluation.json", "{", "evaluation.json is not JSON"),
        ("evaluation.json", "[]", "evaluation.json has no list 'results'"),
        ("evaluation.json", '{"results": [{"size": [2]}]}', "a result without a length, size or context"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', "metrics.jsonl, line 2 is no object with a step"),
        ("metrics.jsonl", "3\n", "metrics.jsonl, line 1 is no object with a step"),
        ("config.json", "[" * 100_000, "config.json is not JSON"),
        (
            "config.json",
            '{"seed": 0, "steps": "6", "data": {"length": 16}, "encoding": {"kind": "none"}}',
            "no int 'steps'",
        ),
        ("config.json", '{"seed": 0, "data": {"length": -1}, "encoding": {"kind": "none"}}', "data.length is none"),
        (
            "config.json",
            '{"seed": 0, "data": {"length": 1, "size": ["x", 1]}, "encoding": {"kind": "a"}}',
            "data.size or",
        ),
        ("evaluation.json", '{"results": [{"length": 16, "loss": "=1+1"}]}', "without numbers, result 1"),
        ("evaluation.json", '{"results": [{"length": 1e30}]}', "a result without a length"),
        (
            "evaluation.json",
            '{"results": [{"length": 8, "loss_by_position": {"position": [], "loss": []}}]}',
            "result 1",
        ),
        ("evaluation.json", '{"results": [{"length": 8, "depth": [1]}]}', "result 1"),
        ("evaluation.json", '{"results": [{"length": 8, "by_length": {"length": [8], "accuracy": []}}]}', "result 1"),
        ("evaluation.json", '{"results": [{"context": 8, "loss": 1}]}', "result 1"),
        ("evaluation.json", '{"results": [], "step": "2"}', "no int 'step'"),
        ("evaluation.json", '{"results": [], "attention": {"distance": [[1]]}}', "no distance and entropy by layer"),
        ("metrics.jsonl", '{"step": "1"}\n', "metrics.jsonl, line 1 is no object with a step"),
        ("metrics.jsonl", '{"step": 1, "time": "now"}\n', "metrics.jsonl, line 1 is no object with a step"),
        ("similarity.npz", "no archive", "similarity.npz is not an archive"),
        ("similarity.npz", "", "similarity.npz is not an archive"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    make_run(tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_study(tmp_path)


def test_a_similarity_of_other_arrays_is_refused(tmp_path):
    make_run(tmp_path / "run")
    for arrays in ({"pivots": [[1]]}, {"pivots": [[1]], "positions": [[0], [1]], "cosine": np.ones((2, 2))}):
        np.savez(tmp_path / "run" / "similarity.npz", **arrays)
        with pytest.raises(InputError, match="similarity.npz.*evaluate the run again"):
            read_study(tmp_path)


@pytest.mark.slow
def test_curves_by_distance_are_drawn_for_windows_and_grids(tmp_path):
    """With a head that sees one side of a patch, and texts shorter than the window; other arrays are refused."""
    rng, study = np.random.default_rng(0), tmp_path / "runs"
    for name, distances in (("text", np.array([0, 1, 2, 40])), ("grid", np.ones((5, 6)) * 3)):
        make_run(study / name, "alibi", metrics=False)
        terms = {term: rng.normal(size=(2, 3, *distances.shape)) for term in ("logit", "gate")}
        terms["logit"][:, 0, 1:3] = np.nan
        terms["gate"] = np.repeat(terms["gate"][:1], 2, axis=0)
        np.savez(study / name / "position_curves.npz", distances=distances, **terms)
    report.write_report(study, tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    assert "Line charts by distance from the last of 41 tokens, by layer and head: added to the logit from" in page
    assert "mean product of gates from" in page and "in 1 different layer(s) and 3 head(s)" in page
    assert "Maps around a patch of a grid of 5 x 6" in page
    for name in ("text", "grid"):
        assert (tmp_path / "out" / f"position_curves_{name}.png").stat().st_size > 5000
    np.savez(study / "text" / "position_curves.npz", distances=np.arange(3), logit=np.ones((2, 3, 4)))
    with pytest.raises(InputError, match="position_curves.npz.*evaluate the run again"):
        read_study(study)


def test_outputs_of_each_task_are_drawn_by_input_length(tmp_path):
    """In a panel for each task, with the means of a tenth of each evaluation's lengths, of several seeds their mean."""
    for task, kind, seed in (("parity_check", "seqpe", 0), ("parity_check", "seqpe", 1), ("bucket_sort", "alibi", 0)):
        folder = tmp_path / f"{task}-{kind}-{seed}"
        make_run(folder, kind, seed, bits=(), data={"name": "algorithmic", "task": task, "length": 10})
        results = []
        for first, last in ((1, 10), (11, 50)):
            lengths = list(range(first, last + 1))
            by_length = {"length": lengths, "accuracy": [100.0 - seed - length for length in lengths]}
            results.append({"length": last, "examples": 50, "loss": 1.0, "accuracy": 60.0, "by_length": by_length})
        (folder / "evaluation.json").write_text(json.dumps({"results": results}))
    plot = plots.outputs_by_length(read_study(tmp_path))
    parity, sort = plot.figure.axes
    assert [axes.get_title() for axes in (parity, sort)] == ["parity_check", "bucket_sort"]
    (line,) = (line for line in sort.lines if len(line.get_xdata()) > 2)
    np.testing.assert_allclose(line.get_xdata(), [*range(1, 11), *np.arange(12.5, 50, 4)])
    np.testing.assert_allclose(line.get_ydata(), 100 - line.get_xdata())
    mean = [line for line in parity.lines if len(line.get_xdata()) > 2][-1]
    np.testing.assert_allclose(mean.get_ydata(), 99.5 - mean.get_xdata())
    assert "bucket_sort: alibi 51.500 at 48.5." in plot.alt
    plots.close(plot)


def test_a_diverged_seed_does_not_prevent_the_report(tmp_path):
    for kind, value in (("seqpe", float("nan")), ("fox", float("-inf"))):
        make_run(tmp_path / "runs" / f"{kind}-0", kind, seed=0, bits=((16, 2.0), (64, 3.0)))
        make_run(tmp_path / "runs" / f"{kind}-1", kind, seed=1, bits=((16, value), (64, 3.0)))
    make_run(tmp_path / "runs" / "alibi", "alibi", bits=((16, 2.5), (64, 3.5)))
    arrays = {"pivots": [[1]], "positions": [[1], [2]], "cosine": [[np.nan, 1.0]]}
    np.savez(tmp_path / "runs" / "seqpe-1" / "similarity.npz", **arrays)
    table = report.write_report(tmp_path / "runs", tmp_path / "out").splitlines()
    rest = "| 1,234 | 2.75 M |"
    for kind, value in (("seqpe", "nan"), ("fox", "-inf")):
        assert f"| {kind} | {value} ± nan | **3.000** ± 0.000 {rest}" in table
    assert f"| alibi | **2.500** | 3.500 {rest}" in table


def test_runs_of_older_versions_are_repetitions(tmp_path, without_plots):
    """They have the defaults of fields that came later, and do not say which kind of random bits they drew."""
    for seed in (0, 1):
        make_run(tmp_path / "runs" / f"a-{seed}", seed=seed, bits=((16, 2.0), (64, 3.0 + seed)))
    path = tmp_path / "runs" / "a-1" / "config.json"
    values = json.loads(path.read_text())
    values["precision"] = values.get("precision", {}) | {"random_bits": "rbg"}
    values["encoding"] |= {"kerple_scale": 2.0}  # of another encoding: older configs have the fields of all
    path.write_text(json.dumps(values))
    assert "± 6.353 |" in report.write_report(tmp_path / "runs", tmp_path / "out")


def test_names_are_neither_markup_nor_formulas(tmp_path, without_plots):
    """In tables, titles and notes; a spreadsheet evaluates a cell that begins with an equals sign."""
    shown = {"a$b$x_{": "a$b$x\\_{", "c|d": "c\\|d", "e*f*": "e\\*f\\*", "<b>g": "\\<b\\>g", "two\nlines": "two lines"}
    formulas = ("=cmd()", "+1", "@sum", "-x")
    for number, name in enumerate((*shown, *formulas)):
        make_run(
            tmp_path / "the *study*" / name,
            bits=((16, 2.0 + number),),
            seed=number,
            encoding={"kind": "seqpe", "theta": number},
        )
    report.write_report(tmp_path / "the *study*", tmp_path / "out")
    page, html = ((tmp_path / "out" / name).read_text() for name in ("report.md", "report.html"))
    assert page.startswith("# the \\*study\\*\n") and all(f"| {name} |" in page for name in shown.values())
    assert "<b>g" not in html and "&lt;b&gt;g" in html and "a$b$x_{" in html
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        names = {row["run"] for row in csv.DictReader(file)}
    assert names == {*shown, *(f"'{name}" for name in formulas)}


@pytest.mark.slow
def test_the_command_prints_the_main_table(commands, tmp_path):
    make_run(tmp_path / "run")
    done = commands("report", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}")
    assert done.code == 0 and "| seqpe | 2.000 | 3.000 | 1,234 | 2.75 M |" in done.out, done.err
