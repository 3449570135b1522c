#!/usr/bin/env bash
# Test the best checkpoint of train_1s_5c_second_order.sh by validation.
# Flags given to this script override; without --seed it tests seed 719's run. Hyper-parameters and
# the seed of the test episodes come from the checkpoint. --resume PATH tests another checkpoint.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
use_python requirements.txt

exec "$PYTHON" "$ROOT/main.py" --mode test \
  --save logs-1shot-second-order \
  --episode-test 100 250 600 \
  "$@"
