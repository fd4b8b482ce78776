#!/usr/bin/env bash
# Build the Debian package of the present tree for this machine into dist/: .ci/build-deb.sh
# Works on a copy of what git knows, because dpkg-buildpackage writes beside and into the tree it builds.
set -eu
cd "$(dirname "$0")/.."
mkdir -p build dist
work=$(mktemp -d build/deb.XXXXXX)
trap 'rm -rf "$work"' EXIT
mkdir "$work/udbad"
git ls-files -z --cached --others --exclude-standard | tar --create --null --files-from=- | tar --extract --directory "$work/udbad"
(cd "$work/udbad" && dpkg-buildpackage --build=binary --no-sign) >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
lintian --allow-root --fail-on error "$work"/udbad_*.deb
mv "$work"/udbad_*.deb dist/
ls dist/udbad_*.deb
