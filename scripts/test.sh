#!/usr/bin/env bash
# Run the linter, then the tests. Arguments go to pytest; paths among them may be relative to your
# working directory.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
use_python requirements-dev.txt

for argument in "$@"; do
  case $argument in
    -* | /*) ;;
    *) if [ -f "${argument%%::*}" ]; then argument=$PWD/$argument; fi ;;
  esac
  set -- "$@" "$argument"
  shift
done
all=$#
if [ $# = 0 ]; then set -- -n 2 --dist loadfile; fi # all tests: two files at a time
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT-1000} # or tests crawl beside other programs
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest "$@"
if [ "$all" = 0 ] && nvidia-smi -L >/dev/null 2>&1; then "$PYTHON" -m pytest -m gpu; fi
