#!/usr/bin/env bash
# The network of the paper's two simple baselines: a linear classifier of all training classes. The
# authors take 64 filters (--filters 64, then also in the scripts that start from it) and 64 images a
# batch; here it is 2 of each class, and 32 filters, the learner of the LSTM.
# Edit the flags below; flags given to this script override them. All others: python main.py --help
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
use_python requirements.txt

exec "$PYTHON" "$ROOT/main.py" --mode pretrain \
  --n-shot 1 \
  --n-eval 1 \
  --lr 1e-3 \
  --episode 30000 \
  --grad-clip 1000 \
  --augment none \
  --pixels unit \
  --classifier linear \
  --save logs-baseline-pretrain \
  --resume auto \
  "$@"
