#!/usr/bin/env bash
# 5-way 1-shot on Omniglot, in images of 28 px. The first run downloads it (torchvision, about 15 MB).
# Edit the flags below; flags given to this script override them. All others: python main.py --help
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2
use_python requirements.txt

# Write data/omniglot: 1,028 characters for training, 172 for validation, 423 for testing,
# with 20 drawings of each, enough for 1 support and 15 query images.
"$PYTHON" "$ROOT/data/prepare.py" omniglot

# No augmentation: crops, flips and colours turn one character into another.
run_main --mode train \
  --n-shot 1 \
  --n-eval 15 \
  --n-class 5 \
  --input-size 4 \
  --hidden-size 20 \
  --lr 1e-3 \
  --episode 20000 \
  --episode-val 100 \
  --epoch 12 \
  --batch-size 5 \
  --image-size 28 \
  --grad-clip 0.25 \
  --bn-momentum 0.9 \
  --bn-eps 1e-3 \
  --data omniglot \
  --pin-mem true \
  --log-freq 50 \
  --val-freq 1000 \
  --seed 719 \
  --augment none \
  --save logs-omniglot \
  --resume auto \
  "$@"
