#!/usr/bin/env bash
# All tests: first those that change something of the whole machine (marker alone), with ruff and mypy beside them,
# then everything else in several workers, which mostly wait for each other's daemons. UDBAD_TEST_WORKERS: how many.
# With arguments: one run of pytest with them. The slowest tests are listed in artifacts/durations.txt.
set -eu -o pipefail
cd "$(dirname "$0")/.."
[ $# = 0 ] || exec .ci/pytest.sh "$@"

workers=${UDBAD_TEST_WORKERS:-$(($(nproc) + 1))}
output=$(mktemp -d)
lint=
finish() {
    [ -z "$lint" ] || kill -TERM -- "-$lint" 2>/dev/null || true
    rm -rf "$output"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

status=0
# A process group of its own, to be ended as one.
setsid .ci/lint.sh >"$output/lint" 2>&1 &
lint=$!
.ci/pytest.sh -m alone | tee -i "$output/alone" || status=1
wait "$lint" || { status=1 && echo "ERROR lint" >>"$output/lint"; }
lint=
cat "$output/lint"
.ci/pytest.sh -m 'not alone' -n "$workers" --dist worksteal | tee -i "$output/rest" || status=1
# Once more without what is compiled: the tests of its modules.
UDBAD_PURE=1 .ci/pytest.sh -n "$workers" --dist worksteal tests/t0_unit/test_compiled.py tests/t1_union \
    tests/t2_core/test_{fs,inodes,only_on,positions,recall,references,trust}.py tests/t3_fuse/test_{lookup,mutation}_table.py |
    tee -i "$output/pure" || status=1
mkdir -p artifacts
sed -n '/ slowest .* durations /,/^=.* in [0-9.]*s/p' "$output/rest" "$output/alone" >artifacts/durations.txt
# What failed, once more: of a long log it is often only the end that is kept.
if [ "$status" != 0 ]; then
    echo "make test failed:"
    for part in '^E  ' '^(FAILED|ERROR) |^leak check: [1-9]'; do
        (cd "$output" && grep -E "$part" lint alone rest pure | cut -c 1-400 | tail -n 30) || true
    done
fi
exit "$status"
