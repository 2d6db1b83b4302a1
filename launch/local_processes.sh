#!/usr/bin/env bash
# N processes of one command on this machine: launch/local_processes.sh 2 python -m seqpe_jax.train --config=... --workdir=...
# Lines begin with the process's number. SIGINT and SIGTERM reach all; when one fails the others end, and its exit code is
# the script's. GPUs are dealt out evenly; on CPU, XLA_FLAGS=--xla_force_host_platform_device_count=4 gives each 4 devices.
set -uo pipefail
count="${1:-}"
if ! [[ "$count" =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
  echo "usage: launch/local_processes.sh N COMMAND...   (N processes, at least 1)" >&2
  exit 2
fi
shift

free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
port=$((20000 + RANDOM % 10000))
until free "$port" && free $((port - 1)); do port=$((20000 + RANDOM % 10000)); done

gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU'); fi
if [ "$gpus" -gt 0 ] && [ $((gpus % count)) -ne 0 ]; then
  echo "error: $gpus GPUs cannot be dealt out to $count processes evenly: take a divisor of $gpus" >&2
  exit 2
fi

pids=()
for ((process = 0; process < count; process++)); do
  if [ "$gpus" -gt 0 ]; then
    share=$((gpus / count))
    JAX_LOCAL_DEVICE_IDS=$(seq -s, $((process * share)) $((process * share + share - 1)))
    export JAX_LOCAL_DEVICE_IDS
  fi
  # Every process writes to a pipe of its own, so that its number is known and its lines stay whole.
  "$@" --coordinator="localhost:$port" --num-processes="$count" --process-id="$process" \
    > >(sed -u "s/^/[$process] /") 2> >(sed -u "s/^/[$process] /" >&2) &
  pids+=($!)
done

trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM
code=0 killer=""
for pid in "${pids[@]}"; do wait_for[$pid]=1; done
while [ ${#wait_for[@]} -gt 0 ]; do
  wait -n "${!wait_for[@]}" 2>/dev/null # bash would print the whole command of a killed one
  for pid in "${!wait_for[@]}"; do
    if ! kill -0 "$pid" 2>/dev/null; then
      wait "$pid" 2>/dev/null
      status=$?
      unset "wait_for[$pid]"
      if [ $status -ne 0 ] && [ $code -eq 0 ]; then
        code=$status
        (sleep 30 && kill -KILL "${pids[@]}") >/dev/null 2>&1 & # they leave by themselves, with a reason, when they can
        killer=$!
      fi
    fi
  done
done
[ -z "$killer" ] || kill "$killer" 2>/dev/null
exit $code
