#!/usr/bin/env bash
# A run on a Cloud TPU pod slice, by gcloud: a queued resource of TPU VMs, and the same command on each of them over ssh.
#   export NAME=first ZONE=us-west4-a TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite SHARE=10.0.0.2:/runs
#   bash launch/tpu_pod.sh create
#   bash launch/tpu_pod.sh train --config=configs/wikitext103_gpt2.py --workdir=/mnt/runs/wt103
#   bash launch/tpu_pod.sh delete
# SHARE: an NFS volume (Filestore) that every host mounts at /mnt/runs; workdirs lie there. SPOT=1 asks for a spot slice:
# when that is taken away, `train` asks for another one and resumes from the last checkpoint.
# `create` installs this checkout on every host as it stands: edited and new files too, ignored ones not. After more edits
# `install` does so again.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for name in NAME ZONE TYPE VERSION SHARE; do
  if [ -z "${!name:-}" ]; then
    echo "error: $name is not set; see the head of launch/tpu_pod.sh" >&2
    exit 2
  fi
done
tpus=(gcloud compute tpus)
share() { printf '%q' "$SHARE"; }

state() { "${tpus[@]}" queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)' 2>/dev/null; }

everywhere() { "${tpus[@]}" tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

create() {
  echo "== ask for $TYPE as $NAME"
  "${tpus[@]}" queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
    --runtime-version="$VERSION" ${SPOT:+--spot} || return
  until [ "$(state)" = ACTIVE ]; do
    case "$(state)" in
      FAILED | SUSPENDED) echo "error: the request for $NAME is $(state)" >&2; return 1 ;;
    esac
    echo "waiting for $NAME: $(state)"
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
  local folder changes
  if ! changes=$(git status --porcelain --untracked-files=all 2>/dev/null); then
    echo "error: $PWD is not a git checkout, which lists the files to install: clone the repository" >&2
    return 2
  fi
  echo "== install $(git rev-parse --short HEAD)${changes:+, with these changes:}"
  if [ -n "$changes" ]; then echo "$changes"; fi
  folder=$(mktemp -d)
  # What an earlier install put there and this one has not is removed; the host's environment and runs stay.
  files | tar -czf "$folder/seqpe_jax.tar.gz" --null -T - &&
    echo "== copy and install on every host" &&
    "${tpus[@]}" tpu-vm scp "$folder/seqpe_jax.tar.gz" "$NAME:seqpe_jax.new.tar.gz" --zone="$ZONE" --worker=all &&
    everywhere "set -e; mkdir -p seqpe_jax
    if [ -e seqpe_jax.tar.gz ]; then tar -tzf seqpe_jax.tar.gz | (cd seqpe_jax && xargs -d '\n' rm -f --); fi
    mv seqpe_jax.new.tar.gz seqpe_jax.tar.gz; tar -xzf seqpe_jax.tar.gz -C seqpe_jax; cd seqpe_jax
    command -v mount.nfs >/dev/null || sudo apt-get install -y -q nfs-common
    sudo mkdir -p /mnt/runs; mountpoint -q /mnt/runs || sudo mount -t nfs $(share) /mnt/runs
    command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    ~/.local/bin/uv python install 3.12; PYTHON=\$(~/.local/bin/uv python find 3.12) bash launch/setup.sh
    .venv/bin/python -m pip install -q -r requirements.txt 'jax[tpu]'"
  local code=$?
  rm -rf "$folder"
  return $code
}

train() {
  local arguments
  arguments=$(printf ' %q' "$@")
  until everywhere "cd seqpe_jax && exec env SEQPE_JAX_CACHE=/mnt/runs/cache .venv/bin/python -m seqpe_jax.train$arguments"; do
    case "$(state)" in
      ACTIVE) return 1 ;; # the slice is there, so it was the run itself: its lines say why
    esac
    echo "== $NAME was taken away: another one"
    delete && create || return
  done
}

delete() { "${tpus[@]}" queued-resources delete "$NAME" --zone="$ZONE" --force --quiet; }

case "${1:-}" in
  create | install | train | delete) "$@" ;;
  *) echo "usage: launch/tpu_pod.sh create | train ARGUMENTS... | install | delete" >&2; exit 2 ;;
esac
