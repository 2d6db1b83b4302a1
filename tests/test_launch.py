"""The launch files: the JobSet is one that Kubernetes takes, scripts start and end what they should, Slurm runs the job."""

import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import string
import subprocess
import sys
import time
import types

import jsonschema
import pytest
import yaml
from kubernetes import client

from seqpe_jax import config
from tests.commands import environment
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
BENCHMARKS = ROOT / "benchmarks"
VALUES = {
    "NAME": "first",
    "IMAGE": "registry/seqpe_jax",
    "ACCELERATOR": "tpu-v5-lite-podslice",
    "TOPOLOGY": "4x4",
    "HOSTS": "4",
    "CHIPS": "4",
    "CLAIM": "runs",
    "CONFIG": "configs/wikitext103_gpt2.py",
}


def closed(properties: dict, *required: str) -> dict:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"}
# JobSet v1alpha2 (kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go): those of its fields that a run may want.
# What is in a job's template and in metadata is Kubernetes' own, and left to its client's models.
ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
JOB_SET = closed(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object"},
        "spec": closed(
            {
                "failurePolicy": closed(
                    {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate"]},
                        "rules": {
                            "type": "array",
                            "maxItems": 20,
                            "items": closed(
                                {
                                    "name": {
                                        "type": "string",
                                        "pattern": "^[A-Za-z]([A-Za-z0-9_,:]{0,34}[A-Za-z0-9_])?$",
                                    },
                                    "action": {"enum": ACTIONS},
                                    "onJobFailureReasons": {
                                        "type": "array",
                                        "items": {
                                            "enum": [
                                                "BackoffLimitExceeded",
                                                "DeadlineExceeded",
                                                "FailedIndexes",
                                                "MaxFailedIndexesExceeded",
                                                "PodFailurePolicy",
                                            ]
                                        },
                                    },
                                    "targetReplicatedJobs": {"type": "array", "items": NAME},
                                },
                                "name",
                                "action",
                            ),
                        },
                    }
                ),
                "network": closed({"enableDNSHostnames": {"type": "boolean"}, "subdomain": NAME}),
                "successPolicy": closed({"operator": {"enum": ["All", "Any"]}}, "operator"),
                "suspend": {"type": "boolean"},
                "ttlSecondsAfterFinished": {"type": "integer", "minimum": 0},
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": closed(
                        {"name": NAME, "replicas": {"type": "integer", "minimum": 0}, "template": {"type": "object"}},
                        "name",
                        "template",
                    ),
                },
            },
            "replicatedJobs",
        ),
    },
    "apiVersion",
    "kind",
    "metadata",
    "spec",
)


def rendered() -> dict:
    return yaml.safe_load(string.Template((LAUNCH / "gke_jobset.yaml").read_text()).substitute(VALUES))


def model(kind: str, values: dict):
    """Returns values as a model of Kubernetes' client, which checks required fields and ranges; no field may get lost."""
    api = client.ApiClient()
    made = api.deserialize(types.SimpleNamespace(data=json.dumps(values)), kind)
    assert api.sanitize_for_serialization(made) == values, "a field is not one of Kubernetes', or of another type"
    return made


def test_the_job_set_is_valid_and_runs_the_training_command():
    jobs = rendered()
    jsonschema.validate(jobs, JOB_SET)
    model("V1ObjectMeta", jobs["metadata"])
    [slices] = jobs["spec"]["replicatedJobs"]
    job = model("V1JobTemplateSpec", slices["template"]).spec
    assert job.parallelism == job.completions == 4 and job.completion_mode == "Indexed" and job.backoff_limit == 0
    pod = job.template.spec
    [container] = pod.containers
    assert container.command == [
        "python",
        "-m",
        "seqpe_jax.train",
        "--config=configs/wikitext103_gpt2.py",
        "--workdir=/storage/runs/first",
    ]
    config.load(str(ROOT / VALUES["CONFIG"]))
    assert container.resources.limits == {"google.com/tpu": "4"} and pod.restart_policy == "Never"
    assert [mount.name for mount in container.volume_mounts] == [volume.name for volume in pod.volumes]
    [rule] = job.pod_failure_policy.rules
    assert rule.on_exit_codes.container_name == container.name and rule.on_exit_codes.values == [2]


def test_a_wrong_field_would_be_found():
    jobs = rendered()
    jobs["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(jobs, JOB_SET)
    template = rendered()["spec"]["replicatedJobs"][0]["template"]
    template["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(AssertionError, match="a field"):
        model("V1JobTemplateSpec", template)
    del template["spec"]["template"]["spec"]["containers"]
    with pytest.raises(ValueError):
        model("V1JobTemplateSpec", template)


WORKER = """
import signal, sys, time
number = sys.argv[-1].rpartition("=")[2]
signal.signal(signal.SIGTERM, lambda *_: (print("stopped", flush=True), sys.exit(5)))
print("options", *sys.argv[1:], flush=True)
if "fails" in sys.argv and number == "1":
    sys.exit(3)
if "waits" in sys.argv:
    time.sleep(60)
"""


@pytest.fixture
def local(tmp_path):
    """Returns a function that starts launch/local_processes.sh N with a worker."""
    (tmp_path / "worker.py").write_text(WORKER)

    def start(count, *words):
        return subprocess.Popen(
            [
                "bash",
                str(LAUNCH / "local_processes.sh"),
                str(count),
                sys.executable,
                str(tmp_path / "worker.py"),
                *words,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def test_local_processes_get_their_numbers_and_one_address(local):
    process = local(3, "a b")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err, err
    found = sorted(line for line in out.splitlines())
    assert [line[:4] for line in found] == ["[0] ", "[1] ", "[2] "]
    assert [line.split()[-1] for line in found] == [f"--process-id={number}" for number in range(3)]
    assert len({line.split()[-3] for line in found}) == 1 and "--coordinator=localhost:" in found[0]
    assert all("options a b --coordinator" in line for line in found)


def test_local_processes_fail_with_the_first_that_fails_and_pass_a_stop_on(local):
    process = local(2, "fails")
    process.communicate(timeout=60)
    assert process.returncode == 3

    process = local(2, "waits")
    for _ in range(2):
        assert "options" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 5 and sorted(out.splitlines()) == ["[0] stopped", "[1] stopped"]


def test_local_processes_say_how_to_use_them():
    for arguments in ([], ["two", "true"], ["0", "true"], ["2"]):
        found = subprocess.run(["bash", str(LAUNCH / "local_processes.sh"), *arguments], capture_output=True, text=True)
        assert found.returncode == 2 and found.stderr.startswith("usage: launch/local_processes.sh N COMMAND")


SRUN = """#!/usr/bin/env bash
# A fake Slurm: it logs what it is asked for; the tasks train until they are stopped, and then end with their exit code.
printf '%s\\n' "$(basename "$0") $*" >> "$SEEN"
case "$(basename "$0") $*" in
  srun*) trap 'exit "$CODE"' TERM; echo $$ > "$SEEN.tasks"; if [ "$CODE" -eq 2 ]; then exit 2; fi; while true; do sleep 0.05; done ;;
  scancel*) kill -TERM "$(cat "$SEEN.tasks")" ;;
esac
"""


@pytest.mark.parametrize("code, requeued", [(75, True), (0, False), (2, False)])
def test_a_job_that_is_nearly_over_saves_and_is_requeued(tmp_path, code, requeued):
    """Unless its run is done; a refused one ends at once. A real Slurm does it with -m long."""
    for name in ("srun", "scancel", "scontrol"):
        (tmp_path / name).write_text(SRUN)
        (tmp_path / name).chmod(0o755)
    seen = tmp_path / "seen"
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SEEN": str(seen), "CODE": str(code), "SLURM_JOB_ID": "7"}
    words = ["bash", str(LAUNCH / "slurm.sbatch"), "--config=a b.py", "--workdir=w"]
    job = subprocess.Popen(words, cwd=ROOT, env=os.environ | given | {"PYTHON": "python"})
    while code != 2 and not (tmp_path / "seen.tasks").exists():
        assert job.poll() is None
        time.sleep(0.01)
    if code != 2:
        job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == code
    first, *later = seen.read_text().splitlines()
    assert first == "srun --label --unbuffered --wait=60 python -m seqpe_jax.train --config=a b.py --workdir=w"
    stopped = ["scancel --signal=TERM 7"] * (code != 2)
    assert later == stopped + ["scontrol requeue 7"] * requeued


GCLOUD = """#!/usr/bin/env bash
# A fake gcloud: it logs its arguments; the slice is taken away in the middle of its first training.
printf '%s\\n' "$*" >> "$SEEN"
case "$*" in
  *tpu-vm\\ scp*) cp "$5" "$SEEN.tar.gz" ;;
  *describe*) if [ -e "$SEEN.gone" ]; then echo SUSPENDED; else echo ACTIVE; fi ;;
  *"queued-resources delete"*) rm -f "$SEEN.gone" ;;
  *seqpe_jax.train*)
    if [ ! -e "$SEEN.trained" ]; then touch "$SEEN.trained" "$SEEN.gone"; exit 255; fi
    exit "${TRAINING:-0}" ;;
esac
"""


@pytest.fixture
def tpu_pod(tmp_path):
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    given = {
        "NAME": "first",
        "ZONE": "z",
        "TYPE": "v5litepod-16",
        "VERSION": "v",
        "SHARE": "10.0.0.2:/runs",
        "POLL": "0",
    }

    def call(*arguments, launch=LAUNCH, **changed):
        seen = tmp_path / "seen"
        environment = os.environ | given | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SEEN": str(seen)} | changed
        found = subprocess.run(
            ["bash", str(launch / "tpu_pod.sh"), *arguments], env=environment, capture_output=True, text=True
        )
        return found, seen.read_text() if seen.exists() else ""

    return call


def test_tpu_pod_goes_on_when_the_slice_is_taken_away(tpu_pod):
    found, seen = tpu_pod("train", "--config=configs/stdlib_lm.py", "--workdir=/mnt/runs/a b", SPOT="1")
    assert found.returncode == 0, found.stderr
    commands = [line for line in seen.splitlines() if "seqpe_jax.train" in line]
    assert len(commands) == 2 and commands[0] == commands[1]
    assert commands[0].startswith("compute tpus tpu-vm ssh first --zone=z --worker=all --command=")
    assert commands[0].endswith(r"-m seqpe_jax.train --config=configs/stdlib_lm.py --workdir=/mnt/runs/a\ b")
    between = seen[seen.index(commands[0]) + 1 : seen.rindex(commands[0])]
    created = "queued-resources create first --node-id=first --zone=z --accelerator-type=v5litepod-16"
    assert (
        between.index("queued-resources delete first") < between.index(created) < between.index("bash launch/setup.sh")
    )
    assert "--spot" in between and "mount -t nfs 10.0.0.2:/runs /mnt/runs" in between


def test_tpu_pod_installs_the_checkout_as_it_stands(tpu_pod, tmp_path):
    """Edited and new files; a file that is gone here goes there too, and what is ignored is not touched."""
    here, host = tmp_path / "here", tmp_path / "host"
    (here / "launch").mkdir(parents=True)
    shutil.copy(LAUNCH / "tpu_pod.sh", here / "launch")
    for name in ("same.py", "edited.py", "gone.py"):
        (here / name).write_text("old")
    (here / ".gitignore").write_text("ignored\n")
    git = ["git", "-C", str(here), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    host.mkdir()

    def install():
        found, seen = tpu_pod("install", launch=here / "launch")
        assert found.returncode == 0, found.stderr
        shutil.copy(tmp_path / "seen.tar.gz", host / "seqpe_jax.new.tar.gz")
        remote = seen.rpartition("--command=")[2].partition("command -v mount.nfs")[0]
        subprocess.run(["bash", "-c", remote], cwd=host, check=True)
        return found.stdout, {path.name: path.read_text() for path in (host / "seqpe_jax").glob("*.*")}

    output, found = install()
    assert found == {"same.py": "old", "edited.py": "old", "gone.py": "old", ".gitignore": "ignored\n"}
    assert "changes" not in output
    (here / "edited.py").write_text("new")
    (here / "new file.py").write_text("new")
    (here / "ignored").write_text("new")
    (here / "gone.py").unlink()
    (host / "seqpe_jax" / "ignored").write_text("of the host")
    output, found = install()
    assert found == {"same.py": "old", "edited.py": "new", "new file.py": "new", ".gitignore": "ignored\n"}
    assert (host / "seqpe_jax" / "ignored").read_text() == "of the host"
    assert "with these changes:" in output and all(
        line in output for line in (" M edited.py", " D gone.py", '"new file.py"')
    )

    shutil.rmtree(here / ".git")
    found, _ = tpu_pod("install", launch=here / "launch")
    assert found.returncode == 2 and "is not a git checkout" in found.stderr


def test_tpu_pod_ends_when_the_run_itself_fails(tpu_pod, tmp_path):
    (tmp_path / "seen.trained").touch()
    found, seen = tpu_pod("train", "--config=configs/stdlib_lm.py", TRAINING="2")
    assert found.returncode == 1 and seen.count("seqpe_jax.train") == 1
    found, _ = tpu_pod("create", ZONE="")
    assert found.returncode == 2 and found.stderr.startswith("error: ZONE is not set")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("option, name", [("kills", "one process"), ("bucket", "in a bucket")])
def test_chaos_kills_a_run_that_then_ends_as_if_nothing_had_happened(tmp_path, option, name):
    results = tmp_path / "chaos.json"
    counts = [f"--{one}={3 if one == option else 0}" for one in ("kills", "pair", "bucket")]
    command = [
        sys.executable,
        "-m",
        "tests.kill_and_resume",
        *counts,
        f"--folder={tmp_path / 'chaos'}",
        f"--results={results}",
    ]
    found = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    result = json.loads(results.read_text())[name]
    assert result["kills"] == 3 and result["steps"] == 190 and result["lines"] == 192 and result["arrays"] > 20
    assert not any(result[name] for name in result if name.endswith(("missing", "doubled", "differ")))
    assert "| steps doubled | 0 |" in found.stdout

    # What it is for: a line lost and a byte changed are seen.
    [killed] = (tmp_path / "chaos").rglob("killed")
    lines = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(lines[:50] + lines[51:] + lines[-1:]))
    again = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True)
    result = json.loads(results.read_text())[name]
    assert again.returncode == 1 and result["lines_missing"] == result["steps_missing"] == 1, (
        again.stdout + again.stderr
    )
    assert result["lines_that_differ_or_are_doubled"] == 1


def test_stored_kills_lost_nothing():
    """The numbers in WORKSPACE.md are those of the stored results."""
    results = json.loads((ROOT / "docs" / "results" / "chaos.json").read_text())
    page = " ".join((ROOT / "WORKSPACE.md").read_text().split())
    soaked = results.pop("soak")
    assert soaked["growth_percent"] <= 2 and soaked["exit_code"] == 0 and soaked["steps"] == 20_000
    quarter, end = soaked["MiB_after_a_quarter"], soaked["MiB_at_the_end"]
    assert f"{quarter} MiB after 5,000 of 20,000" in page and f"{end} MiB at the end" in page
    one, two, bucket = (results[name] for name in ("one process", "two processes", "in a bucket"))
    assert f"{one['kills']} kills of one run, {one['kills_inside_a_save']} of them during a save" in page
    for result, target in ((two, "one process of two"), (bucket, "a run in a bucket")):
        assert f"{result['kills']} kills of {target}, {result['kills_inside_a_save']} of them during a save" in page
    assert (one["kills"], two["kills"], bucket["kills"]) == (200, 20, 20)
    for name, result in results.items():
        assert not any(count for key, count in result.items() if key.endswith(("missing", "doubled", "differ"))), name
        assert result["kills_inside_a_save"] >= result["kills"] / 3, name
        assert result["lines"] > result["steps"] and result["arrays"] > 20, name


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "part, words", [("job", "went on after the requeue and ended at step"), ("sweep", "2 of 2 runs finished")]
)
def test_a_job_under_slurm_ends_after_a_requeue(tmp_path, part, words):
    if not hasattr(os, "geteuid") or os.geteuid() or not shutil.which("apt-get"):
        pytest.skip("a Slurm of its own needs root and apt")
    given = environment(tmp_path) | {"PYTHON": sys.executable, "PARTS": part}
    found = subprocess.run(["bash", str(LAUNCH / "test_slurm.sh")], env=given, capture_output=True, text=True)
    if found.returncode == 77:
        pytest.skip("apt cannot install slurm-wlm and munge here")
    assert found.returncode == 0, found.stderr
    assert words in found.stdout


OTHER = """#!{python}
import json, sys
assert sys.argv[1].endswith("benchmarks/torch_gpt2.py") and json.loads(sys.argv[2])["width"] == 24
print("ready 9.9", flush=True)
for line in sys.stdin:
    print(1000.0, flush=True)
"""


@pytest.mark.slow
@pytest.mark.long
def test_steps_are_timed_against_an_interpreter_that_is_given(tmp_path):
    """An interpreter whose steps take 1000 s; one without PyTorch; a config that PyTorch's side does not have."""
    other, output, text = tmp_path / "other", tmp_path / "found.json", tmp_path / "text.txt"
    other.write_text(OTHER.format(python=sys.executable))
    other.chmod(0o755)
    text.write_text("To be timed. " * 400)
    tiny = ["--config=tests/tiny_text.py:rotary", f"--config.data.paths={text}", f"--output={output}", "--turns=2"]
    still = [f"--config.model.{name}=0.0" for name in ("dropout", "attention_dropout", "embedding_dropout")]

    def run(*arguments):
        line = [sys.executable, BENCHMARKS / "against_torch.py", *tiny, *arguments]
        return subprocess.run(line, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True)

    done = run(*still, f"--python={other}")
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    low, high = found["ratio"]["quarters"]
    assert 0 < low <= found["ratio"]["median"] <= high < 0.1 and found["torch"] == "9.9" and found["turns"] == 2
    bare = run(*still, "--python=" + shutil.which("false"))
    assert bare.returncode == 2 and "has no PyTorch that runs, or no transformers" in bare.stderr
    assert (gone := run(*still, "--python=gone")).returncode == 2 and "cannot be started: No such file" in gone.stderr
    wrong = run("--python=" + str(other), "--config.model.dropout=0.1")
    assert wrong.returncode == 2 and "without dropout" in wrong.stderr


@pytest.mark.parametrize("name", ["against_torch", "against_transformers_train", "against_transformers_decode"])
def test_the_page_has_the_stored_ratios(name):
    ratio = json.loads((ROOT / f"docs/results/{name}.json").read_text())["ratio"]
    low, high = ratio["quarters"]
    page = (ROOT / "docs/performance.md").read_text()
    assert f"takes {ratio['median']:.2f} (quartiles {low:.2f} to {high:.2f})" in page and f"results/{name}.json" in page


def test_growth_is_drawn_from_what_is_stored(tmp_path, monkeypatch):
    """Both encodings at every length and width, and a plot of them."""
    for name in ("benchmarks", "docs/results"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(BENCHMARKS / "growth.py", tmp_path / "benchmarks")
    stored = (ROOT / "docs/results/growth.csv").read_text()
    (tmp_path / "docs/results/growth.csv").write_text(stored)
    points = {tuple(line.split(",")[:3]) for line in stored.splitlines()[1:]}
    lengths, widths = (512, 1024, 2048, 4096, 8192), (128, 256, 512)
    axes = [("length", str(n)) for n in lengths] + [("width", str(n)) for n in widths]
    assert points == {(*point, kind) for point in axes for kind in ("seqpe", "rotary")}
    monkeypatch.setattr(sys, "argv", ["growth.py"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(tmp_path / "benchmarks/growth.py"), run_name="__main__")
    assert (tmp_path / "docs/results/growth.png").read_bytes().startswith(b"\x89PNG")


def test_the_quickstart_gives_fox_the_rotary_pairs_of_seqpe_and_open_gates():
    script = (LAUNCH / "quickstart.sh").read_text()
    [kinds], [parts] = re.findall(r"for kind in (.*); do", script), re.findall(r'== fox \]\] && parts="(.*)"', script)
    fields = dict(re.findall(r"--config\.([\w.]+)=(\d+)", parts))
    path = str(ROOT / "configs" / "stdlib_lm.py")
    seqpe, fox = config.load(path), config.load(f"{path}:fox", {name: int(value) for name, value in fields.items()})
    assert kinds.split() == ["seqpe", "fox", "rotary"] and fox.encoding.name == "fox" and len(fields) == 2
    assert fox.encoding.rotary_pairs == seqpe.encoding.rotary_pairs > 0 and fox.encoding.gate_bias_init >= 4


def test_the_quickstart_knows_which_runs_are_evaluated(tmp_path, monkeypatch):
    """Its line of Python exits with 0 for an evaluation of the last step, and else with another code."""
    [line] = re.findall(r"evaluated='([^']*)'", (LAUNCH / "quickstart.sh").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(tiny_config())))
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path)])
    for step, code in ((tiny_config().steps, False), (1, True)):
        (tmp_path / "evaluation.json").write_text(json.dumps({"step": step, "results": []}))
        with pytest.raises(SystemExit) as ended:
            exec(line, {})
        assert ended.value.code == code
