#!/usr/bin/env bash
# Gradient descent with one learned step size from a learned initialisation (first-order MAML) in the
# LSTM's place. All else is as in train_5s_5c_authors.sh, but a step is at most the whole gradient.
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
  --method sgd \
  --save logs-sgd \
  --resume auto \
  "$@"
