#!/usr/bin/env bash
# 5-way 5-shot from a pre-trained learner: run pretrain.sh first, in the same folder. Filters a hundred times as long
# (--filter-scale) and steps of half the gradient (--grad-divisor, --bi-init) train the empty classifier and hardly turn the filters.
# Edit the flags below; flags given to this script override them.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
use_python requirements.txt

exec "$PYTHON" "$ROOT/main.py" --mode train \
  --save logs-pretrained \
  --resume auto \
  --seed 719 \
  --data miniImagenet \
  --n-class 5 \
  --n-shot 5 \
  --n-eval 15 \
  --image-size 84 \
  --filters 32 \
  --augment none \
  --pixels unit \
  --episode 200 \
  --episode-val 100 \
  --epoch 8 \
  --batch-size 25 \
  --grad-divisor 1 \
  --shuffle episode \
  --bn-scale uniform \
  --bn-momentum 0.95 \
  --bn-eps 1e-3 \
  --fresh-stats true \
  --input-size 4 \
  --hidden-size 20 \
  --lstm-init authors \
  --bf-init 5 6 \
  --bi-init -0.1 0.1 \
  --precision fp32 \
  --start logs-pretrain-719 \
  --filter-scale 100 \
  --lr 1e-4 \
  --lr-decay 1 \
  --meta-batch 1 \
  --grad-clip 0.25 \
  --n-workers 2 \
  --log-freq 50 \
  --val-freq 100 \
  "$@"
