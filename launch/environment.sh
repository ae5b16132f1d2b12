# Sourced: makes or reuses .venv and installs megacpt with the extras in $1. Sets $VENV_PYTHON.
# The installer's configured index decides which build of torch comes; requirements.txt pins the versions tested.

megacpt_fail() { echo "megacpt: $*" >&2; exit 1; }

megacpt_find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.11 python3.12 python3.13; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    megacpt_fail "needs Python 3.11, 3.12 or 3.13 and found none (python3 is $(python3 --version 2>&1 || echo missing)). Name one: PYTHON=/path/to/python3.12"
}

megacpt_environment() {
    local extras="$1" stamp=.venv/megacpt-installed wanted python
    if [ ! -x .venv/bin/python ]; then
        python="$(megacpt_find_python)" || exit 1
        echo "making .venv with $($python --version)" >&2
        "$python" -m venv .venv || megacpt_fail "could not make .venv; on Debian and Ubuntu: apt install python3-venv"
    fi
    VENV_PYTHON="$PWD/.venv/bin/python"
    wanted="$(cat setup.py requirements.txt | cksum) $PWD"
    # what an earlier call installed serves as long as its versions are the same and it had these extras
    if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$wanted" ] && grep -qx "$extras" "$stamp"; then
        return
    fi
    echo "installing megacpt[$extras] into .venv (the first time takes a few minutes)" >&2
    "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check -c requirements.txt -e ".[$extras]" \
        || megacpt_fail "the installation failed; see the lines above"
    if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$wanted" ]; then
        echo "$extras" >>"$stamp"
    else
        printf '%s\n%s\n' "$wanted" "$extras" >"$stamp"
    fi
    [ "$extras" != dev ] || echo hf >>"$stamp" # dev holds all that hf does
}
