#!/usr/bin/env bash
# Makes or reuses .venv, then what reads the code, then every test, as many at a time as there are cores (8 at most).
# At the end: where the time went, by folder and by test, in wall and CPU seconds.
# --full adds the slow tests, and fails above their budget (tests/costs.py); other arguments go to pytest.
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
"$VENV_PYTHON" -m basedpyright

# A worker that has nothing left takes over tests of another one. What starts four processes or more runs alone (tests/shared.py).
cores="$("$VENV_PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"
OMP_NUM_THREADS=1 "$VENV_PYTHON" -m pytest -rs -n "$((cores < 8 ? cores : 8))" --dist worksteal "$@"
