#!/usr/bin/env bash
# Trains the meta-learner on Omniglot, a second real data set: 5-way 1-shot, 28 pixels, whole characters held out.
# The first run downloads it (torchvision, some 15 MB). Edit the flags below, or give others: they come last and win.
#   bash scripts/train_omniglot.sh [--episode 2000 ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_python requirements.txt

# 1,028 characters for training, 172 for validation, 423 for testing, 20 drawings of each -> data/omniglot
"$PYTHON" "$ROOT/data/prepare.py" omniglot

# no augmentation: its crops, flips and colours make other characters of characters
# n-eval 15: a character has only 20 drawings
"$PYTHON" "$ROOT/main.py" --mode train \
  --save logs-omniglot \
  --resume auto \
  --data-root "$ROOT/data/omniglot" \
  --image-size 28 \
  --augment none \
  --n-class 5 \
  --n-shot 1 \
  --n-eval 15 \
  --epoch 12 \
  --batch-size 5 \
  --episode 20000 \
  --episode-val 100 \
  --val-freq 1000 \
  --lr 1e-3 \
  --grad-clip 0.25 \
  --bn-momentum 0.9 \
  --bn-eps 1e-3 \
  --input-size 4 \
  --hidden-size 20 \
  --seed 719 \
  "$@"
