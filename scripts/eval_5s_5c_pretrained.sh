#!/usr/bin/env bash
# Test the checkpoint of train_5s_5c_pretrained.sh that is best in validation, with test-time
# augmentation over flipped images (--tta-flip).
# --seed, --resume and other flags: see eval_5s_5c.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2

run_main --mode test \
  --save logs-pretrained \
  --episode-test 100 250 600 \
  --tta-flip true \
  "$@"
