#!/usr/bin/env bash
# Prototypical network. Test one checkpoint on any number of shots (--shots 1 5).
# Edit the flags below; flags given to this script override them. All others: python main.py --help
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2

run_main --mode train \
  --n-shot 5 \
  --lr 1e-3 \
  --episode 50000 \
  --grad-clip 1000 \
  --bn-momentum 0.1 \
  --augment none \
  --pixels unit \
  --method protonet \
  --save logs-protonet \
  --resume auto \
  "$@"
