#!/usr/bin/env bash
# Speed, memory and scaling of fast/ against --plain in the same process, as a Markdown table on the
# console and in benchmarks/results/. Arguments go to benchmarks/run.py.
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/env.sh"
use_python requirements.txt
exec "$PYTHON" "$ROOT/benchmarks/run.py" "$@"
