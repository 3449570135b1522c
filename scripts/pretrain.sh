#!/usr/bin/env bash
# Pre-training for train_5s_5c_best.sh and train_1s_5c_best.sh: before it meta-learns, the learner classifies all
# training classes, two images of each in a batch (--n-shot and --n-eval). An "episode" is a batch. The gates start with the
# training that follows.
# Edit the flags below; flags given to this script override them.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
use_python requirements.txt

exec "$PYTHON" "$ROOT/main.py" --mode pretrain \
  --save logs-pretrain \
  --resume auto \
  --seed 719 \
  --data miniImagenet \
  --n-shot 1 \
  --n-eval 1 \
  --image-size 84 \
  --filters 32 \
  --augment mirror \
  --pixels unit \
  --episode 12000 \
  --bn-scale uniform \
  --bn-momentum 0.95 \
  --bn-eps 1e-3 \
  --precision fp32 \
  --lr 2e-3 \
  --lr-decay 1 \
  --grad-clip 1000 \
  --n-workers 2 \
  --log-freq 50 \
  --val-freq 1000 \
  "$@"
