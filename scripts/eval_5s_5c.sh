#!/usr/bin/env bash
# Test the best checkpoint of train_5s_5c.sh, with the hyper-parameters it was trained with.
# Flags given to this script override; --resume CKPT tests another checkpoint.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
use_python requirements.txt

exec "$PYTHON" "$ROOT/main.py" --mode test \
  --save logs \
  --seed 719 \
  --episode-test 100 250 600 \
  "$@"
