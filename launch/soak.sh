#!/usr/bin/env bash
# A small run of 20 000 steps that evaluates and saves all the while: the memory that it holds after 5 000 steps and at its
# end, into docs/results/chaos.json; exit code 1 where it grew by more than 2%. Another number of steps: launch/soak.sh 4000
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/compiled}"
exec .venv/bin/python -m tests.kill_and_resume --results=docs/results/chaos.json --soak="${1:-20000}"
