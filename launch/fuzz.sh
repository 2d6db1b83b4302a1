#!/usr/bin/env bash
# Random command lines, configs, settings of other programs and damaged files, for hours: launch/fuzz.sh 8
# Each round has a seed of its own. Every input must give a result or one line that names the fault: no traceback, no hang, no
# flood of memory. Of a failure the seed and the smallest input that has it are printed, and exit code 1 at the end. Without a
# number of hours there is one round, of ten minutes. COMMANDS=100 and READS=2000 are the inputs of a round: commands in
# processes of their own, and files and settings of each kind. RESULTS=docs/results/fuzz.json adds their counts to that file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/compiled}"
export MUTATIONS="${COMMANDS:-100}" FUZZ="${READS:-2000}" FUZZ_RESULTS="${RESULTS:-}"
case "${1:-0}" in
*[!0-9]*) echo "error: launch/fuzz.sh takes a whole number of hours, got '$1'" >&2; exit 2 ;;
esac
end=$((SECONDS + ${1:-0} * 3600)) rounds=0 failed=0
while true; do
    export MUTATION_SEED="${SEED:-$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}"
    rounds=$((rounds + 1))
    echo "== round $rounds: SEED=$MUTATION_SEED"
    .venv/bin/python -m pytest -n0 -q -s tests/repository/test_mutations.py || { failed=$((failed + 1)); echo "== failed: SEED=$MUTATION_SEED launch/fuzz.sh repeats this round"; }
    [ -z "${SEED:-}" ] && [ "$SECONDS" -lt "$end" ] || break
done
echo "$rounds round(s), $failed failed"
[ "$failed" -eq 0 ]
