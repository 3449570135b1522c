#!/usr/bin/env bash
# Print Markdown tables of tested runs, beside the published numbers. --write FILE instead puts the
# tables between the lines <!-- results --> and <!-- /results --> of FILE.
#   bash scripts/results.sh logs-*
#   bash scripts/results.sh --write docs/results.md            # all runs of results/
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2
use_python requirements.txt

file=''
if [ "${1-}" = --write ]; then
  file=${2-}
  [ -f "$file" ] || fail "--write $file: no such file"
  shift 2
fi
if [ $# = 0 ]; then # all tested runs of results/
  set -- "$ROOT"/results/*/results.json
  set -- "${@%/results.json}"
fi
[ -n "$file" ] || exec "$PYTHON" "$ROOT/main.py" --mode results --runs "$@"
tables=$("$PYTHON" "$ROOT/main.py" --mode results --runs "$@")
"$PYTHON" -c 'import pathlib, re, sys
sys.path[0] = sys.argv[1]
from engine.process import run_main
from utils import UserError, atomic_write
def main(argv):
    path, (begin, end) = pathlib.Path(argv[0]), ("<!-- results -->\n", "<!-- /results -->\n")
    try:
        text, n = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}{argv[1]}\n{end}", path.read_text("utf-8"), flags=re.S)
    except UnicodeDecodeError:
        raise UserError(f"--write {path}: is no UTF-8; choose another file")
    if n != 1:
        raise UserError(f"--write {path}: lacks the two marker lines, or has them twice; add them where the tables belong")
    with atomic_write(path) as file:
        file.write(text.encode())
sys.exit(run_main(main, sys.argv[2:]))' "$ROOT" "$file" "$tables"
