# Sourced by the other scripts: finds the Python to run, and installs what it lacks.
#   use_python REQUIREMENTS   sets $PYTHON; an active environment is honoured, else .venv in the repository is made

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

use_python() {
  local requirements=$ROOT/$1 stamp prefix
  prefix=${VIRTUAL_ENV:-${CONDA_PREFIX:-$ROOT/.venv}}
  PYTHON=$prefix/bin/python
  stamp=$prefix/.meta-lstm-$1.installed
  if [ "$prefix" = "$ROOT/.venv" ] && ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
      { echo "error: python3 is missing or older than 3.10; install a newer one or activate an environment that has it" >&2; exit 2; }
    echo "making a virtual environment in $prefix"
    rm -rf "$prefix"
    python3 -m venv "$prefix" ||
      { echo "error: python3 -m venv failed (on Debian: apt-get install python3-venv)" >&2; exit 2; }
  fi
  [ -x "$PYTHON" ] || { echo "error: $prefix is active but has no bin/python; deactivate it or mend it" >&2; exit 2; }
  # The stamp holds the text of the requirements that were installed, written last: a killed install is done again.
  if ! cat "$ROOT"/requirements*.txt | cmp -s - "$stamp"; then
    echo "installing $1 into $prefix (PyTorch is large; once)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements" ||
      { echo "error: pip could not install $requirements; see above" >&2; exit 2; }
    cat "$ROOT"/requirements*.txt >"$stamp" 2>/dev/null || true  # an environment that is not ours to write in
  fi
}
