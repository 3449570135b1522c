#!/usr/bin/env bash
# 5-way 5-shot, the paper's method with the second-order gradients that the paper leaves out. More flags
# differ from train_5s_5c_authors.sh: --epoch 5, as in the paper's text; --hidden-size 1; --grad-divisor 1,
# so the mean gradient is not divided again; random flips; --ema, whose averaged weights are tested; and
# 15,000 episodes.
# Edit the flags below; flags given to this script override them. All others: python main.py --help
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2

run_main --mode train \
  --n-shot 5 \
  --n-eval 15 \
  --n-class 5 \
  --input-size 4 \
  --hidden-size 1 \
  --lr 1e-3 \
  --episode 15000 \
  --episode-val 100 \
  --epoch 5 \
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
  --augment flip \
  --pixels unit \
  --shuffle episode \
  --lstm-init authors \
  --bf-init 4 5 \
  --grad-divisor 1 \
  --second-order true \
  --ema 0.9995 \
  --save logs-second-order \
  --resume auto \
  "$@"
