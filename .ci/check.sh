#!/usr/bin/env bash
# What to run before every commit: ruff, mypy, the tests without mounts, and one mount, beside each other. The tests that
# break off or interfere at every step of a merge of branches take a third of the steps here; make test takes them all.
set -eu
export UDBAD_TEST_PROFILE=quick
cd "$(dirname "$0")/.."
output=$(mktemp)
setsid .ci/lint.sh >"$output" 2>&1 &
lint=$!
trap 'kill -TERM -- "-$lint" 2>/dev/null || true; rm -f "$output"' EXIT
status=0
.ci/pytest.sh -q -n 2 --dist worksteal tests/test_*.py tests/t0_unit tests/t1_union tests/t2_core \
    tests/t3_fuse/test_lookup_table.py || status=1
wait "$lint" || status=1
cat "$output"
exit "$status"
