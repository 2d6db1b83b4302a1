#!/usr/bin/env bash
# Makes .venv with everything that runs and tests need; at once when the requirements have not changed since.
# PYTHON=/path/to/python3.12 picks the interpreter (3.11, 3.12 or 3.13); safe to interrupt and to start twice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local name
  for name in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
      command -v "$name"
      return
    fi
    if [ -n "${PYTHON:-}" ]; then
      break
    fi
  done
  echo "error: need Python 3.11, 3.12 or 3.13${PYTHON:+, and PYTHON=$PYTHON is none}; set PYTHON=/path/to/python3" >&2
  return 2
}

# One set-up at a time; the kernel lets the lock go when this process ends, however it ends.
exec 9<requirements.txt
if command -v flock >/dev/null; then
  flock -n 9 || { echo "set-up: another one is under way, waiting"; flock 9; }
fi

python=$(find_python)
wanted=$({ "$python" --version && cat requirements.txt tests/requirements.txt pyproject.toml; } | cksum)
# The stamp is written last, so a set-up that was cut short is done again.
if [ -x .venv/bin/python ] && [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi
echo "set-up: installing into .venv with $("$python" --version) (about 1 GB, one or two minutes)"
rm -f .venv/installed
"$python" -m venv --clear .venv
# Bytecode is written by the first process that imports a module: of all 13,000, most of which none imports, it takes a minute.
.venv/bin/python -m pip install --disable-pip-version-check --no-compile -r requirements.txt -r tests/requirements.txt |
  awk '/^Collecting/ { printf "."; fflush() } /^Installing/ { printf " unpacking"; fflush() } END { print "" }'
# The package itself, as a link to this tree: scripts of examples/ and the command `seqpe_jax` find it from any folder.
.venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
echo "$wanted" > .venv/installed
