#!/usr/bin/env bash
# Kills -9 at random moments, a third of them while a checkpoint is written: 200 of a small run, 20 of a run of two processes,
# and 20 of a run whose folder is in a bucket (an emulator on this machine, which keeps it as files). Each goes to its end and
# must equal, bit for bit, one on this disk that nobody disturbed. Prints a table, and writes it to docs/results/chaos.json;
# exit code 1 where anything differs. Less, or one alone: launch/chaos.sh --kills=20 --pair=2 --bucket=0
# The same command resumes where it was interrupted; rm -r runs/chaos, or another --folder=, starts anew. About an hour.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/compiled}"
exec .venv/bin/python -m tests.kill_and_resume --results=docs/results/chaos.json "$@"
