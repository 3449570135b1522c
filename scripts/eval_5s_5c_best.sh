#!/usr/bin/env bash
# Test the best checkpoint of train_5s_5c_best.sh, with the hyper-parameters it was trained with.
# Answers are averaged over mirror images.
# Flags given to this script override; --resume CKPT tests another checkpoint.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
use_python requirements.txt

exec "$PYTHON" "$ROOT/main.py" --mode test \
  --save logs-best \
  --seed 719 \
  --episode-test 100 250 600 \
  --orders 1 \
  --mirror true \
  "$@"
