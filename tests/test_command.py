"""Flags of the commands: fields of the config, refusals in one line, help, and the settings of each process."""

import os
import shlex
import subprocess
import sys
import types

import pytest
from absl import flags

from seqpe_jax import config
from seqpe_jax.__main__ import COMMANDS
from seqpe_jax.cli import common, config_flags
from seqpe_jax.distributed import processes
from seqpe_jax.errors import InputError
from tests.tiny import ROOT


def read(*arguments):
    """Returns the config that the arguments of a command give."""
    argv, values = ["command", *arguments], flags.FlagValues()
    config_flags.define_config(values)
    assert values(argv) == ["command"]
    return config_flags.read_config(values)


def parsed(*arguments):
    """The same, of a config file whose data have no paths of their own."""
    return read(f"--config={ROOT}/configs/stdlib_lm.py", "--config.data.name=text_files", *arguments)


@pytest.mark.parametrize(
    "written,paths",
    [
        ("2024", ("2024",)),
        ("1e5", ("1e5",)),
        ("1_000", ("1_000",)),
        ("None", ("None",)),
        ("True", ("True",)),
        ("2024,2025", ("2024", "2025")),
        ("(2024, 'b')", ("2024", "b")),
        ("[0x10]", ("0x10",)),
        ("{1: 2}", ("{1: 2}",)),
        ("{[]: 2}", ("{[]: 2}",)),
        ("'2024'", ("2024",)),
        ("('a', 'b')", ("a", "b")),
        ("path/to/2024", ("path/to/2024",)),
        ("a/**/*.txt", ("a/**/*.txt",)),
        ("My Texts/one, two", ("My Texts/one, two",)),
        ("it's", ("it's",)),
        ("caf\udce9", ("caf\udce9",)),
    ],
)
def test_paths_are_texts(written, paths):
    assert parsed(f"--config.data.paths={written}").data.paths == paths
    assert parsed("--config.data.paths", written).data.paths == paths


def test_other_fields_are_read_as_before():
    found = parsed(
        "--config.data.paths=1", "--config.data.paths=2", "--config.eval.lengths=16,32", "--config.seed", "7"
    )
    assert (found.data.paths, found.eval.lengths, found.seed) == (("1", "2"), (16, 32), 7)


GIVEN_AGAIN = [
    ("evaluate", "lengths", ["--checkpoint=a", "--lengths=16", "--lengths", "32"]),
    ("evaluate", "checkpoint", ["--checkpoint", "a", "--checkpoint=a"]),
    ("evaluate", "lossy-tokenizer", ["--checkpoint=a", "--lossy-tokenizer", "--nolossy-tokenizer"]),
    ("train", "config", ["--config=configs/stdlib_lm.py", "--config", "configs/stdlib_lm.py", "--config.steps=3"]),
    ("train", "config.steps", ["--config=configs/stdlib_lm.py", "--config.steps=3", "--config.steps", "4"]),
    ("train", "config.model.tied", ["--config=configs/stdlib_lm.py", "--config.model.tied", "--noconfig.model.tied"]),
]


def test_an_option_that_is_given_again_is_named(commands, tmp_path):
    """absl would take the last; fields that hold several values collect those of each time (above)."""
    folder = tmp_path / "run"
    for name, option, arguments in GIVEN_AGAIN:
        result = commands(name, *arguments, *([f"--workdir={folder}"] if name == "train" else []))
        assert (result.code, result.err.count("\n")) == (2, 1) and not folder.exists(), result.err
        expected = f"error: --{option} is given more than once, and only the last would count"
        assert result.err.startswith(expected), result.err


SCRIPT = """
import sys
from seqpe_jax.cli import common
from seqpe_jax.errors import InputError
sys.argv = ["command"]
def main():
    print("\\xe9 \\ufffd", flush=True)
    raise InputError("refused")
common.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "line, output",
    [
        ("{} >&- 2>&-", (2, "", "")),
        ("{}", (2, "\\xe9 \\ufffd\n", "error: refused\n")),
        ("{} > /dev/full", (1, "", "failed: No space left on device\n")),
        ("({}; echo $? >&2) | true", (0, "", "1\n")),
    ],
)
def test_a_command_ends_in_one_line_with_closed_full_and_ascii_streams(line, output):
    """In a process of its own, whose standard streams are so before Python starts."""
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    words = line.format(shlex.join([sys.executable, "-c", SCRIPT]))
    result = subprocess.run(words, shell=True, cwd=ROOT, env=os.environ | ascii_only, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == output


IMPORT_AND_SIGNAL = """
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "seqpe_jax.cli.train":
            os.kill(os.getpid(), signal.{name})
sys.meta_path.insert(0, Finder())
runpy.run_module("seqpe_jax.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "name, code, words",
    [("SIGTERM", 75, "SIGTERM: there is"), ("SIGHUP", 75, "SIGHUP: there is"), ("SIGINT", 130, "int")],
)
def test_a_signal_during_imports_ends_training_in_one_line(name, code, words):
    """Schedulers restart on 75."""
    script = IMPORT_AND_SIGNAL.replace("{name}", name)
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr.count("\n")) == (code, 1) and result.stderr.startswith(words)


def test_an_interrupt_that_became_another_error_is_one():
    """As of a C extension that is being imported; other errors are not."""
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None
    except ImportError as error:
        assert common._is_interrupted(error) and not common._is_interrupted(ImportError("other"))


@pytest.mark.slow
def test_what_is_missing_is_named_and_long_messages_are_cut():
    for words, said in (
        (["evaluate"], "error: --checkpoint is missing: workdir of a run"),
        (["predict", "--checkpoint=run"], "error: --images is missing: image files"),
    ):
        command = [sys.executable, "-m", f"seqpe_jax.{words[0]}", *words[1:]]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert result.stderr.startswith(said)
    short, long = common._one_line("a\nb \udcff"), common._one_line("no such file: " + "long/" * 2000 + " and so on")
    assert short == "a b \\udcff" and len(long) < 2100 and long.startswith("no such") and long.endswith("and so on")


FAULTY = {
    "def get_config(:\n": "line 1 cannot be read: SyntaxError",
    "import json\n1 / 0\n": "line 2 cannot be read: ZeroDivisionError: division by zero",
    "import no_such_package\n": "line 1 cannot be read: ModuleNotFoundError",
    "x = 1\n": "lacks get_config: a config file defines",
    "def get_config():\n    raise ValueError('no')\n": "line 2 cannot be read: ValueError: no",
    "def get_config():\n    return {}\n": "get_config returned dict: a config file defines",
    "\x00": "cannot be read",
}


@pytest.mark.parametrize("content", FAULTY, ids=lambda content: repr(content)[:30])
def test_a_faulty_config_file_is_refused_by_name_and_line(tmp_path, content):
    path = tmp_path / "page.py"
    path.write_text(content)
    for arguments in ([f"--config={path}"], ["--config", str(path)], [f"-config={path}"]):
        with pytest.raises(InputError, match=f"{path}.*({FAULTY[content]})") as caught:
            read(*arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path, words", [("gone.py", "no config file at gone.py"), (".", "is no checkpoint that can be read")]
)
def test_a_config_that_is_no_file_is_refused(path, words):
    with pytest.raises(InputError, match=words):
        read("--config", path)


def test_a_home_folder_is_meant_in_both_spellings(monkeypatch):
    monkeypatch.setenv("HOME", "/home-of-somebody")
    for arguments in (["--config=~/a.py"], ["--config", "~/a.py"]):
        with pytest.raises(InputError, match="no config file at /home-of-somebody/a.py"):
            read(*arguments)


OWN_TEXT = """
import pathlib

from seqpe_jax.config import defaults

pathlib.Path(__file__).with_suffix(".log").open("a").write("executed\\n")


def get_config():
    config = defaults()
    config.data.name = "text_files"
    return config
"""


def test_a_config_is_read_once_and_validated_with_the_fields_of_the_command_line(commands, tmp_path):
    """The file alone has no data: it is valid with the paths that the command line or a sweep gives."""
    page, run = tmp_path / "page.py", ("--config.data.paths=a.txt", "--config.steps=20")
    page.write_text(OWN_TEXT)
    found = read(f"--config={page}", *run)
    assert (
        (found.data.paths, found.steps)
        == (("a.txt",), 20)
        == (("a.txt",), config.load(str(page), {"data.paths": ("a.txt",), "steps": 20}).steps)
    )
    page.with_suffix(".log").unlink()
    refused = commands("train", f"--config={page}", *run, "--config.batch_size=0", f"--workdir={tmp_path / 'run'}")
    assert refused.code == 2 and "config field 'batch_size' must be" in refused.err
    assert page.with_suffix(".log").read_text() == "executed\n"
    with pytest.raises(InputError, match="data.name='text_files' needs data.paths"):
        read(f"--config={page}")


def test_fields_that_follow_from_others_follow_those_of_the_command_line(tmp_path):
    page = tmp_path / "page.py"
    page.write_text(
        "from seqpe_jax.config import defaults\n\n\ndef get_config():\n    c = defaults()\n"
        "    c.optimizer.end_learning_rate = c.optimizer.get_oneway_ref('learning_rate') / 10\n"
        "    c.steps = c.get_oneway_ref('batch_size') * 10\n    return c\n"
    )
    found = read(f"--config={page}", "--config.optimizer.learning_rate=0.5", "--config.batch_size=8")
    assert (found.optimizer.end_learning_rate, found.steps) == (0.05, 80)


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--config.model.hight=3", "unknown config field 'model.hight'"),
        (
            "--config.encoding=alibi",
            "'encoding' is a section of the config: set one of its fields, such as encoding.kind",
        ),
        ("--noconfig.model.tide", "unknown config field 'model.tide'. Did you mean 'model.tied'"),
        ("--config.encoding.place=global", "'encoding.place': it is called 'encoding.digit_index' now"),
        ("--config.steps=many", "--config.steps=many"),
        ("--config.steps=1.5", "--config.steps=1.5"),
        ("--config.eval.lengths=16,x", "config field 'eval.lengths' must be int, got '16,x'"),
        ("--confik=a.py", "Unknown command line flag 'confik'"),
    ],
)
def test_a_wrong_option_gets_one_line(commands, tmp_path, argument, words):
    result = commands("train", "--config=configs/stdlib_lm.py", argument, f"--workdir={tmp_path / 'run'}")
    assert (result.code, result.err.count("\n")) == (2, 1) and words in result.err, result.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "option, some, others",
    [
        ("--help=encoding", ["--config.encoding.theta=10000.0", "[t5]"], ["--config.model.layers", "--config.seed"]),
        (
            "--helpfull",
            ["--config.seed=0", "--config.model.tied=True", "--config.objective.contrastive.space=vectors"],
            [],
        ),
    ],
)
def test_help_lists_the_fields_of_a_config(commands, option, some, others):
    result = commands("train", option)
    assert result.code == 0 and all(line in result.out for line in some)
    assert not any(line in result.out for line in others)
    assert all(
        line in commands("train", "--help").out for line in ("--config: config file", "encoding: kind, ", "--workdir")
    )
    refused = commands("train", "--help=encodings")
    assert refused.code == 2 and "no section 'encodings'. Did you mean 'encoding'" in refused.err


@pytest.fixture
def compile_settings(monkeypatch):
    """Values that the command gives to JAX, by name."""
    found = {}
    monkeypatch.setattr(processes.jax.config, "update", lambda name, value: found.setdefault(name, value))
    return found


def test_the_compile_cache_is_in_the_home_folder(monkeypatch, tmp_path, compile_settings):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SEQPE_JAX_CACHE", "~/c")
    processes.enable_compilation_cache()
    assert compile_settings["jax_compilation_cache_dir"] == str(tmp_path / "c" / "compiled")


def test_variables_of_the_compile_cache_are_respected(monkeypatch, compile_settings):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/other")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3")
    processes.enable_compilation_cache()
    assert not compile_settings
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    processes.enable_compilation_cache()
    assert compile_settings == {"jax_persistent_cache_min_compile_time_secs": 0.5}


@pytest.mark.parametrize(
    "workdir, own, expected",
    [
        ("gs://runs/first", "", "gs://runs/first/compiled"),
        ("gs://runs/first", "/disk", "/disk/compiled"),
        ("runs/first", "", "/home/me/.cache/seqpe_jax/compiled"),
    ],
)
def test_a_run_in_a_bucket_keeps_its_programs_there(monkeypatch, compile_settings, workdir, own, expected):
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("JAX_COMPILATION_CACHE_DIR", "SEQPE_JAX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv("SEQPE_JAX_CACHE", own)
    processes.enable_compilation_cache(workdir)
    assert compile_settings["jax_compilation_cache_dir"] == expected


@pytest.mark.parametrize("name", [None, *processes.GPU_MEMORY_VARIABLES])
def test_a_gpu_gives_a_run_nine_tenths_of_its_memory(monkeypatch, name):
    for other in processes.GPU_MEMORY_VARIABLES:
        monkeypatch.delenv(other, raising=False)
    processes.configure_gpu_memory()
    assert "XLA_CLIENT_MEM_FRACTION" not in os.environ, "these tests run on a CPU"
    monkeypatch.setattr(processes, "expected_platform", lambda: "gpu")
    if name:
        monkeypatch.setenv(name, "0.5")
    processes.configure_gpu_memory()
    assert os.environ.get("XLA_CLIENT_MEM_FRACTION") == {None: "0.9", "XLA_CLIENT_MEM_FRACTION": "0.5"}.get(name)
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)


def test_freed_memory_is_reused_on_a_cpu(monkeypatch):
    """One arena, no mappings, nothing returned to the system (malloc.h), unless variables configure the allocator."""
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    options = []
    library = types.SimpleNamespace(mallopt=lambda *option: options.append(option))
    monkeypatch.setattr(processes, "ctypes", types.SimpleNamespace(CDLL=lambda name: library))
    processes.configure_malloc()
    assert options == [(-8, 1), (-4, 0), (-1, -1)]
    for name, value in (("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            processes.configure_malloc()
    for platform in ("gpu", "tpu"):
        monkeypatch.setattr(processes, "expected_platform", lambda platform=platform: platform)
        processes.configure_malloc()
    assert len(options) == 3


HEAVY = {
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax",
    "tensorstore",
    "grain",
    "tensorflow_datasets",
    "tensorboardX",
    "sklearn",
    "matplotlib",
    "PIL",
    "tokenizers",
    "safetensors",
    "optuna",
    "submitit",
    "numpy",
}
LOADED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    print("ended", end.code, *{name.partition(".")[0] for name in sys.modules})
"""


def loaded(*arguments):
    """Returns (exit code, output, loaded packages) of a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    output, _, rest = done.stdout.rpartition("ended ")
    code, *packages = rest.split()
    return code, output, set(packages)


@pytest.mark.slow
def test_help_loads_no_large_package():
    for name in COMMANDS:
        code, output, packages = loaded(f"seqpe_jax.{name}", "--help")
        assert code == "0" and f"python -m seqpe_jax.{name}" in output and len(output.splitlines()) > 8, name
        assert not packages & HEAVY, name


def test_a_config_file_that_ends_python_is_refused(tmp_path):
    (tmp_path / "page.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(InputError, match="page.py, line 2 cannot be read: SystemExit: 3"):
        read(f"--config={tmp_path / 'page.py'}")


def test_no_bytecode_of_a_config_file_is_written(tmp_path, monkeypatch):
    """Python knows it by size and second alone, so that it would take it for that of a file written anew at once."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    page = tmp_path / "page.py"
    page.write_text("from seqpe_jax.config import defaults as get_config\n")
    assert read(f"--config={page}").seed == 0
    assert list(tmp_path.iterdir()) == [page]
