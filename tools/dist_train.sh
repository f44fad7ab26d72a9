#!/usr/bin/env bash
# Train on several GPUs of one node, or of many:
#
#   tools/dist_train.sh CONFIG GPUS [any flag of tools/train.py]
#   NNODES=4 MASTER_ADDR=node0 tools/dist_train.sh CONFIG 8        the same line on each of the four nodes
#
# NNODES        number of nodes (1), or a range MIN:MAX within which nodes may come and go
# MASTER_ADDR   name or address of one of the nodes; PORT there (29500); JOB tells runs on that port apart
# MAX_RESTARTS  how often the loss of a process restarts all of them from the latest checkpoint (3)
# PYTHON        interpreter (python)
set -euo pipefail
if [ $# -lt 2 ] || ! [[ $2 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: tools/dist_train.sh CONFIG GPUS [flags of tools/train.py]" >&2
  exit 2
fi
config="$1" gpus="$2"
shift 2
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Else processes that restart look for the lost ones where torchrun's own store still has their addresses.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
rendezvous=(--standalone)
if [ "${NNODES:-1}" != 1 ]; then
  : "${MASTER_ADDR:?is the name or address of one of the nodes}"
  rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${PORT:-29500}" --rdzv-id "${JOB:-pe_spatial}")
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$gpus" \
  --max-restarts "${MAX_RESTARTS:-3}" "$(dirname "${BASH_SOURCE[0]}")/train.py" "$config" --launcher pytorch "$@"
