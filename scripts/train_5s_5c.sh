#!/usr/bin/env bash
# 5-way 5-shot, the recipe of the PyTorch port of 2019.
# Edit the flags below; flags given to this script override them. All others: python main.py --help
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2

run_main --mode train \
  --n-shot 5 \
  --n-eval 15 \
  --n-class 5 \
  --input-size 4 \
  --hidden-size 20 \
  --lr 1e-3 \
  --episode 50000 \
  --episode-val 100 \
  --epoch 8 \
  --batch-size 25 \
  --image-size 84 \
  --grad-clip 0.25 \
  --bn-momentum 0.95 \
  --bn-eps 1e-3 \
  --data miniImagenet \
  --pin-mem true \
  --log-freq 50 \
  --val-freq 1000 \
  --seed 719 \
  --save logs \
  --resume auto \
  "$@"
