#!/usr/bin/env bash
# Five minutes on one NVIDIA GPU: the device, the attention kernels, and the time of a training step of GPT-2 124M and of ViT-S/16, with
# SeqPE and with RoPE in turns: tokens or images per second, MFU by both counts, and the ratio of the two.
#   pip install '.[cuda]'; bash launch/gpu_check.sh
# Random inputs; the text that sets the vocabulary is Python's own. TEXT_BATCH (16) and IMAGE_BATCH (128) change the batches, STEPS (20) the
# timed steps, OUTPUT=DIR also writes the figures as JSON. --smoke runs tiny models instead, on any machine, in seconds.
# PYTHON=/path/to/python takes another interpreter (.venv's if there is one, else python3). Exit code 2: there is no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -gt 1 ] || [ "${1:---smoke}" != --smoke ]; then
  echo "usage: launch/gpu_check.sh [--smoke]" >&2
  exit 2
fi
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
smoke=${1:-} steps=${STEPS:-20}

# One line on the device; exit code 3 where it is no GPU.
find_gpu() {
  "$PYTHON" - <<'EOF'
import jax

device = jax.devices()[0]
limit = (device.memory_stats() or {}).get("bytes_limit", 0)
print(f"device: {device.device_kind}, {limit / 2**30:.0f} GiB for JAX, jax {jax.__version__}")
raise SystemExit(0 if device.platform == "gpu" else 3)
EOF
}

code=0
found=$(find_gpu) || code=$?
if [ $code -ne 0 ] && [ $code -ne 3 ]; then exit $code; fi
if [ $code -eq 3 ] && [ -z "$smoke" ]; then
  echo "error: JAX finds no GPU ($found): pip install '.[cuda]' on a machine with one (nvidia-smi lists it), or give --smoke" >&2
  exit 2
fi
if [ $code -eq 3 ]; then found="there is no GPU; $found"; fi
echo "$found"

measure() { # name, options of the benchmark
  echo
  echo "== $1: a training step"
  "$PYTHON" -m seqpe_jax.benchmark --steps="$steps" ${OUTPUT:+--output="$OUTPUT/$1.json"} "${@:2}" 2>&1 | grep -v '^written: '
}

still=(--config.model.dropout=0 --config.model.attention_dropout=0 --config.model.embedding_dropout=0)
text=(--config=configs/speed_lm.py --compare=seqpe,rotary "${still[@]}")
image=(--config=configs/digits_vit.py --compare=seqpe,rotary_mixed "${still[@]}")
if [ -n "$smoke" ]; then
  steps=${STEPS:-1}
  measure gpt2_smoke "${text[@]}" --config.model.layers=1 --config.model.width=64 --config.model.heads=1 --config.batch_size=2 \
    --config.data.length=32
  measure vit_smoke "${image[@]}" --config.model.layers=1 --config.model.width=48 --config.model.heads=2 --config.batch_size=8
else
  measure gpt2_124m "${text[@]}" --config.model.layers=12 --config.model.width=768 --config.model.heads=12 --config.model.scan=true \
    --config.model.vocabulary=50257 --config.data.length=1024 --config.batch_size="${TEXT_BATCH:-16}" --config.precision.compute=bfloat16
  measure vit_s16 "${image[@]}" --config.model.layers=12 --config.model.width=384 --config.model.heads=6 --config.model.scan=true \
    --config.model.patch=16,16 --config.data.size=224,224 --config.model.classes=1000 --config.encoding.max_position=100 --config.batch_size="${IMAGE_BATCH:-128}" \
    --config.precision.compute=bfloat16
fi
