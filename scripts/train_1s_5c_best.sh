#!/usr/bin/env bash
# 5-way 1-shot, beyond the paper: begins with the 5-shot meta-learner in results/, whose steps it keeps (--grad-divisor 25);
# the learning rate falls to 0 in the second half.
# Edit the flags below; flags given to this script override them.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
use_python requirements.txt

exec "$PYTHON" "$ROOT/main.py" --mode train \
  --save logs-best-1shot \
  --resume auto \
  --seed 719 \
  --data miniImagenet \
  --n-class 5 \
  --n-shot 1 \
  --n-eval 15 \
  --image-size 84 \
  --filters 32 \
  --augment none \
  --pixels unit \
  --episode 8000 \
  --episode-val 100 \
  --epoch 8 \
  --batch-size 5 \
  --grad-divisor 25 \
  --shuffle episode \
  --bn-scale uniform \
  --bn-shift 0 \
  --bn-momentum 0.95 \
  --bn-eps 1e-3 \
  --adapt all \
  --input-size 4 \
  --hidden-size 20 \
  --lstm-init authors \
  --bf-init 4 5 \
  --bi-init -5 -4 \
  --precision fp32 \
  --start "$ROOT/results/miniImagenet-5s5c-best-719/meta-learner.pth.tar" \
  --lr 5e-4 \
  --lr-decay 0.5 \
  --meta-batch 1 \
  --grad-clip 0.25 \
  --n-workers 2 \
  --log-freq 50 \
  --val-freq 1000 \
  "$@"
