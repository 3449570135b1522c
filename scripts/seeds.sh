#!/usr/bin/env bash
# Train a recipe with several seeds, test each, and print the table: one seed after the other, or,
# where there are GPUs, one seed on each at a time. Stopped or killed, the same command continues;
# what is finished is skipped. Further flags go to main.py, for training and testing.
#   bash scripts/seeds.sh 719 53 1 [--recipe train_5s_5c_authors] [--data-root DIR ...]
# Before train_5s_5c_best comes --recipe pretrain, which tests nothing.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

recipe=train_5s_5c save='' seeds=() flags=() lanes=()
while [[ ${1-} =~ ^[0-9]+$ ]]; do seeds+=("$1") && shift; done
[ ${#seeds[@]} -gt 0 ] || fail "no seeds given; for example: bash scripts/seeds.sh 719 53"
while [ $# -gt 0 ]; do
  case $1 in
    --recipe) recipe=${2-} && shift $(($# > 1 ? 2 : 1)) && continue ;;
    --recipe=*) recipe=${1#*=} && shift && continue ;;
    --mode* | --seed* | --resume*) fail "${1%%=*}: seeds.sh sets this flag itself; leave it out" ;;
    --save) save=${2-} ;;
    --save=*) save=${1#*=} ;;
    --cpu | --gpu*) lanes=('') ;; # no choice is left
  esac
  flags+=("$1") && shift
done
train=$ROOT/scripts/$recipe.sh test=$ROOT/scripts/eval_${recipe#train_}.sh
if [ "$recipe" = pretrain ]; then test=''; fi
for file in "$train" ${test:+"$test"}; do [ -f "$file" ] || fail "--recipe $recipe: there is no $file"; done
save=${save:-$(sed -n 's/^  --save \(.*\) \\$/\1/p' "$train")}

use_python requirements.txt
if [ ${#lanes[@]} -eq 0 ]; then # a lane is a GPU, by its name in CUDA_VISIBLE_DEVICES
  count=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') || fail "PyTorch cannot be loaded"
  names=${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((count - 1)))}
  IFS=, read -r -a lanes <<<"$names"
  lanes=("${lanes[@]:0:count < ${#seeds[@]} ? count : ${#seeds[@]}}")
  [ ${#lanes[@]} -gt 0 ] || lanes=('')
fi

one() { # SEED: train and test it
  local folder=$save-$1
  bash "$train" "${flags[@]}" --seed "$1" || return
  [ -n "$test" ] || return 0
  if [ "$folder/results.json" -nt "$folder/ckpts/meta-learner-last.pth.tar" ]; then
    echo "$folder: tested already (remove its results.json to test it again)"
  else
    bash "$test" "${flags[@]}" --seed "$1"
  fi
}

lane() { # NUMBER: its share of the seeds, whatever becomes of the others; 0, or how the first failure ended
  local k status=0 failed=0
  trap 'exit 143' TERM # after the training, which the signal has reached, too, and which writes a snapshot
  if [ ${#lanes[@]} -gt 1 ]; then
    export CUDA_VISIBLE_DEVICES=${lanes[$1]} TQDM_DISABLE=1
    exec >/dev/null
  fi
  for ((k = $1; k < ${#seeds[@]}; k += ${#lanes[@]})); do
    if [ ${#lanes[@]} -gt 1 ]; then echo "seed ${seeds[k]}, GPU ${lanes[$1]}: see $save-${seeds[k]}/console.log" >&2; fi
    one "${seeds[k]}" || { status=$? && failed=$((failed ? failed : status)); }
  done
  return "$failed"
}

set -m # each lane is a process group of its own, which a signal reaches as a whole
pids=() failed=0
# shellcheck disable=SC2317  # the traps call it
stop() {
  trap - INT TERM HUP # a second one ends this script at once
  for pid in "${pids[@]}"; do kill -TERM -- "-$pid" 2>/dev/null || true; done
  wait
  exit $((128 + $1))
}
trap 'stop 2' INT
trap 'stop 15' TERM
trap 'stop 1' HUP
for n in "${!lanes[@]}"; do
  lane "$n" &
  pids+=($!)
done
for pid in "${pids[@]}"; do
  wait "$pid" || { status=$? && failed=$((failed ? failed : status)); }
done
trap - INT TERM HUP
[ -n "$test" ] || exit "$failed"
bash "$ROOT/scripts/results.sh" "${seeds[@]/#/$save-}" || failed=$((failed ? failed : $?))
exit "$failed"
