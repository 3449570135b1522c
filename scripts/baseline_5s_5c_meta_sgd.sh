#!/usr/bin/env bash
# As baseline_5s_5c_sgd.sh, with a learned step size for each parameter (Meta-SGD).
# 1-shot: --n-shot 1 --epoch 12 --batch-size 5 --bn-momentum 0.9 --save OTHER.
# Edit the flags below; flags given to this script override them. All others: python main.py --help
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2

run_main --mode train \
  --n-shot 5 \
  --lr 1e-3 \
  --episode 50000 \
  --epoch 8 \
  --batch-size 25 \
  --grad-clip 0.25 \
  --augment none \
  --pixels unit \
  --shuffle episode \
  --grad-divisor 1 \
  --method meta-sgd \
  --save logs-meta-sgd \
  --resume auto \
  "$@"
