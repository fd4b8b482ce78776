#!/usr/bin/env bash
# All tests, in two runs beside each other: whole programs in a union (marker system), which mostly wait for each
# other's requests, and everything else. With arguments: one run of pytest with them.
set -eu
cd "$(dirname "$0")/.."
[ $# = 0 ] || exec .ci/pytest.sh "$@"

output=$(mktemp)
# A process group of its own: a shell without job control starts background commands deaf to Ctrl-C.
setsid .ci/pytest.sh -m system >"$output" 2>&1 &
system=$!
trap 'kill -TERM -- "-$system"' INT TERM
status=0
.ci/pytest.sh -m 'not system' || status=1
wait "$system" || status=1
cat "$output"
rm -f "$output"
exit "$status"
