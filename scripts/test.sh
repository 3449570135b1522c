#!/usr/bin/env bash
# Lint, type checks, then the everyday tests; --all adds those marked slow. Other arguments go to
# pytest and choose the tests instead; their paths may be relative to your working directory.
#   bash scripts/test.sh [--all]
#   bash scripts/test.sh tests/core -k golden
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2
use_python requirements-dev.txt

tests='not slow and not gpu'
for argument in "$@"; do
  shift
  case $argument in
    --all) tests='not gpu' && continue ;;
    -* | /*) ;;
    *) if [ -e "${argument%%::*}" ]; then argument=$PWD/$argument; fi ;;
  esac
  set -- "$@" "$argument"
done
chosen=$#
if [ "$chosen" = 0 ]; then set -- -m "$tests" -n 2 --dist loadfile; fi # two files at a time
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT-1000} # tests are slow beside other programs otherwise
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy # pyproject.toml names the files
"$PYTHON" -m pytest "$@"
if [ "$chosen" = 0 ] && nvidia-smi -L >/dev/null 2>&1; then "$PYTHON" -m pytest -m gpu; fi
