#!/usr/bin/env bash
# A run on a Cloud TPU pod slice, by gcloud: a queued resource of TPU VMs, and the same command on each of them over ssh.
#   export NAME=first ZONE=us-west4-a TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite
#   bash launch/tpu_pod.sh create
#   bash launch/tpu_pod.sh train --config=configs/wikitext103_gpt2.py --workdir=gs://BUCKET/wt103
#   bash launch/tpu_pod.sh delete
# train     starts the run on every host, detached, and shows the log of the first. If this machine or ssh ends, the run continues: the
#           same command shows it again. It ends with the run's exit code; after 75 (saved) it starts the run again, and when a
#           spot slice is taken away it asks for another one, at most RESTARTS (50) times together.
# logs      the last lines of host WORKER (0); stop: save and end; status: what gcloud says of the request.
# create    asks for the slice, waits until it is there, and installs this checkout on every host as it stands: edited and new files
#           too, ignored ones not. After more edits `install` does so again.
# delete    removes the request and the slice, which is all that was made; DELETE=1 does so at the end of `train`.
# PROJECT, NETWORK, SUBNETWORK and SERVICE_ACCOUNT are passed to gcloud. SPOT=1 asks for a spot slice, RESERVED=1 for one of a reservation.
# WAIT=SECONDS ends the wait for a slice (default: as long as the request is in the queue).
# The workdir is in a bucket, which the service account may write, or on an NFS volume: SHARE=10.0.0.2:/runs is mounted at /mnt/runs.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for name in NAME ZONE TYPE VERSION; do
  if [ -z "${!name:-}" ]; then
    echo "error: $name is not set; see the head of launch/tpu_pod.sh" >&2
    exit 2
  fi
done
if [ -n "${SPOT:-}" ] && [ -n "${RESERVED:-}" ]; then
  echo "error: SPOT and RESERVED are both set: a slice is one or the other" >&2
  exit 2
fi
where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
tpus=(gcloud compute tpus)
taken_away=99 # what `follow` returns when the slice is gone
run=seqpe_jax_run # folder of a host: pid, code, log and arguments of its run

describe() { "${tpus[@]}" queued-resources describe "$NAME" "${where[@]}" "$@"; }

state() { describe --format='value(state.state)'; }

on_worker() { "${tpus[@]}" tpu-vm ssh "$NAME" "${where[@]}" --worker="$1" --command="$2"; }

everywhere() { on_worker all "$1"; }

create() {
  local now before="" failures=0 deadline=$((SECONDS + ${WAIT:-0}))
  echo "== ask for $TYPE as $NAME"
  "${tpus[@]}" queued-resources create "$NAME" --node-id="$NAME" "${where[@]}" --accelerator-type="$TYPE" --runtime-version="$VERSION" \
    ${NETWORK:+--network="$NETWORK"} ${SUBNETWORK:+--subnetwork="$SUBNETWORK"} ${SERVICE_ACCOUNT:+--service-account="$SERVICE_ACCOUNT"} \
    ${SPOT:+--spot} ${RESERVED:+--reserved} || return
  while true; do
    if now=$(state); then
      failures=0
    elif failures=$((failures + 1)) && [ $failures -ge 5 ]; then
      echo "error: gcloud cannot describe the request for $NAME (above); it may still be in the queue" >&2
      return 1
    fi
    case "$now" in
      ACTIVE) break ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        echo "error: the request for $NAME is $now:" >&2
        describe --format='yaml(state)' >&2
        echo "after that is mended: bash launch/tpu_pod.sh delete, then create" >&2
        return 1
        ;;
    esac
    if [ -n "${WAIT:-}" ] && [ $SECONDS -ge $deadline ]; then
      echo "error: $NAME is ${now:-unknown} after $WAIT s; it stays in the queue until: bash launch/tpu_pod.sh delete" >&2
      return 1
    fi
    if [ "$now" != "$before" ]; then echo "waiting for $NAME: $now"; fi
    before=$now
    sleep "${POLL:-30}"
  done
  install
}

# The files of this checkout, each ended by a null byte: tracked and new ones that are there.
files() {
  git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    if [ -e "$file" ] || [ -L "$file" ]; then printf '%s\0' "$file"; fi
  done
}

install() {
  local folder changes mount=""
  if ! changes=$(git status --porcelain --untracked-files=all 2>/dev/null); then
    echo "error: $PWD is not a git checkout, which lists the files to install: clone the repository" >&2
    return 2
  fi
  echo "== install $(git rev-parse --short HEAD)${changes:+, with these changes:}"
  if [ -n "$changes" ]; then echo "$changes"; fi
  if [ -n "${SHARE:-}" ]; then
    mount="command -v mount.nfs >/dev/null || sudo apt-get install -y -q nfs-common
    sudo mkdir -p /mnt/runs; mountpoint -q /mnt/runs || sudo mount -t nfs $(printf '%q' "$SHARE") /mnt/runs"
  fi
  folder=$(mktemp -d)
  # What an earlier install put there and this one has not is removed; the host's environment and runs stay.
  files | tar -czf "$folder/seqpe_jax.tar.gz" --null -T - &&
    echo "== copy and install on every host" &&
    "${tpus[@]}" tpu-vm scp "$folder/seqpe_jax.tar.gz" "$NAME:seqpe_jax.new.tar.gz" "${where[@]}" --worker=all &&
    everywhere "set -e; mkdir -p seqpe_jax
    if [ -e seqpe_jax.tar.gz ]; then tar -tzf seqpe_jax.tar.gz | (cd seqpe_jax && xargs -d '\n' rm -f --); fi
    mv seqpe_jax.new.tar.gz seqpe_jax.tar.gz; tar -xzf seqpe_jax.tar.gz -C seqpe_jax; cd seqpe_jax
    $mount
    command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    ~/.local/bin/uv python install 3.12; PYTHON=\$(~/.local/bin/uv python find 3.12) bash launch/setup.sh
    .venv/bin/python -m pip install -q -r requirements.txt 'jax[tpu]' gcsfs"
  local code=$?
  rm -rf "$folder"
  return $code
}

check_workdir() {
  local argument workdir=""
  for argument in "$@"; do
    case "$argument" in --workdir=*) workdir=${argument#--workdir=} ;; esac
  done
  case "$workdir" in
    gs://* | s3://*) return 0 ;;
    /mnt/runs/*) if [ -n "${SHARE:-}" ]; then return 0; fi ;;
  esac
  echo "error: --workdir=$workdir is not where all hosts can write: give --workdir=gs://BUCKET/NAME, or set SHARE (an NFS volume) and give --workdir=/mnt/runs/NAME" >&2
  return 2
}

# Starts the run on every host, in a session of its own, which no connection can end; one that is under way continues.
start() {
  local arguments command shown
  arguments=$(printf ' %q' "$@")
  shown=$(printf '%q' "$arguments")
  command="env ${SHARE:+SEQPE_JAX_CACHE=/mnt/runs/cache} PYTHONUNBUFFERED=1 .venv/bin/python -m seqpe_jax.train$arguments & echo \$! > ../$run/pid
wait \$!; echo \$? > ../$run/code"
  everywhere "set -e; mkdir -p $run; cd $run
  if [ -s pid ] && kill -0 \$(cat pid) 2>/dev/null; then
    if [ \"\$(cat arguments)\" = $shown ]; then exit 0; fi
    echo \"error: another run is under way:\$(cat arguments); bash launch/tpu_pod.sh stop ends it\" >&2; exit 2
  fi
  rm -f pid code stopped; printf %s $shown > arguments; if [ -e log ]; then mv log log.before; fi
  cd ../seqpe_jax; setsid nohup bash -c $(printf '%q' "$command") > ../$run/log 2>&1 < /dev/null &
  until [ -s \$HOME/$run/pid ]; do sleep 0.1; done"
}

# Shows the log of the first host until its run ends, across lost connections. Returns its exit code.
follow() {
  local line seen=0 failures=0 ended="" now
  while true; do
    while IFS= read -r line; do
      failures=0
      case "$line" in
        "@ended "*) ended=${line#@ended } ;;
        *) printf '%s\n' "$line"; seen=$((seen + 1)) ;;
      esac
    done < <(on_worker 0 "cd $run; tail -n +$((seen + 1)) --pid=\$(cat pid) -s 0.5 -f log
      for _ in \$(seq 20); do if [ -s code ]; then break; fi; sleep 0.5; done
      if [ -e stopped ]; then echo '@ended stopped'; else echo \"@ended \$(cat code 2>/dev/null || echo 75)\"; fi")
    if [ "$ended" = stopped ]; then return 0; fi
    if [ -n "$ended" ]; then return "$ended"; fi
    if now=$(state) && [ "$now" != ACTIVE ]; then return $taken_away; fi
    failures=$((failures + 1))
    if [ $failures -ge 20 ]; then
      echo "error: no connection to $NAME (above). The run continues; the same command shows it again" >&2
      return 1
    fi
    echo "== the connection is lost; the run continues: connecting again" >&2
    sleep "${POLL:-30}"
  done
}

train() {
  local code left="${RESTARTS:-50}"
  check_workdir "$@" || return
  while true; do
    start "$@"
    code=$?
    if [ $code -eq 0 ]; then
      echo "== $NAME trains; it continues if this command ends"
      follow
      code=$?
    elif [ $code -ne 2 ] && [ "$(state)" != ACTIVE ]; then
      code=$taken_away
    fi
    if [ $code -ne 75 ] && [ $code -ne $taken_away ]; then break; fi
    if [ "$left" -le 0 ]; then
      echo "error: it was started again RESTARTS=${RESTARTS:-50} times" >&2
      break
    fi
    left=$((left - 1))
    if [ $code -eq 75 ]; then
      echo "== it has saved and ended (exit code 75): it is started again"
    else
      echo "== $NAME was taken away: another one"
      delete && create || return
    fi
  done
  if [ -n "${DELETE:-}" ]; then delete || return; fi
  return $code
}

logs() { on_worker "${WORKER:-0}" "tail -n 200 $run/log"; }

stop() { everywhere "cd $run && touch stopped && kill -TERM \$(cat pid)"; }

status() { describe; }

delete() { "${tpus[@]}" queued-resources delete "$NAME" "${where[@]}" --force --quiet; }

case "${1:-}" in
  create | install | train | logs | stop | status | delete) "$@" ;;
  *) echo "usage: launch/tpu_pod.sh create | train ARGUMENTS... | logs | stop | status | install | delete" >&2; exit 2 ;;
esac
