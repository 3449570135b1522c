#!/usr/bin/env bash
# Train and test recipes with several seeds, and print the table. Commas join several recipes. Each
# GPU, or the CPU, trains one run at a time, or N side by side with --per-gpu N. --minutes M stops all
# with checkpoints after M minutes. The same command resumes what was stopped or killed, and skips
# finished seeds. Further flags go to main.py, for training and testing.
#   bash scripts/seeds.sh 719 53 1 [--recipe train_5s_5c_authors] [--per-gpu N] [--data-root DIR ...]
# Before --recipe train_5s_5c_pretrained, run --recipe pretrain, which tests nothing.
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2

recipes=train_5s_5c per_gpu=1 minutes='' save='' seeds=() flags=() gpus=()
while [[ ${1-} =~ ^0*([0-9]+)$ ]]; do seeds+=("${BASH_REMATCH[1]}") && shift; done
[ ${#seeds[@]} -gt 0 ] || fail "no seeds given; for example: bash scripts/seeds.sh 719 53"
while [ $# -gt 0 ]; do
  if [[ $1 =~ ^--(recipe|per-gpu|minutes|save)$ ]]; then # "--flag value" -> "--flag=value"
    set -- "$1=${2-}" "${@:3}"
  fi
  case $1 in
    --recipe=*) recipes=${1#*=} && shift && continue ;;
    --per-gpu=*) per_gpu=${1#*=} && shift && continue ;;
    --minutes=*)
      [[ $1 =~ ^--minutes=0*([0-9]{1,6})$ ]] || fail "--minutes ${1#*=}: must be a whole number up to 999999"
      minutes=${BASH_REMATCH[1]} && shift && continue
      ;;
    --save=*) save=${1#*=} && save=${save/#'~/'/"${HOME-}/"} ;; # as main.py does
    --mode* | --seed* | --resume*) fail "${1%%=*}: seeds.sh sets this flag itself; leave it out" ;;
    --cpu | --gpu*) gpus=('') ;; # the flag chooses the device
  esac
  flags+=("$1") && shift
done
[[ $per_gpu =~ ^[1-9][0-9]?$ ]] || fail "--per-gpu $per_gpu: must be a number from 1 to 99"
IFS=, read -r -a recipes <<<"$recipes"
[ -z "$save" ] || [ ${#recipes[@]} = 1 ] || fail "--save $save: several recipes need a folder each; leave it out"
jobs=() folders=() # "RECIPE SEED FOLDER"; the folders of tested runs
for recipe in "${recipes[@]:-}"; do
  find_recipe "$recipe"
  prefix=${save:-$(sed -n 's/^  --save \(.*\) \\$/\1/p' "$train")}
  for seed in "${seeds[@]}"; do
    [[ " ${jobs[*]-} " != *" $recipe $seed $prefix-$seed "* ]] || continue # named twice
    jobs+=("$recipe $seed $prefix-$seed")
    [ -z "$test" ] || folders+=("$prefix-$seed")
  done
done

use_python requirements.txt
if [ ${#gpus[@]} -eq 0 ]; then # names for CUDA_VISIBLE_DEVICES; '' without a GPU
  count=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') || fail "PyTorch cannot be loaded"
  names=${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((count - 1)))}
  IFS=, read -r -a gpus <<<"$names"
  gpus=("${gpus[@]:0:count}")
  [ ${#gpus[@]} -gt 0 ] || gpus=('')
fi
slots=() # each GPU per_gpu times, but no more than there are jobs
for ((n = 0; n < per_gpu; n++)); do slots+=("${gpus[@]}"); done
slots=("${slots[@]:0:${#jobs[@]}}")
if [ "$per_gpu" -gt 1 ]; then # they share the processor, too
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + ${#slots[@]} - 1) / ${#slots[@]}))}
fi

train_and_test() { # RECIPE SEED FOLDER
  bash "$ROOT/scripts/$1.sh" ${flags[@]+"${flags[@]}"} --seed "$2" || return
  [ "$1" != pretrain ] || return 0
  if [ "$3/results.json" -nt "$3/ckpts/meta-learner-last.pth.tar" ]; then
    echo "$3: tested already (remove its results.json to test it again)"
  else
    bash "$ROOT/scripts/eval_${1#train_}.sh" ${flags[@]+"${flags[@]}"} --seed "$2"
  fi
}

worker() { # NUMBER of a slot: every n-th job; returns the first failure's status, or 0
  local k recipe seed folder status=0 failed=0 device=${slots[$1]}
  trap 'exit 143' TERM # the training receives the signal, too, and writes a checkpoint first
  if [ ${#slots[@]} -gt 1 ]; then
    if [ -n "$device" ]; then export CUDA_VISIBLE_DEVICES=$device; fi
    export TQDM_DISABLE=1
    exec >/dev/null
  fi
  for ((k = $1; k < ${#jobs[@]}; k += ${#slots[@]})); do
    read -r recipe seed folder <<<"${jobs[k]}"
    if [ ${#slots[@]} -gt 1 ]; then echo "seed $seed${device:+, GPU $device}: see $folder/console.log" >&2; fi
    train_and_test "$recipe" "$seed" "$folder" || { status=$? && failed=$((failed ? failed : status)); }
  done
  return "$failed"
}

# Kernels of several processes run on a GPU at the same time only under its MPS server.
mps() { nvidia-cuda-mps-control "$@" >/dev/null 2>&1; }
if [ "$per_gpu" -gt 1 ] && [ -n "${gpus[0]}" ] && [ -z "${CUDA_VISIBLE_DEVICES+set}" ] &&
  [ ! -e "${CUDA_MPS_PIPE_DIRECTORY:-/tmp/nvidia-mps}/control" ] && command -v nvidia-cuda-mps-control >/dev/null; then
  CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d)
  export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
  trap 'mps <<<quit || true' EXIT
  if ! { mps -d && "$PYTHON" -c 'import torch; torch.zeros(1, device="cuda")' 2>/dev/null; }; then
    mps <<<quit || true
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
  fi
fi

set -m # each worker is a process group, which one signal reaches as a whole
pids=() failed=0 timer=''
# shellcheck disable=SC2317  # the traps call it
stop() {
  trap - INT TERM HUP # a second one ends this script at once
  for pid in "${pids[@]}" $timer; do kill -TERM -- "-$pid" 2>/dev/null || true; done
  wait
  exit $((128 + $1))
}
trap 'stop 2' INT
trap 'stop 15' TERM
trap 'stop 1' HUP
for n in "${!slots[@]}"; do
  worker "$n" &
  pids+=($!)
done
if [ -n "$minutes" ]; then
  (sleep $((minutes * 60)) && for pid in "${pids[@]}"; do kill -TERM -- "-$pid" || true; done) 2>/dev/null &
  timer=$!
  disown # no word about its end
fi
for pid in "${pids[@]}"; do
  wait "$pid" || { status=$? && failed=$((failed ? failed : status)); }
done
trap - INT TERM HUP
if [ -n "$timer" ] && ! kill -TERM -- "-$timer" 2>/dev/null; then
  echo "stopped after $minutes minutes; the same command resumes" >&2
fi
tested=()
for folder in "${folders[@]}"; do
  if [ "$failed" = 0 ] || [ -f "$folder/results.json" ]; then tested+=("$folder"); fi
done
if [ ${#tested[@]} -gt 0 ]; then
  bash "$ROOT/scripts/results.sh" "${tested[@]}" || failed=$((failed ? failed : $?))
fi
exit "$failed"
