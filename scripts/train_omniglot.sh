#!/usr/bin/env bash
# 5-way 1-shot on Omniglot, a second real data set: 28 pixels, tested on unseen characters.
# The first run downloads it (torchvision, about 15 MB).
# Edit the flags below; flags given to this script override them.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
use_python requirements.txt

# Write data/omniglot: 1,028 characters for training, 172 for validation, 423 for testing,
# with 20 drawings of each.
"$PYTHON" "$ROOT/data/prepare.py" omniglot

# No augmentation: crops, flips and colours turn one character into another.
# A character has only 20 drawings, enough for 1 support and 15 query images.
exec "$PYTHON" "$ROOT/main.py" --mode train \
  --save logs-omniglot \
  --resume auto \
  --seed 719 \
  --data-root "$ROOT/data/omniglot" \
  --n-class 5 \
  --n-shot 1 \
  --n-eval 15 \
  --image-size 28 \
  --filters 32 \
  --augment none \
  --pixels imagenet \
  --episode 20000 \
  --episode-val 100 \
  --epoch 12 \
  --batch-size 5 \
  --grad-divisor 0 \
  --shuffle pass \
  --bn-scale uniform \
  --bn-shift 0 \
  --bn-momentum 0.9 \
  --bn-eps 1e-3 \
  --adapt all \
  --input-size 4 \
  --hidden-size 20 \
  --lstm-init pytorch \
  --bf-init 4 6 \
  --bi-init -5 -4 \
  --precision fp32 \
  --lr 1e-3 \
  --lr-decay 0 \
  --meta-batch 1 \
  --grad-clip 0.25 \
  --n-workers 2 \
  --log-freq 50 \
  --val-freq 1000 \
  "$@"
