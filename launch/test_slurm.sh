#!/usr/bin/env bash
# Runs launch/slurm.sbatch under a real Slurm on this machine: Debian's slurm-wlm and munge (installed if absent; needs root and
# apt) on loopback, with a configuration of their own in a temporary folder. Two processes train a tiny model; the job is
# requeued in the middle, must resume from its checkpoint and end. Then a sweep of two runs does the same as an array of jobs.
# Whatever was started is stopped, however this script ends. PARTS="job sweep" says which of the two are done (default both).
# PYTHON=/path/to/python (default .venv/bin/python), SECONDS_LEFT=240 after installing. Exit code 77: apt cannot install them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHON="${PYTHON:-$PWD/.venv/bin/python}"
[[ "${PARTS:=job sweep}" =~ ^(job|sweep|job sweep)$ ]] || { echo "error: PARTS=$PARTS: give job, sweep or \"job sweep\"" >&2; exit 2; }
here=$(mktemp -d) policy="" pids=()

stop() {
  code=$?
  trap - EXIT
  [ ${#pids[@]} -eq 0 ] || scancel --full --signal=KILL --user="$(id -un)" 2>/dev/null || true # of this Slurm alone
  [ ${#pids[@]} -eq 0 ] || { sleep 1; kill "${pids[@]}" 2>/dev/null; wait "${pids[@]}" 2>/dev/null; } || true
  [ -z "$policy" ] || rm -f "$policy"
  if [ $code -ne 0 ]; then tail -n 25 "$here"/*.log "$here"/*.out "$here"/sweep/slurm/*.err "$here"/sweep/*/log.txt >&2 || true; fi
  rm -rf "$here"
  exit $code
}
trap stop EXIT
trap 'exit 130' INT TERM

until_true() { # what it waits for, command
  until "${@:2}" >/dev/null 2>&1; do
    kill -0 "${pids[@]}" && [ $SECONDS -lt $deadline ] || { echo "error: a daemon or the time has ended: no $1" >&2; exit 1; }
    if [ -n "${job:-}" ] && [ "$1" != "end of the job" ] && ended; then echo "error: the job has ended: no $1" >&2; exit 1; fi
    sleep 0.3
  done
}

ended() { scontrol show job "$job" | grep -qE 'JobState=(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)'; }

if ! command -v slurmctld >/dev/null || ! command -v slurmd >/dev/null || ! command -v munged >/dev/null; then
  echo "== install slurm-wlm and munge"
  if [ ! -e /usr/sbin/policy-rc.d ]; then # the packages would start services of their own
    policy=/usr/sbin/policy-rc.d
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod +x "$policy"
  fi
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -q && apt-get install -y -q --no-install-recommends slurm-wlm munge; } > "$here/apt.log" 2>&1 || exit 77
fi

deadline=$((SECONDS + ${SECONDS_LEFT:-240})) # installing has no part in it
echo "== start munged, slurmctld, slurmd"
mkdir "$here/state" "$here/spool" && (umask 077 && head -c 1024 /dev/urandom > "$here/munge.key")
port=$((20000 + RANDOM % 10000)) host=$(hostname -s)
export SLURM_CONF="$here/slurm.conf"
tr ' ' '\n' > "$SLURM_CONF" <<EOF
ClusterName=loopback SlurmctldHost=$host(127.0.0.1) SlurmctldPort=$port SlurmdPort=$((port + 1)) SlurmUser=root
AuthInfo=socket=$here/munge.socket,cred_expire=5 MpiDefault=none ProctrackType=proctrack/linuxproc TaskPlugin=task/none
StateSaveLocation=$here/state SlurmctldPidFile=$here/slurmctld.pid
SlurmdSpoolDir=$here/spool SlurmdPidFile=$here/slurmd.pid SlurmdParameters=config_overrides
KillWait=60 ReturnToService=2 SchedulerParameters=sched_interval=1,batch_sched_delay=0
EOF
echo "NodeName=localhost NodeHostname=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN" >> "$SLURM_CONF"
echo "PartitionName=all Nodes=ALL Default=YES State=UP" >> "$SLURM_CONF"
munged --foreground --force --socket="$here/munge.socket" --key-file="$here/munge.key" --pid-file="$here/munge.pid" \
  --log-file="$here/munged.log" --seed-file="$here/munge.seed" > "$here/munge.log" 2>&1 & pids+=($!)
until_true "munge" munge -n --socket="$here/munge.socket"
slurmctld -D > "$here/slurmctld.log" 2>&1 & pids+=($!)
slurmd -D > "$here/slurmd.log" 2>&1 & pids+=($!)
idle() { sinfo -h -o %T | grep -q idle; }
until_true "idle node" idle
saved() { ls "$runs/checkpoints" | grep -qx '[0-9]*'; }

export JAX_PLATFORMS=cpu SEQPE_JAX_CACHE="$here/cache" PYTHONUNBUFFERED=1
if [[ " $PARTS " == *" job "* ]]; then
  runs="$here/run" steps=120
  job=$(sbatch --parsable --ntasks=2 --time=30 --output="$here/job.out" launch/slurm.sbatch --config=tests/tiny_text.py:alibi \
    --workdir="$runs" --config.data.paths=README.md --config.steps=$steps --config.checkpoint.every=10)
  echo "== job $job: two tasks train; it is requeued after a checkpoint"
  until_true "checkpoint" saved
  scontrol requeue "$job"
  until_true "end of the job" ended
  grep -E "process\(es\)|resuming at|stopped" "$here/job.out"
  scontrol show job "$job" | grep -q "JobState=COMPLETED"
  grep -q "2 process(es)" "$here/job.out"
  grep -q "resuming at step" "$here/job.out"
  [ -d "$runs/checkpoints/$steps" ]
  echo "== went on after the requeue and ended at step $steps"
fi
if [[ " $PARTS " == *" sweep "* ]]; then
  printf '%s\n' 'CONFIG = "tests/tiny_text.py:alibi"' 'def runs():' '    for seed in (0, 1):' \
    '        yield f"seed-{seed}", {"seed": seed, "steps": 120, "checkpoint.every": 10, "data.paths": ("README.md",)}' > "$here/sweep.py"
  runs="$here/sweep/seed-0" job=""
  "$PYTHON" -m seqpe_jax.sweep --sweep="$here/sweep.py" --workdir="$here/sweep" --executor=slurm --slurm=time=10 > "$here/sweep.out" 2>&1 &
  sweep=$! && pids+=("$sweep")
  until_true "checkpoint of the sweep" saved
  job=$(sed -n 's/.*"seed-0": "\(.*\)".*/\1/p' "$here/sweep/slurm/jobs.json")
  echo "== job $job of a sweep is requeued after a checkpoint"
  scontrol requeue "$job"
  wait "$sweep" && unset 'pids[-1]'
  grep "2 of 2 runs finished" "$here/sweep.out"
  grep -q "resuming at step" "$runs/log.txt"
fi
