#!/usr/bin/env bash
# The documentation as a site. A warning, a link that leads nowhere and a page that needs another host are errors.
set -eu
cd "$(dirname "$0")/.."
# The variable: what the theme's authors announce about its future is no warning about these pages.
NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet --strict
