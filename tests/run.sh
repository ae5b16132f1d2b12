#!/usr/bin/env bash
# Makes or reuses .venv, then ruff and every test. --full adds the slow ones; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh
megacpt_environment dev
if [ "${1:-}" = --full ]; then
    export MEGACPT_TEST_FULL=1
    shift
fi
"$VENV_PYTHON" -m ruff check .
"$VENV_PYTHON" -m ruff format --check .
OMP_NUM_THREADS=1 "$VENV_PYTHON" -m pytest -rs --durations=15 "$@"
