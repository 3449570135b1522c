#!/usr/bin/env bash
# Lint and all tests. Arguments go to pytest; files among them are the working directory's.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
use_python requirements-dev.txt

for argument in "$@"; do
  case $argument in
    -* | /*) ;;
    *) [ ! -f "${argument%%::*}" ] || argument=$PWD/$argument ;;
  esac
  set -- "$@" "$argument"
  shift
done
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest "$@"
