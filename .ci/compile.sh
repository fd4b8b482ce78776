#!/usr/bin/env bash
# Compile the hot modules beside their sources, when what is there was made from other ones: .ci/compile.sh VENV
# Without a compiler there are none, and udbad runs the Python sources.
set -eu
cd "$(dirname "$0")/.."
python=$1/bin/python
# What is left of a module that has moved since would be imported by its old name.
for built in udbad/*/*.so; do
    source=${built%%.*}
    [ -e "$source.py" ] || [ -e "$source.pyx" ] || rm -f "$built"
done
# Bytecode, too: where PYTHONDONTWRITEBYTECODE is set, every command would compile what it imports.
"$python" -m compileall -q udbad
"$python" -c 'import sys; from udbad import compiled; sys.exit(bool(compiled.why_not()) and compiled.wanted())' && exit 0
echo "compiling the hot modules" >&2
"$python" -W ignore setup.py --quiet build_ext --inplace >&2
