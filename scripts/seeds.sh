#!/usr/bin/env bash
# Train a recipe with several seeds, test each, and print the table: one seed after the other, or,
# where there are GPUs, one seed on each at a time. If it is stopped or killed, the same command
# resumes; finished seeds are skipped. Further flags go to main.py, for training and testing.
#   bash scripts/seeds.sh 719 53 1 [--recipe train_5s_5c_authors] [--data-root DIR ...]
# Before --recipe train_5s_5c_pretrained, run --recipe pretrain, which tests nothing.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

recipe=train_5s_5c save='' seeds=() flags=() gpus=()
while [[ ${1-} =~ ^[0-9]+$ ]]; do seeds+=("$1") && shift; done
[ ${#seeds[@]} -gt 0 ] || fail "no seeds given; for example: bash scripts/seeds.sh 719 53"
while [ $# -gt 0 ]; do
  case $1 in
    --recipe) recipe=${2-} && shift $(($# > 1 ? 2 : 1)) && continue ;;
    --recipe=*) recipe=${1#*=} && shift && continue ;;
    --mode* | --seed* | --resume*) fail "${1%%=*}: seeds.sh sets this flag itself; leave it out" ;;
    --save) save=${2-} ;;
    --save=*) save=${1#*=} ;;
    --cpu | --gpu*) gpus=('') ;; # the flag chooses the device
  esac
  flags+=("$1") && shift
done
train=$ROOT/scripts/$recipe.sh test=$ROOT/scripts/eval_${recipe#train_}.sh
if [ "$recipe" = pretrain ]; then test=''; fi
for file in "$train" ${test:+"$test"}; do [ -f "$file" ] || fail "--recipe $recipe: there is no $file"; done
save=${save:-$(sed -n 's/^  --save \(.*\) \\$/\1/p' "$train")}

use_python requirements.txt
if [ ${#gpus[@]} -eq 0 ]; then # names for CUDA_VISIBLE_DEVICES; '' without a GPU
  count=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') || fail "PyTorch cannot be loaded"
  names=${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((count - 1)))}
  IFS=, read -r -a gpus <<<"$names"
  gpus=("${gpus[@]:0:count < ${#seeds[@]} ? count : ${#seeds[@]}}")
  [ ${#gpus[@]} -gt 0 ] || gpus=('')
fi

train_and_test() { # SEED
  local folder=$save-$1
  bash "$train" "${flags[@]}" --seed "$1" || return
  [ -n "$test" ] || return 0
  if [ "$folder/results.json" -nt "$folder/ckpts/meta-learner-last.pth.tar" ]; then
    echo "$folder: tested already (remove its results.json to test it again)"
  else
    bash "$test" "${flags[@]}" --seed "$1"
  fi
}

worker() { # NUMBER of a GPU: every n-th seed; returns the first failure's status, or 0
  local k status=0 failed=0
  trap 'exit 143' TERM # the training receives the signal, too, and writes a snapshot first
  if [ ${#gpus[@]} -gt 1 ]; then
    export CUDA_VISIBLE_DEVICES=${gpus[$1]} TQDM_DISABLE=1
    exec >/dev/null
  fi
  for ((k = $1; k < ${#seeds[@]}; k += ${#gpus[@]})); do
    if [ ${#gpus[@]} -gt 1 ]; then echo "seed ${seeds[k]}, GPU ${gpus[$1]}: see $save-${seeds[k]}/console.log" >&2; fi
    train_and_test "${seeds[k]}" || { status=$? && failed=$((failed ? failed : status)); }
  done
  return "$failed"
}

set -m # each worker is a process group, which one signal reaches as a whole
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
for n in "${!gpus[@]}"; do
  worker "$n" &
  pids+=($!)
done
for pid in "${pids[@]}"; do
  wait "$pid" || { status=$? && failed=$((failed ? failed : status)); }
done
trap - INT TERM HUP
[ -n "$test" ] || exit "$failed"
bash "$ROOT/scripts/results.sh" "${seeds[@]/#/$save-}" || failed=$((failed ? failed : $?))
exit "$failed"
