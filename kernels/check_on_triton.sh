#!/usr/bin/env bash
# Compiles every kernel with another version of Triton:   bash kernels/check_on_triton.sh 3.6.0 [--arch 90 80 100]
# PYTHON: an interpreter that has torch (default: python). The other Triton goes to a folder that is removed.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,3s/^# \{0,1\}//p' "$0" >&2; exit 2; }
version="$1"
shift
python="$(command -v "${PYTHON:-python}")"
kernels="$(cd "$(dirname "$0")" && pwd)"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" "triton==$version"
unset TRITON_INTERPRET
PYTHONPATH="$folder:$kernels" "$python" -m megacpt_kernels.compile_check "$@"
