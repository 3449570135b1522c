#!/usr/bin/env bash
# 5-way 1-shot, the paper's method with the second-order gradients that the paper leaves out. More flags
# differ from train_1s_5c_authors.sh: --hidden-size 1; --grad-divisor 1, so the mean gradient is not
# divided again; --ema, whose averaged weights are tested; 5 updates, flipped images and 40,000 episodes;
# and --final-stats, without which 5 updates lost 6 points in validation after 3,000 episodes.
# Edit the flags below; flags given to this script override them. All others: python main.py --help
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2

run_main --mode train \
  --n-shot 1 \
  --n-eval 15 \
  --n-class 5 \
  --input-size 4 \
  --hidden-size 1 \
  --lr 1e-3 \
  --episode 40000 \
  --episode-val 100 \
  --epoch 5 \
  --batch-size 5 \
  --image-size 84 \
  --grad-clip 0.25 \
  --bn-momentum 0.9 \
  --bn-eps 1e-3 \
  --data miniImagenet \
  --pin-mem true \
  --log-freq 50 \
  --val-freq 1000 \
  --seed 719 \
  --augment flip \
  --pixels unit \
  --shuffle episode \
  --lstm-init authors \
  --bf-init 4 5 \
  --grad-divisor 1 \
  --second-order true \
  --final-stats true \
  --ema 0.9995 \
  --save logs-1shot-second-order \
  --resume auto \
  "$@"
