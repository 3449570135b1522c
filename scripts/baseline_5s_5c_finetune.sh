#!/usr/bin/env bash
# Fine-tuning; run baseline_pretrain.sh first, with the same seed. A "training episode" draws from the
# validation classes and tries all learning rates and decays. 1-shot: --n-shot 1 --save OTHER.
# Edit the flags below; flags given to this script override them. All others: python main.py --help
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2

run_main --mode train \
  --n-shot 5 \
  --episode 100 \
  --epoch 15 \
  --batch-size 25 \
  --bn-momentum 0.1 \
  --log-freq 10 \
  --val-freq 0 \
  --augment none \
  --pixels unit \
  --method finetune \
  --init-from logs-baseline-pretrain \
  --save logs-finetune \
  --resume auto \
  "$@"
