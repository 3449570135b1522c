#!/usr/bin/env bash
# Test the checkpoint of train_1s_5c.sh that is best in validation.
# Flags given to this script override these; without --seed it tests seed 719's run, with --resume
# PATH another checkpoint. The checkpoint sets hyper-parameters and the test episodes' seed.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
use_python requirements.txt

exec "$PYTHON" "$ROOT/main.py" --mode test \
  --save logs-1shot \
  --episode-test 100 250 600 \
  "$@"
