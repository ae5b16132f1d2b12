#!/usr/bin/env bash
# One training step of Llama-3-8B's shapes on this machine's GPU, at 8,192 and 131,072 tokens of packed documents: tokens/s, both
# MFUs, peak memory, kernels by time, host time, beside transformers and torchtitan where they are installed.
#   bash launch/bench_train.sh [arguments of launch/bench/step.py]      PYTHON: the interpreter (default: python)
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
export PYTHONPATH="$here:$here/kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
exec "${PYTHON:-python}" "$here/launch/bench/step.py" "$@"
