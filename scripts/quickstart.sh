#!/usr/bin/env bash
# A first try without downloading data: install missing packages, make a data set of rendered
# characters in mini-ImageNet's layout, train on it, and test on 20 unseen classes. A second call keeps
# the data and the finished training, and tests again.
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2
[ $# = 0 ] || fail "quickstart.sh takes no flags, but got $*; see scripts/train_5s_5c.sh for your own training"
use_python requirements.txt

DATA=$ROOT/data/glyphs
RUN=$ROOT/logs-quickstart

"$PYTHON" "$ROOT/data/glyphs.py" --dest "$DATA"

if [ -e "$RUN-719/ckpts" ]; then
  echo "$RUN-719 exists: continuing that training (delete the folder to start again)"
fi
# The default recipe with four changes for small characters: 32 pixels, no augmentation,
# larger first learning rates (--bi-init), fewer episodes.
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
