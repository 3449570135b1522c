#!/usr/bin/env bash
# The whole road on a fresh machine, without any download of data: environment, a data set of rendered characters in mini-ImageNet's
# layout, training, and a test on 20 classes never seen. The second time, what is there is used: it tests again.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
use_python requirements.txt

DATA=$ROOT/data/glyphs
RUN=$ROOT/logs-quickstart

"$PYTHON" "$ROOT/data/glyphs.py" --dest "$DATA"

if [ -e "$RUN-719/ckpts" ]; then
  echo "$RUN-719 is there: going on with it (to train anew, remove that folder)"
fi
# The recipe is the paper's but for what small characters ask: 32 px, no random crops, a larger first step, fewer episodes.
"$PYTHON" "$ROOT/main.py" --mode train \
  --data-root "$DATA" \
  --save "$RUN" \
  --resume auto \
  --image-size 32 \
  --augment none \
  --bi-init 0 0 \
  --episode 600 \
  --val-freq 200 \
  --log-freq 50
"$PYTHON" "$ROOT/main.py" --mode test --save "$RUN" --data-root "$DATA" --episode-test 250
