#!/usr/bin/env bash
# Nearest neighbour on frozen features; run baseline_pretrain.sh first, with the same seed. Nothing is
# trained: one episode writes the checkpoint. Test it on any number of shots (--shots 1 5).
# Edit the flags below; flags given to this script override them. All others: python main.py --help
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2

run_main --mode train \
  --n-shot 5 \
  --episode 1 \
  --augment none \
  --pixels unit \
  --method nearest \
  --init-from logs-baseline-pretrain \
  --save logs-nearest \
  --resume auto \
  "$@"
