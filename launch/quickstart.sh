#!/usr/bin/env bash
# Set-up, then SeqPE, FoX and RoPE trained at one budget, evaluated past the training length, and a report.
# FoX has the rotary pairs of SeqPE and forget gates that start open.
# Run again: a stopped run resumes, finished work is not repeated. RUNS=DIR changes the folder (runs/quickstart);
# arguments go to train, e.g. launch/quickstart.sh --config.steps=200
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
runs="${RUNS:-runs/quickstart}"
bash launch/setup.sh
python=.venv/bin/python

for kind in seqpe fox rotary; do
  parts=""
  [[ $kind == fox ]] && parts="--config.encoding.rotary_pairs=4 --config.encoding.gate_bias_init=4"
  echo "== $kind: train"
  "$python" -m seqpe_jax.train --config="configs/stdlib_lm.py:$kind" --workdir="$runs/$kind" \
    --config.eval.contexts=64,256,1024 --config.eval.targets=4096 $parts "$@"
  result="$runs/$kind/evaluation.json"
  # Exit code 0 if the evaluation is of the config and the last checkpoint in the folder.
  evaluated='import sys; from seqpe_jax.run_dir import RunDir; run = RunDir(sys.argv[1])
sys.exit(run.evaluated_step() != run.config.steps)'
  if "$python" -c "$evaluated" "$runs/$kind"; then
    echo "== $kind: evaluation is up to date"
  else
    echo "== $kind: evaluate"
    "$python" -m seqpe_jax.evaluate --checkpoint="$runs/$kind" --output="$result"
  fi
done

echo "== report"
"$python" -m seqpe_jax.report --workdir="$runs" --output="$runs/report"
