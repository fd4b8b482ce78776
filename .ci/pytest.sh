#!/usr/bin/env bash
# Run pytest in a tree, a mount namespace and under a marker of its own, then prove that nothing was left:
# no mount, no process, no loop device, no temporary file.
# Arguments go to pytest. UDBAD_TEST_NAMESPACE is set by the script itself when it has entered the namespace.
set -eu
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python

if [ -z "${UDBAD_TEST_NAMESPACE:-}" ] && [ "$(id -u)" = 0 ] && unshare --mount true 2>/dev/null; then
    UDBAD_TEST_NAMESPACE=1 exec unshare --mount --propagation private "$0" "$@"
fi

leak_options=()
if [ -n "${UDBAD_TEST_NAMESPACE:-}" ]; then
    # The namespace has copies of the unions that others have mounted; a copy keeps their daemon from ending.
    # findmnt reads mountinfo and does not touch the mounts.
    findmnt --raw --noheadings --output TARGET --types fuse.udba |
        while IFS= read -r target; do umount --lazy -- "$(printf '%b' "$target")"; done
    leak_options+=(--own-namespace)
fi

base=$(mktemp -d /tmp/udbad-test.XXXXXX)
mkdir "$base/tmp"
chmod 755 "$base" # tests let unprivileged callers in
chmod 1777 "$base/tmp"
export UDBAD_TEST_RUN=${base##*.}
export TMPDIR=$base/tmp
# Else whatever a test starts compiles all of udbad anew: 0.3 s of CPU for each of some thousand commands.
unset PYTHONDONTWRITEBYTECODE

finish() {
    status=$?
    trap - EXIT
    # The check also ends and unmounts what it reports, so that removing the tree is safe.
    "$python" -m tests.helpers.leaks --run "$UDBAD_TEST_RUN" --tree "$base" --empty "$base/tmp" \
        ${leak_options[@]+"${leak_options[@]}"} || status=1
    rm -rf --one-file-system -- "$base" || status=1
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

"$python" -m pytest --basetemp "$base/pytest" -o tmp_path_retention_policy=failed --durations=25 "$@"
