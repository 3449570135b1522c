# shellcheck shell=bash
# The other scripts source this file: it sets $ROOT, the repository, and the shell's strict mode.
# `use_python FILE` sets $PYTHON to the Python of the active venv or conda environment, else of .venv,
# which it makes. If a package is missing or old, it installs FILE. `run_main FLAGS` ends in main.py.
set -euo pipefail
ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

fail() { echo "error: $*" >&2; exit 2; }
need() { "$1" -c 'import sys; assert sys.version_info >= (3, 10)' 2>/dev/null || fail "$1 is missing or older than 3.10"; }

complete() { "$PYTHON" -c 'import importlib.metadata, re, sys
def numbers(version): return [int(n) for n in re.findall("[0-9]+", version)]
def there(file): # reads lines "NAME>=VERSION" and "-r FILE"
    lines = re.findall(r"^(-r )?([\w.-]+)(?:>=)?([\d.]*)", open(file).read(), re.M)
    return all(there(name) if r else numbers(importlib.metadata.version(name)) >= numbers(v) for r, name, v in lines)
sys.exit(sys.version_info < (3, 10) or not there(sys.argv[1]))' "$1" 2>/dev/null; }

use_python() {
  local prefix=${VIRTUAL_ENV:-${CONDA_PREFIX:-$ROOT/.venv}}
  PYTHON=$prefix/bin/python
  ( # in the repository: Python imports from the working directory, where a numpy.py may be
    cd "$ROOT" || exit 2
    if complete "$1"; then exit; fi
    if [ "$prefix" = "$ROOT/.venv" ] && ! { "$PYTHON" -m pip -V || "$PYTHON" -m ensurepip; } >/dev/null 2>&1; then
      need python3
      python3 -m venv --clear "$prefix" >/dev/null || fail "python3 -m venv failed; on Debian: apt-get install python3-venv"
    fi
    need "$PYTHON"
    "$PYTHON" -m pip -V >/dev/null 2>&1 || fail "$prefix has no pip; run: uv pip install --python $PYTHON -r $1 (or first: $PYTHON -m ensurepip)"
    echo "installing $1 into $prefix (PyTorch is large; this happens once)"
    "$PYTHON" -m pip install -r "$1" || fail "pip could not install $1 into $prefix"
  )
}

find_recipe() { # NAME: sets $train and $test, its scripts; a pre-training has no test
  train=$ROOT/scripts/$1.sh test=$ROOT/scripts/eval_${1#train_}.sh
  if [ "$1" = pretrain ]; then test=''; fi
  for file in "$train" ${test:+"$test"}; do [ -f "$file" ] || fail "--recipe $1: there is no $file"; done
}

run_main() {
  use_python requirements.txt
  exec "$PYTHON" "$ROOT/main.py" "$@"
}
