"""Commands, files, links and numbers on the pages exist: scripts, modules, options, configs, variants and fields."""

import ast
import dataclasses
import importlib
import json
import pathlib
import re
import shlex
import subprocess
import tempfile

import pytest
from absl import flags

import seqpe_jax
from seqpe_jax import config
from seqpe_jax.cli import config_flags
from seqpe_jax.cli.common import PROCESS_FLAGS
from seqpe_jax.errors import InputError
from seqpe_jax.run_dir import RunDir

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ("README.md", "WORKSPACE.md", "CONTRIBUTING.md", *DOCS)


def commands(page: str) -> list[list[str]]:
    """Returns the words of every command line in a page's fenced blocks (bash blocks, and lines that start so)."""
    found = []
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if kind in ("bash", "sh") or line.startswith(("bash ", "python ")):
                words = shlex.split(line, comments=True)
                if words:
                    found.append(words)
    return found


ALL = [(page, words) for page in PAGES for words in commands(page)]


def options(module: pathlib.Path) -> set[str]:
    """Returns the names of the flags that a command defines, itself or by `cli.common` and `cli.config_flags`."""
    calls = [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Call)]
    names = {getattr(node.func, "attr", "") for node in calls}
    own = {
        node.args[0].value
        for node in calls
        if getattr(node.func, "attr", "").startswith(("DEFINE_", "define_path")) and node.args
    }
    if "define_process_flags" in names:
        own |= set(PROCESS_FLAGS)
    if "define_weights_choice" in names:
        own.add("weights")
    if "define_checkpoint_choice" in names:
        own.add("which")
    return own | ({"config"} if names & {"define_config", "define_mesh_flags"} else set())


def check_config(arguments: list[str]) -> None:
    """Reads the config of a command line; a folder has that of the command that makes it. Raises: InputError: it is refused."""
    values = flags.FlagValues()
    with tempfile.TemporaryDirectory() as root:
        arguments = [_with_folder(word, pathlib.Path(root)) for word in arguments]
        _read_config(values, arguments)


def _with_folder(word: str, root: pathlib.Path) -> str:
    option, _, value = word.partition("=")
    folder, colon, variant = value.partition(":")
    if option != "--config" or folder.endswith(".py"):
        return word
    makers = (words for page in ("README.md", *DOCS) for words in commands(page) if f"--workdir={folder}" in words)
    source = next(one.partition("=")[2] for words in makers for one in words if one.startswith("--config="))
    RunDir(root / folder).write_config(config.to_dict(config.load(source)))
    return f"--config={root / folder}{colon}{variant}"


def _read_config(values: flags.FlagValues, arguments: list[str]) -> None:
    config_flags.define_config(values)
    values(["command", *(word for word in arguments if re.match("--(no)?config", word))])
    config_flags.read_config(values)


def check_command(page: str, words: list[str]) -> None:
    """Checks a command line: its file or module exists, so do its options, and its config is valid."""
    if words[0] in ("bash", "sbatch", "pip", "source", "tensorboard") or "=" in words[0]:
        words = words if words[0] == "bash" else words[words.index("bash") :] if "bash" in words else []
        if words:
            assert (ROOT / words[1]).is_file(), words
            subprocess.run(["bash", "-n", words[1]], cwd=ROOT, check=True)
        return
    assert words[:2] == ["python", "-m"], f"{page}: this test does not know the command {' '.join(words)}"
    package, _, name = words[2].partition(".")
    module = ROOT / package / "cli" / f"{name}.py"
    assert package == "seqpe_jax" and module.is_file(), f"{page}: no module {words[2]}"
    known = options(module)
    arguments = {}
    for word in words[3:]:
        assert word.startswith("--") and "=" in word, f"{page}: write {word} as --name=value"
        option, _, value = word.removeprefix("--").partition("=")
        assert option.split(".")[0] in known, f"{page}: {words[2]} has no option --{option}; it has {sorted(known)}"
        arguments[option] = value
    for option in arguments.keys() - {
        "config"
    }:  # of a command that opens a trained model, the fields of its mesh alone
        name = option.removeprefix("config.")
        assert not option.startswith("config.") or "config" in arguments or name.startswith("mesh."), f"{page}: {words}"
    if "config" in arguments:
        check_config(words[3:])
    if "sweep" in arguments:
        assert (ROOT / arguments["sweep"]).is_file(), (
            f"{page}: no sweep file {arguments['sweep']}"
        )  # tests/sweeps reads them all


def test_commands_of_the_pages_are_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    faults = []
    for page, words in ALL:
        try:
            check_command(page, words)
        except (AssertionError, InputError, flags.Error) as error:
            faults.append(f"{page}: {' '.join(words)}: {error}")
    assert not faults, "\n".join(faults)


def test_the_pages_hold_commands():
    kinds = {words[2] if words[0] == "python" else words[1] for _, words in ALL}
    assert {"launch/quickstart.sh", "launch/test.sh", "seqpe_jax.train", "seqpe_jax.evaluate"} <= kinds


def test_files_that_the_pages_name_are_there():
    for page in PAGES:
        for name in re.findall(r"`((?:configs|launch|benchmarks|tests|seqpe_jax)/[\w/.]*)", (ROOT / page).read_text()):
            assert (ROOT / name).exists(), f"{page} names {name}"
    paths = re.findall(r"`((?:\w+/)+\w+\.py)`", (ROOT / "WORKSPACE.md").read_text())
    for name in paths:
        assert (ROOT / name).exists() or (ROOT / "seqpe_jax" / name).exists(), f"WORKSPACE.md names {name}"


@pytest.mark.slow
def test_results_of_the_pages_are_those_of_the_stored_studies(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    assert importlib.import_module("results").main(check=True) == 0, capsys.readouterr().err
    assert "<!-- headline: study_text_fair+study_seqpe_recipe bits_per_byte" in (ROOT / "README.md").read_text()


def test_the_headline_says_how_far_a_study_has_come_and_what_it_shows(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    stored, script = (importlib.import_module(name) for name in ("stored_studies", "results_tables"))
    shared = {"steps": 5, "seed": 1, "data.name": "stdlib", "data.length": 64}
    plan = {"runs": [], "fields": ["steps"], "minimise": "eval/loss@64"}
    rows = {
        row: plan | {"runs": [f"{row}-{seed}" for seed in (1, 2)], "trials": [f"{row}-t"]} for row in ("seqpe", "fox")
    }

    def final(kind, seed, bits):
        found = {"results": [{"length": 64, "tokens": 9, "bits_per_byte": bits}]}
        return {"settings": {"encoding.kind": kind, "seed": seed}, "metrics": [{"step": 5}], "evaluation": found}

    def headline(*finals, recipe=()):
        trial = {"metrics": [{"step": 5, "eval/loss@64": 1.5}], "evaluation": {}}
        runs = {f"{row}-t": trial | {"settings": {"encoding.kind": row}} for row in rows}
        runs |= {name: final(name[:-2], int(name[-1]), bits) for name, bits in finals}
        (tmp_path / "study_text_fair.json").write_text(json.dumps({"shared": shared, "runs": runs, "plan": rows}))
        if recipe:
            runs = {f"seqpe_recipe-{seed}": final("seqpe", seed, bits) for seed, bits in enumerate(recipe, 1)}
            planned = {"seqpe_recipe": {"runs": [*runs], "fields": [], "trials": []}}
            content = {"shared": shared, "runs": runs, "plan": planned}
            (tmp_path / "study_seqpe_recipe.json").write_text(json.dumps(content))
        stored.study_of.cache_clear()
        stored.planned_studies.cache_clear()
        names = "study_text_fair+study_seqpe_recipe"
        return script.headline(ROOT / "README.md", names, "bits_per_byte", "seqpe,seqpe_recipe")

    with monkeypatch.context() as patch:
        patch.setattr(stored, "STORED", tmp_path)
        with pytest.raises(ValueError, match="does not compare seqpe,seqpe_recipe"):
            headline(("seqpe-1", 2.0))
        part = headline(("seqpe-1", 2.0), ("seqpe-2", 2.1), ("fox-1", 1.5))
        assert "3 runs and 2 trials so far. Rows with missing runs: fox. Best trials of these" in part
        assert part.endswith("seed 0: fox-t 1.500 (of 1 trials).\n")
        after = headline(("seqpe-1", 2.0), ("seqpe-2", 2.1), ("fox-1", 1.5), ("fox-2", 1.61))
        assert "(docs/results/study_text_fair.png)" in after and "not finished" not in after
        assert "**Text: seqpe against the strongest other encoding: behind fox at 64, by 0.495 (p 0.0064).**" in after
        joined = headline(("seqpe-1", 2.0), ("seqpe-2", 2.1), ("fox-1", 1.5), ("fox-2", 1.61), recipe=(1.0, 1.12))
        assert (
            "by 0.495 (p 0.0064). seqpe_recipe against the strongest other encoding: ahead of fox at 64, by 0.495"
            in joined
        )
    stored.study_of.cache_clear()
    stored.planned_studies.cache_clear()


def test_tables_of_standard_tests_say_what_is_stored(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    stored, script = (importlib.import_module(name) for name in ("stored_studies", "results_tables"))

    def run(kind, positions, task, *accuracies, all_right=1.0):
        settings = {"encoding.kind": kind, "eval.positions": positions, "data.task": task}
        results = [
            {"length": 40 * 5**n, "examples": 9, "accuracy": found, "exact_match": all_right * found}
            for n, found in enumerate(accuracies)
        ]
        return {"settings": settings, "metrics": [{"step": 5}], "evaluation": {"results": results}}

    runs = {
        "a": run("seqpe", "random", "parity_check", 99.0, 60.0, 50.0),
        "b": run("rotary", "default", "parity_check", 99.0, 55.0, 45.0),
        "c": run("rotary", "default", "bucket_sort", 99.0, 80.0, 70.0, all_right=0.5),
    }
    shared = {"steps": 5, "seed": 1, "data.name": "algorithmic", "data.length": 40}
    plan = {name: {"runs": [name], "fields": [], "trials": []} for name in (*runs, "d")}
    (tmp_path / "study_algorithmic.json").write_text(json.dumps({"shared": shared, "runs": runs, "plan": plan}))
    probes = {
        "passkey": [{"length": 256, "score": 100.0}, {"length": 512, "score": 40.0}],
        "vt": [{"length": 512, "score": 2.0}],
    }
    suites = {"passkey": {"effective_length": 256}, "ruler": {"effective_length": None}}
    content = {"probes": probes, "suites": suites, "effective_score": 85.6}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/config.json").write_text("{}")
    (tmp_path / "runs/evaluation.json").write_text(json.dumps({"step": 5, "suites": content}))
    with monkeypatch.context() as patch:
        patch.setattr(stored, "STORED", tmp_path)
        patch.setattr(script, "STORED", tmp_path)
        for cached in (stored.study_of, stored.planned_studies):
            cached.cache_clear()
        tasks = script.tasks_table("study_algorithmic", "41-1000")
        with pytest.raises(ValueError, match="lengths 41 to 500"):
            script.tasks_table("study_algorithmic", "41-500")
        assert script.suites_table("asked") == "No model has been asked yet.\n"
        assert script.store_suites(str(tmp_path / "runs"), "asked") == 0
        asked = script.suites_table("asked")
    for cached in (stored.study_of, stored.planned_studies):
        cached.cache_clear()
    assert tasks.startswith("| encoding | positions | parity_check | bucket_sort | bucket_sort, all |\n")
    assert "| seqpe | random | **51.7** | - | - |" in tasks
    assert "| rotary | counted | 46.7 | **71.7** | **35.8** |" in tasks
    assert tasks.endswith("3 of 4 runs.\n")
    assert "| passkey | 100 | 40 |\n| vt | - | 2 |" in asked
    assert "at 85.6%: passkey 256, ruler below 256." in asked
    trials = script.trials_table("study_seqpe_recipe", "seqpe_recipe", "loss@64", "loss@256")
    assert len(trials.splitlines()) == 2 + 12 and trials.splitlines()[2].startswith("| the first | 1.")
    assert trials.count("**") == 4 and "| rotary_pairs=6 | 1." in trials
    by_seed = script.seeds_table("line_coordinates", "test").splitlines()
    assert by_seed[2:4] == ["| 1 | index | 1.765 | 1.745 | 1.740 |", "| 1 | lines | 1.733 | 1.711 | 1.706 |"]
    published = script.published_table("ruler", "retrieval_ruler")
    assert (
        "| Llama 3.1 8B | 128K | 32K | 95.5 |" in published
        and "| seqpe, 3 layers of width 96 (this page) | 256 |" in published
    )


def test_the_table_of_training_steps_has_a_line_for_each_encoding_and_length(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    stored, script = (importlib.import_module(name) for name in ("stored_studies", "results_tables"))

    def run(row, steps, bits):
        found = [{"length": 64, "extent": 64, "label": "64", "bits_per_byte": bits}]
        settings = {"steps": steps, "seed": 1, "data": {"length": 64}, "encoding": {"kind": "alibi"}}
        return stored.Run(f"{row}-1", settings, [], {"results": found}, None, None, row=row)

    runs = [run("alibi_5", 5, 2.0), run("alibi_pairs_5", 5, 1.9), run("alibi_20", 20, 1.7)]
    monkeypatch.setattr(script, "study_of", lambda name: stored.Study(name, runs, not_begun=["alibi_pairs_20"]))
    monkeypatch.setattr(script, "is_stored", lambda name: True)
    assert script.steps_table("study_longer_training", "bits_per_byte").splitlines()[2:] == [
        "| alibi | 64 (1x) | 2.000 | **1.700** |",
        "| alibi_pairs | 64 (1x) | **1.900** | - |",
        "",
        "3 of 4 runs.",
    ]


def test_rows_of_the_pods_table_are_those_that_were_compiled(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("pods_table")
    stored, page = json.loads(script.STORED.read_text()), script.PAGE.read_text()
    assert stored and not script.faults(stored, page)
    first = next(iter(stored))
    changed = stored | {first: stored[first] | {"arguments": ["--config=configs/another.py"]}}
    assert [line.startswith(first) for line in script.faults(changed, page)] == [True]
    changed = stored | {first: stored[first] | {"mesh": {"data": 3}}}
    assert ["differs" in line for line in script.faults(changed, page)] == [True]


@pytest.mark.slow
def test_parameters_and_flops_of_the_pages_are_those_of_the_studies_configs(monkeypatch):
    """For two encodings of the study on text, whose evaluations stored theirs."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("results_tables")
    configs = script.configs_of("study_text_fair")
    evaluated = json.loads((script.STORED / "study_text_fair.json").read_text())["runs"]
    for name in ("seqpe-1", "rotary-1"):
        own = evaluated[name]["evaluation"]
        assert script.work_of(configs[name]) == pytest.approx(
            {key: own[key] for key in ("parameters", "training_flops")}
        )
    assert "| 442,140 | 2.77 M |" in (ROOT / "docs" / "results.md").read_text()


def test_python_of_the_pages_names_attributes_that_exist():
    """The calls themselves are held by tests/test_public.py and tests/test_model.py."""
    fields = {field.name for field in dataclasses.fields(seqpe_jax.Model)}
    for page in ("README.md", *DOCS):
        for block in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    owner = {"seqpe_jax": seqpe_jax, "model": seqpe_jax.Model}.get(node.value.id)
                    known = (
                        owner is None or hasattr(owner, node.attr) or owner is seqpe_jax.Model and node.attr in fields
                    )
                    assert known, f"{page}: {ast.unparse(node)}"


def test_links_of_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
