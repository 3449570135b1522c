#!/usr/bin/env bash
# Print Markdown tables of tested runs, beside the published numbers. --write FILE instead puts the
# tables between the lines <!-- results --> and <!-- /results --> of FILE.
#   bash scripts/results.sh logs-*
#   bash scripts/results.sh --write docs/results.md            # all runs of results/
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
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
path, (begin, end) = pathlib.Path(sys.argv[1]), ("<!-- results -->\n", "<!-- /results -->\n")
text, n = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}{sys.argv[2]}\n{end}", path.read_text("utf-8"), flags=re.S)
sys.exit(n != 1 or not path.write_text(text, "utf-8"))' "$file" "$tables" || fail "$file lacks the two marker lines"
