#!/usr/bin/env bash
# 5-way 5-shot, beyond the paper: a linear head on frozen features. Run pretrain.sh first, in the
# same working directory and with the same seed. A step is at most the whole gradient
# (--grad-divisor), and about two thirds of it at the start (--bi-init).
# Edit the flags below; flags given to this script override them. All others: python main.py --help
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2

run_main --mode train \
  --n-shot 5 \
  --n-eval 15 \
  --n-class 5 \
  --input-size 4 \
  --hidden-size 20 \
  --lr 1e-4 \
  --episode 200 \
  --episode-val 300 \
  --epoch 8 \
  --batch-size 25 \
  --image-size 84 \
  --grad-clip 0.25 \
  --bn-momentum 0.95 \
  --bn-eps 1e-3 \
  --data miniImagenet \
  --pin-mem true \
  --log-freq 50 \
  --val-freq 100 \
  --seed 719 \
  --method linear-head \
  --init-from logs-pretrain \
  --bn-shift 0.3 \
  --grad-divisor 1 \
  --lr-decay 1 \
  --augment none \
  --pixels unit \
  --shuffle episode \
  --lstm-init authors \
  --bf-init 5 6 \
  --bi-init 0.5 0.7 \
  --save logs-pretrained \
  --resume auto \
  "$@"
