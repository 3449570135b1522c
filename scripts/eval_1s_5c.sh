#!/usr/bin/env bash
# Test the best checkpoint of train_1s_5c.sh on 5-way 1-shot episodes; --resume CKPT takes another.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
use_python requirements.txt

"$PYTHON" "$ROOT/main.py" --mode test \
  --save logs-1shot \
  --seed 719 \
  --data miniImagenet \
  --n-class 5 \
  --n-shot 1 \
  --n-eval 15 \
  --image-size 84 \
  --augment port \
  --episode-test 100 250 600 \
  --epoch 12 \
  --batch-size 5 \
  --bn-momentum 0.9 \
  --bn-eps 1e-3 \
  --input-size 4 \
  --hidden-size 20 \
  --bi-init -5 -4 \
  --precision fp32 \
  --lr 1e-3 \
  --grad-clip 0.25 \
  --n-workers 2 \
  "$@"
