#!/usr/bin/env bash
# Pre-training for train_5s_5c_pretrained.sh and train_1s_5c_pretrained.sh: the learner classifies
# all training classes. Each "episode" is a batch with n-shot + n-eval images of each class.
# Edit the flags below; flags given to this script override them. All others: python main.py --help
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2

run_main --mode pretrain \
  --n-shot 1 \
  --n-eval 1 \
  --lr 2e-3 \
  --episode 12000 \
  --image-size 84 \
  --grad-clip 1000 \
  --bn-momentum 0.95 \
  --bn-eps 1e-3 \
  --data miniImagenet \
  --pin-mem true \
  --log-freq 50 \
  --val-freq 1000 \
  --seed 719 \
  --augment flip \
  --pixels unit \
  --lr-decay 1 \
  --save logs-pretrain \
  --resume auto \
  "$@"
