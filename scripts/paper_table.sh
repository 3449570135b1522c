#!/usr/bin/env bash
# The LSTM's row of the paper's table 1: three seeds each of first_order in 5-shot, and of second_order
# in 5-shot and 1-shot, trained side by side on each GPU or on the CPU, then tested. --minutes M stops
# them with checkpoints after M minutes, and the same command resumes. Further flags go to main.py.
#   bash scripts/paper_table.sh [--minutes 12] [--data-root DIR ...]
set -euo pipefail
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/seeds.sh" 719 53 1 --per-gpu 9 \
  --recipe train_5s_5c_first_order,train_5s_5c_second_order,train_1s_5c_second_order "$@"
