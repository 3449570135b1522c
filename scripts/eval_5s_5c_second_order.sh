#!/usr/bin/env bash
# Test the checkpoint of train_5s_5c_second_order.sh that is best in validation.
# --seed, --resume and other flags: see eval_5s_5c.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2

run_main --mode test \
  --save logs-second-order \
  --episode-test 100 250 600 \
  "$@"
