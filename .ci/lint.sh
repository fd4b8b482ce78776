#!/usr/bin/env bash
# ruff, the documentation and mypy, which takes seconds when its cache is there, and about two minutes when it is not.
set -eu
cd "$(dirname "$0")/.."
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.ci/docs.sh
.venv/bin/mypy --strict
