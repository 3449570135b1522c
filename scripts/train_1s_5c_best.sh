#!/usr/bin/env bash
# 5-way 1-shot from a pre-trained learner: run pretrain.sh first, in the same folder and with the same seed. The classifier
# alone adapts (--adapt), by steps of up to the whole gradient (--grad-divisor), of about a fifth of it at first (--bi-init).
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
  --episode 200 \
  --episode-val 300 \
  --epoch 8 \
  --batch-size 5 \
  --grad-divisor 1 \
  --shuffle episode \
  --bn-scale uniform \
  --bn-shift 0.3 \
  --bn-momentum 0.95 \
  --bn-eps 1e-3 \
  --adapt classifier \
  --input-size 4 \
  --hidden-size 20 \
  --lstm-init authors \
  --bf-init 5 6 \
  --bi-init -1.4 -1.2 \
  --precision fp32 \
  --start logs-pretrain \
  --lr 1e-4 \
  --lr-decay 1 \
  --meta-batch 1 \
  --grad-clip 0.25 \
  --n-workers 2 \
  --log-freq 50 \
  --val-freq 100 \
  "$@"
