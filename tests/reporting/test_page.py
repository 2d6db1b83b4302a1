"""The HTML report: numbers of the files, no external file, readable without seeing it."""

import html
import html.parser
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.reporting import report
from seqpe_jax.reporting.study import read_study
from tests.reporting.test_report import make_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Reads a page: its elements (tag, attributes, text, parents), and whether every tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open[-1]['tag']}"

    def handle_starttag(self, tag, attributes, closed=False):
        one = {"tag": tag, "text": "", "parents": list(self._open), **dict(attributes)}
        self.elements.append(one)
        if tag not in VOID and not closed:
            self._open.append(one)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes, closed=True)

    def handle_endtag(self, tag):
        assert self._open and self._open[-1]["tag"] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, text):
        for one in self._open:
            one["text"] += text

    def all(self, *tags, within=None):
        return [one for one in self.elements if one["tag"] in tags and (within is None or within in one["parents"])]

    def table(self, title):
        """Column names, and row name -> cells, of the table whose caption begins so."""
        caption = next(one for one in self.all("caption") if one["text"].startswith(title))
        table = caption["parents"][-1]
        rows = [self.all("th", "td", within=row) for row in self.all("tr", within=table)]
        return [one["text"] for one in rows[0]], {row[0]["text"]: row[1:] for row in rows[1:]}

    def value(self, cell):
        return float(self.all("data", within=cell)[0]["value"])


def make_sweep(folder):
    """2 encodings x 2 seeds: finished, failed half-way, evaluated but for one length, and not started."""
    settings = {"steps": 4, "batch_size": 2, "data": {"name": "text_files", "length": 16}}
    points = {
        f"{kind}-{seed}": {"settings": settings | {"seed": seed, "encoding": {"kind": kind}}}
        for kind in ("seqpe", "rotary")
        for seed in (0, 1)
    }
    make_run(folder / "seqpe-0", bits=((16, 2.0123456789), (64, 3.25)))
    make_run(folder / "seqpe-1", seed=1, bits=((16, 2.5),))
    make_run(folder / "rotary-0", "rotary", bits=(), metrics=False)
    (folder / "rotary-0" / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "train/term/task": 2.0}\n')
    (folder / "rotary-0" / "log.txt").write_text("step 1/4\n== failed: train ended with exit code 1: the loss is nan\n")
    (folder / "seqpe-0" / "log.txt").write_text("== failed: the first try\n")
    make_run(folder / "left-from-before", "alibi")
    (folder / "sweep.json").write_text(json.dumps({"sweep": "x.py", "points": points}))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    make_sweep(folder / "sweep")
    report.write_report(folder / "sweep", folder / "out")
    return folder / "out", Page((folder / "out" / "report.html").read_text())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two grid encodings of images, one of them called what HTML must escape."""
    folder = tmp_path_factory.mktemp("images")
    data = {"name": "digit_images", "length": 512, "size": [8, 8]}
    rows, columns = np.divmod(np.arange(16), 4)
    grid = np.stack([rows, columns], 1)
    for name, kind in (("a<b>&'\"-0", "seqpe"), ("c", "learned")):
        run = folder / "runs" / name
        make_run(run, kind, bits=(), data=data)
        results = [{"size": [side, side], "examples": 9, "top1": 90.0 / side, "top5": 99.0} for side in (8, 16)]
        (run / "evaluation.json").write_text(json.dumps({"parameters": 7, "step": 4, "results": results}))
        arrays = {"pivots": grid[[5, 10]], "positions": grid, "cosine": np.random.rand(2, 16)}
        np.savez(run / "similarity.npz", **arrays)
        np.savez(run / "attention.npz", images=np.random.rand(2, 8, 8, 1), attention=np.random.rand(2, 3, 4, 4))
    report.write_report(folder / "runs", folder / "out")
    return folder / "out", Page((folder / "out" / "report.html").read_text())


def test_numbers_are_those_of_the_files_and_missing_ones_are_missing(swept):
    out, page = swept
    names, rows = page.table("Bits per byte by evaluated length")
    assert names == ["encoding", "16 (1x)", "64 (4x)", "parameters", "FLOPs per token"]
    assert list(rows) == ["seqpe", "rotary"]
    first, second, parameters, flops = rows["seqpe"]
    assert page.value(first) == (2.0123456789 + 2.5) / 2 and first["text"] == "best: 2.256 ± 3.098"
    assert page.value(second) == 3.25 and second["text"] == "best: 3.250 (1 of 2)"
    assert page.value(parameters) == 1234 and (page.value(flops), flops["text"]) == (2752764.75, "2.75 M")
    assert [cell["text"] for cell in rows["rotary"]] == ["–missing"] * 4
    assert all(cell["class"] == "missing" for cell in rows["rotary"])
    _, rows = page.table("Cost")
    assert [page.value(cell) for cell in rows["seqpe"][:5]] == [1234, 0.025, 0.005, 250, 8]
    assert all(cell["text"] == "–missing" for cell in rows["rotary"])
    _, rows = page.table("Runs")
    assert {name: cells[2]["text"] for name, cells in rows.items()} == {
        "seqpe-0": "finished",
        "seqpe-1": "finished",
        "rotary-1": "not started",
        "rotary-0": "failed at step 1 of 4: train ended with exit code 1: the loss is nan",
    }
    notes = [one["text"] for one in page.all("li")]
    assert "rotary-1 is missing: not started" in notes
    assert "| rotary | - | - |" in (out / "report.md").read_text()
    assert "rotary-1,rotary,not started,rotary,1,16,,,,,,,,\n" in (out / "results.csv").read_text()


def test_fields_are_listed_by_whether_they_differ(swept):
    _, page = swept
    _, rows = page.table("Fields that differ")
    assert list(rows) == ["seed", "1", "encoding.kind", "rotary"]  # a field's second value stands under its name
    assert [cell["text"] for cell in rows["encoding.kind"]] == ["seqpe", "seqpe"]
    assert [cell["text"] for cell in rows["seed"]] == ["0", "seqpe-0, rotary-0"]
    _, rows = page.table("Fields that all")
    assert rows["data.length"][0]["text"] == "16" and "seed" not in rows


@pytest.mark.parametrize("which", ["swept", "images"])
def test_the_page_needs_no_other_file_and_names_its_parts(which, request):
    out, page = request.getfixturevalue(which)
    text = (out / "report.html").read_text()
    assert not page.all("link", "iframe", "object") and "http:" not in text and "https:" not in text
    [script] = page.all("script")
    assert "src" not in script and "@import" not in text and not re.search(r"url\((?!#)", text)
    references = [one[name] for one in page.elements for name in ("src", "href", "xlink:href") if one.get(name)]
    assert references and all(re.match(r"#|data:image/png;base64,", where) for where in references)
    ids = [one["id"] for one in page.elements if "id" in one]
    assert len(ids) == len(set(ids)) and {where[1:] for where in references if where[0] == "#"} <= set(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    assert not list(out.glob("*.part"))
    assert page.all("html")[0]["lang"] == "en" and all(page.all(landmark) for landmark in ("header", "nav", "main"))
    for table in page.all("table"):
        assert len(page.all("caption", within=table)) == 1
        headers = page.all("th", within=table)
        assert headers and all(one["scope"] in ("col", "row", "rowgroup") for one in headers)
    for wide in page.all("table", "svg"):
        box = wide["parents"][-1]
        assert box["class"] == "scroll" and box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"]
    for figure in page.all("figure"):
        drawn = page.all("svg", within=figure)
        assert len(drawn) == 1 and drawn[0]["role"] == "img" and len(drawn[0]["aria-label"]) > 40
        assert page.all("figcaption", within=figure)[0]["text"]


def test_plots_follow_the_colours_of_the_page(images):
    out, page = images
    drawn = [svg["parents"][-1] for svg in page.all("svg")]
    assert len(drawn) == 6  # sizes, training; likeness and attention of both
    text = (out / "report.html").read_text()
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert "#333333" not in svg and "#d55e00" not in svg.lower()
        assert "<text" in svg or "class token" in svg
    assert all(f"--{name}:" in text for name in re.findall(r"var\(--([\w-]+)\)", text) if name != "width")


def test_names_are_escaped(images):
    out, page = images
    assert not page.all("b") and "a<b>&'\"-0" in page.table("Runs")[1]


def test_a_sweep_that_has_not_begun(tmp_path, without_plots):
    settings = {"steps": 4, "seed": 0, "data": {"length": 16}, "encoding": {"kind": "alibi"}}
    (tmp_path / "sweep.json").write_text(json.dumps({"points": {"alibi-0": {"settings": settings}}}))
    assert [(run.name, run.state) for run in read_study(tmp_path).runs] == [("alibi-0", "not started")]
    assert "No run has been evaluated" in report.write_report(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    "content,message",
    [
        ("[]", "sweep.json has no dict 'points'"),
        ('{"points": {"a": {}}}', "sweep.json, point 'a', has no int 'seed'"),
        ('{"points": {}}', "holds no run"),
    ],
)
def test_a_broken_sweep_is_refused(tmp_path, content, message):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_study(tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_a_browser_sorts_rows(tmp_path):
    """Missing values and NaN come last in either direction; nothing is wider than the window."""
    measured = {"seqpe": (2.0, 3.0), "alibi": (2.5,), "fox": (2.4, math.nan), "none": (2.3,), "rotary": (2.2, 1.0)}
    for kind, bits in measured.items():
        make_run(tmp_path / "runs" / kind, kind, bits=tuple(zip((16, 64), bits, strict=False)))
    report.write_report(tmp_path / "runs", tmp_path)
    measure = (
        "const t = d.querySelector('#results ~ .scroll table'), rows = () => [...t.tBodies].map("
        "b => b.rows[0].cells[0].textContent.trim()), seen = [rows()];"
        "const heads = t.tHead.rows[0].cells, press = n => heads[n].querySelector('button').click();"
        "for (const n of [2, 2, 0, 0]) { press(n); seen.push(rows()); }"
        "const sorts = [...heads].map(h => h.getAttribute('aria-sort'));"
        "document.body.dataset.found = JSON.stringify({seen, sorts, wide: d.documentElement.scrollWidth})"
    )
    (tmp_path / "frame.html").write_text(
        f'<style>*{{margin:0;border:0}}</style><body><iframe width=400 height=2000 src="{(tmp_path / "report.html").as_uri()}" '
        f'onload="const d = this.contentDocument;{measure}"></iframe>'
    )
    options = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --allow-file-access-from-files --dump-dom"
    command = [
        CHROMIUM,
        *options.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        (tmp_path / "frame.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', done.stdout)[1]))
    assert [" ".join(rows) for rows in found["seen"]] == [
        "seqpe alibi fox none rotary",
        "rotary seqpe alibi fox none",
        "seqpe rotary alibi fox none",
        "alibi fox none rotary seqpe",
        "seqpe rotary none fox alibi",
    ]
    assert [sort for sort in found["sorts"] if sort] == ["descending"] and found["wide"] == 400
