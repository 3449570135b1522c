#!/usr/bin/env bash
# Test the checkpoint of train_5s_5c.sh that is best in validation.
# It tests the run of --seed N (default 719) or, with --resume PATH, that checkpoint; with both, that
# checkpoint on seed N's test episodes. Hyper-parameters are the checkpoint's; flags override them.
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2

run_main --mode test \
  --save logs \
  --episode-test 100 250 600 \
  "$@"
