#!/usr/bin/env bash
# Matching network with full context embeddings. The authors use 64 filters: --filters 64.
# Test one checkpoint on any number of shots (--shots 1 5).
# Edit the flags below; flags given to this script override them. All others: python main.py --help
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2

run_main --mode train \
  --n-shot 5 \
  --lr 1e-4 \
  --episode 75000 \
  --grad-clip 1000 \
  --bn-momentum 0.1 \
  --val-freq 5000 \
  --augment none \
  --pixels unit \
  --method matching-fce \
  --save logs-matching-fce \
  --resume auto \
  "$@"
