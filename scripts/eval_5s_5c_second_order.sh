#!/usr/bin/env bash
# Test the checkpoint of train_5s_5c_second_order.sh that is best in validation.
# It tests seed 719's run; with --seed N, seed N's; with --resume PATH, that checkpoint, and with both
# on other test episodes. Hyper-parameters come from the checkpoint. Your flags override these.
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

run_main --mode test \
  --save logs-second-order \
  --episode-test 100 250 600 \
  "$@"
