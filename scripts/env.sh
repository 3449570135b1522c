# Sourced by the other scripts: finds the Python to run, and installs what it lacks.
#   use_python REQUIREMENTS   sets $PYTHON: that of the active environment (venv or conda), else of .venv in the repository, made if
#                             need be. Nothing is installed while all that REQUIREMENTS asks for is there.

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "error: $*" >&2
  exit 2
}

in_root() { (cd "$ROOT" && "$@"); } # Python's -m and -c look in the working directory first: not in the user's, whatever it holds

use_python() {
  local prefix=${VIRTUAL_ENV:-${CONDA_PREFIX:-}} missing
  if [ -n "$prefix" ]; then
    PYTHON=$prefix/bin/python
    [ -x "$PYTHON" ] || fail "$prefix is the active environment but has no bin/python; deactivate it or mend it"
    recent "$PYTHON" || fail "$PYTHON is older than Python 3.10; activate a newer environment, or none"
  else
    prefix=$ROOT/.venv
    PYTHON=$prefix/bin/python
    own_environment "$prefix"
  fi
  missing=$(lacking "$1")
  if [ -n "$missing" ]; then
    has_pip >/dev/null 2>&1 || fail "$prefix has no pip and lacks $missing; install $1 there"
    echo "installing $1 into $prefix, which lacks $missing (PyTorch is large; this happens once)"
    install -r "$ROOT/$1"
    missing=$(lacking "$1")
    if [ -n "$missing" ]; then # pip took a damaged package for a whole one
      # shellcheck disable=SC2086  # one word a package
      install --force-reinstall --no-deps $missing
      missing=$(lacking "$1")
    fi
    [ -z "$missing" ] || fail "$prefix still lacks $missing after pip installed $1"
  fi
}

recent() { in_root "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

has_pip() { in_root "$PYTHON" -m pip --version; }

# Make .venv, or mend one whose making was cut short.
own_environment() {
  if recent "$PYTHON" && { has_pip || { in_root "$PYTHON" -m ensurepip && has_pip; }; } >/dev/null 2>&1; then
    return
  fi
  recent python3 || fail "python3 is missing or older than 3.10; install a newer one, or activate an environment that has it"
  echo "making a virtual environment in $1"
  in_root python3 -m venv --clear "$1" >/dev/null 2>&1 ||
    fail "python3 -m venv $1 does not work (on Debian and Ubuntu: apt-get install python3-venv), and no environment is active"
}

install() {
  in_root "$PYTHON" -m pip install --disable-pip-version-check $([ -t 2 ] || echo --quiet) "$@" ||
    fail "pip could not install $*, see above"
}

# What a requirements file asks for and $PYTHON does not have, or has too old. Reads lines NAME>=VERSION and -r FILE.
lacking() {
  in_root "$PYTHON" -c '
import importlib.metadata, importlib.util, pathlib, re, sys

def wanted(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r"):
            yield from wanted(path.parent / line[2:].strip())
        elif line:
            yield [word.strip() for word in line.split(">=")]

def there(name, least):
    spec = importlib.util.find_spec({"pillow": "PIL"}.get(name, name))
    if spec is None or spec.origin is None:
        return False
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return [int(n) for n in re.findall(r"\d+", found)] >= [int(n) for n in least.split(".")]

print(*(name for name, least in wanted(pathlib.Path(sys.argv[1])) if not there(name, least)))
' "$1"
}
