#!/usr/bin/env bash
# The whole way once, on text that every machine has: a tokenizer, a tiny base, its continued pre-training, an export.
# Two CPU cores and no GPU are enough. Writes runs/quickstart and runs/base.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh
megacpt_environment hf
megacpt() { "$VENV_PYTHON" -m megacpt "$@"; }
# An export of half a run, with its losses, would look like the result.
train() {
    local code=0
    megacpt train "$1" --require finished || code=$?
    [ "$code" = 0 ] && return
    echo "launch/quickstart.sh: not finished, so nothing is exported (train left with $code). The next call begins anew." >&2
    exit "$code"
}
work=runs/quickstart-data
if [ -d runs/base ] || [ -d runs/quickstart ]; then
    old="runs/before-$(date +%Y%m%d-%H%M%S)"
    mkdir -p "$old"
    for name in base quickstart quickstart-data; do [ ! -e "runs/$name" ] || mv "runs/$name" "$old/"; done
    echo "the last quickstart was moved to $old"
fi

echo "== 1. text: Python's documentation and the standard library's sources; a byte-level BPE tokenizer of 4,096 entries"
"$VENV_PYTHON" launch/quickstart.py text "$work"

echo "== 2. tokens"
megacpt prepare "$work/docs.jsonl" --tokenizer "$work/tokenizer" --output "$work/docs"
megacpt prepare "$work/code.jsonl" --tokenizer "$work/tokenizer" --output "$work/code"

echo "== 3. a tiny base, from scratch, on the documentation"
train launch/recipes/quickstart_base.toml
megacpt export runs/base --output runs/base/export

echo "== 4. its continued pre-training: code, with documentation as replay"
megacpt check launch/recipes/quickstart.toml
train launch/recipes/quickstart.toml
megacpt export runs/quickstart --output runs/quickstart/export

echo "== 5. what came of it"
"$VENV_PYTHON" launch/quickstart.py show runs/quickstart
echo
echo "Curves: .venv/bin/tensorboard --logdir runs   (then open http://localhost:6006)"
