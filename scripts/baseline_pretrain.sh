#!/usr/bin/env bash
# Pre-training for nearest neighbour and fine-tuning: a linear classifier of all training classes. Here
# it has 32 filters, as the LSTM's learner, and batches of 2 images of each class; the authors use 64
# filters (--filters 64, also for the two baselines) and batches of 64 images.
# Edit the flags below; flags given to this script override them. All others: python main.py --help
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2

run_main --mode pretrain \
  --n-shot 1 \
  --n-eval 1 \
  --lr 1e-3 \
  --episode 30000 \
  --grad-clip 1000 \
  --augment none \
  --pixels unit \
  --classifier linear \
  --save logs-baseline-pretrain \
  --resume auto \
  "$@"
