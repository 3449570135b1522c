#!/usr/bin/env bash
#SBATCH --job-name=meta-lstm
#SBATCH --array=719,53
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.out
# Train and test a recipe under Slurm: each number of the array is a seed. From the repository:
#   sbatch [--array=1,2,3 --partition=NAME ...] scripts/slurm.sh [--recipe train_5s_5c] [flags of main.py]
# Two minutes before its time limit a job writes a checkpoint, stops and requeues itself; after
# preemption Slurm requeues it. Several GPUs (--gpus-per-node=8 --nodes=2) share each update's
# episodes, one per GPU unless --meta-batch says otherwise.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?only sbatch runs this script}" # Slurm runs a copy of it from elsewhere
[ -f scripts/env.sh ] || { echo "error: $PWD is not the repository; submit from there" >&2 && exit 2; }
# shellcheck source=env.sh
source scripts/env.sh
recipe=train_5s_5c
if [[ ${1-} == --recipe=* ]]; then set -- --recipe "${1#*=}" "${@:2}"; fi
if [ "${1-}" = --recipe ]; then recipe=${2-} && shift $(($# > 1 ? 2 : 1)); fi
find_recipe "$recipe"
use_python requirements.txt

seed=${SLURM_ARRAY_TASK_ID:-719} nodes=${SLURM_JOB_NUM_NODES:-1} gpus=${SLURM_GPUS_ON_NODE:-1}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it from sbatch
stopped='' child=''

stop() {
  stopped=$1
  [ -z "$child" ] || scancel --signal=TERM "$SLURM_JOB_ID" || true # to the training; srun would kill it
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

run() { # COMMAND: wait for its end, even when a signal arrives
  local status=0
  if [ -z "$stopped" ]; then
    "$@" &
    child=$!
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child" || status=$?; done
    child=''
  fi
  if [ "$stopped" = USR1 ]; then
    echo "the time limit is near: requeueing"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  if [ -n "$stopped" ] || [ "$status" != 0 ]; then exit $((status ? status : 143)); fi
}

ranks=()
if [ $((nodes * gpus)) -gt 1 ]; then
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  ranks=("$PYTHON" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$gpus" --no-python
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 20000))")
  set -- --meta-batch $((nodes * gpus)) "$@"
fi
run srun --ntasks-per-node=1 --kill-on-bad-exit=1 ${ranks[@]+"${ranks[@]}"} "$train" --seed "$seed" "$@"
if [ -n "$test" ]; then run srun --nodes=1 --ntasks=1 "$test" --seed "$seed" "$@"; fi
