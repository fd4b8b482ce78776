#!/usr/bin/env bash
# Make or refresh the virtual environment: .ci/venv.sh PYTHON DIR. The Makefile calls it when pyproject.toml is newer.
set -eu
cd "$(dirname "$0")/.."
python=$1
venv=$2

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "udbad needs Python 3.11 or newer; '$python' says: $("$python" --version 2>&1 | head -n 1)." \
        "Use Debian 12, Ubuntu 24.04 or later, or: make PYTHON=/path/to/python3.11" >&2
    exit 1
fi
# A directory whose interpreter is gone or too old (an upgraded system) is made anew.
if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
# compat: a line in a .pth file. The default is a finder, whose imports cost every command 20 ms.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat -e '.[dev]'
