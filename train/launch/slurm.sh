#!/bin/bash
# Train on several nodes under Slurm, and go on after a time limit, a preemption or a dead node:
#
#     sbatch --nodes 4 train/launch/slurm.sh --config ascend_t2i_128 --data.path /shared/shards
#
# Set partition, account and time limit on sbatch's command line or here, and as many tasks as GPUs.
# `--train.out` must lie on a file system that all nodes share, and so must the checkout and its .venv
# (or set PYTHON).
#SBATCH --job-name=fastdiff
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=fastdiff-%j.log
# Two minutes before the limit this script gets SIGUSR1, passes it on to every rank, which saves and
# exits with 0, and puts the job back into the queue.
#SBATCH --signal=B:USR1@120
set -euo pipefail

export PYTHON=${PYTHON:-.venv/bin/python} SCRIPT=${SCRIPT:-train/t2i.py}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

requeue=0
trap 'requeue=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 # the tasks, not this script

# A task a rank, without a launcher between: signals reach it, and one that dies ends the others.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  exec "$PYTHON" "$SCRIPT" "$@"' rank "$@" &
job=$!
while kill -0 "$job" 2>/dev/null; do
  wait "$job" || true # a signal ends the wait, not the job
done
wait "$job" && status=0 || status=$?

if [ "$requeue" = 1 ] && [ "$status" = 0 ]; then
  scontrol requeue "$SLURM_JOB_ID" # the same command goes on from the checkpoint
fi
exit "$status"
