#!/usr/bin/env bash
# Run the tests of what is done in C, and of requests that make no sense, under AddressSanitizer: .ci/sanitize.sh [TESTS]
# In a copy of the tree, so that the modules compiled beside the sources stay as they are. It takes some minutes.
set -eu
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
[ $# -gt 0 ] || set -- tests/t2_core/test_parser.py tests/t0_unit/test_in_c.py tests/t0_unit/test_read_cached.py

copy=$(mktemp -d)
trap 'rm -rf -- "$copy"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$copy"
cd "$copy"

UDBAD_REQUIRE_COMPILED=1 UDBAD_CFLAGS="-O1 -g1 -fsanitize=address -fno-omit-frame-pointer" \
    "$python" -W ignore setup.py --quiet build_ext --inplace
# The interpreter frees little at its end, which is no leak of ours. Its own memory has no borders that can be guarded
# (PYTHONMALLOC), and a stack that overflows is Python's to report.
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:allocator_may_return_null=1 PYTHONMALLOC=malloc
LD_PRELOAD=$(gcc -print-file-name=libasan.so) "$python" -m pytest -p no:cacheprovider "$@"
