#!/usr/bin/env bash
# Print several tested runs as a Markdown table, with the mean over seeds and the published numbers.
#   bash scripts/results.sh logs-*
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
use_python requirements.txt

exec "$PYTHON" "$ROOT/main.py" --mode results --runs "$@"
