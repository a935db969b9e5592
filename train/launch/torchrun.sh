#!/bin/bash
# Train on several nodes by torchrun, this command on each of them:
#
#     NODES=4 HEAD=node0 train/launch/torchrun.sh --config ascend_t2i_128 --data.path /shared/shards
#
# On one machine NODES and HEAD can stay away. A node that dies ends the others' ranks; up to
# RESTARTS times torchrun starts them again, and they go on from the newest checkpoint.
set -euo pipefail

PYTHON=${PYTHON:-.venv/bin/python}
SCRIPT=${SCRIPT:-train/t2i.py}
RANKS=${RANKS:-gpu}

exec "$PYTHON" -m torch.distributed.run \
  --nnodes "${NODES:-1}" --nproc-per-node "$RANKS" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-id "${ID:-fastdiff}" --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29400}" \
  "$SCRIPT" "$@"
