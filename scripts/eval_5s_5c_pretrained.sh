#!/usr/bin/env bash
# Test the checkpoint of train_5s_5c_pretrained.sh that is best in validation, with test-time
# augmentation over mirrored images (--tta-flip).
# Flags given to this script override these; without --seed it tests seed 719's run, with --resume
# PATH another checkpoint. The checkpoint sets hyper-parameters and the test episodes' seed.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
use_python requirements.txt

exec "$PYTHON" "$ROOT/main.py" --mode test \
  --save logs-pretrained \
  --episode-test 100 250 600 \
  --tta-flip true \
  "$@"
