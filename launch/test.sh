#!/usr/bin/env bash
# Set-up and tests. Arguments go to pytest: launch/test.sh -m "not slow"; launch/test.sh tests/positions -k digits
# PROCESSES=4 runs that many at once (default 2). Exit code: pytest's own (0 passed, 1 failures, 5 nothing collected).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/compiled}"
# One file stays on one process, so that what a file's tests share is made once; files start in tests/conftest.py's order.
exec .venv/bin/python -m pytest -n "${PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"
