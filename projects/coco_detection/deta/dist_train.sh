#!/usr/bin/env bash
# Train a stage with its total batch on one or more nodes, by torchrun:
#
#   projects/coco_detection/deta/dist_train.sh STAGE GPUS [flags of tools/train.py]
#   NNODES=8 MASTER_ADDR=node0 projects/coco_detection/deta/dist_train.sh stage3_coco_1728 8    the same on each node
#
# STAGE is a config of this folder without its .py, GPUS those of one node. For the other variables see tools/dist_train.sh,
# for flags tools/train.py --help; run it in the folder that contains tools/.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: projects/coco_detection/deta/dist_train.sh STAGE GPUS [flags of tools/train.py]" >&2
  exit 2
fi
here="$(dirname "${BASH_SOURCE[0]}")" stage="$1" gpus="$2"
shift 2
steps="$("${PYTHON:-python}" "$here/accumulation.py" "$here/$stage.py" $((gpus * ${NNODES:-1})))"
exec tools/dist_train.sh "$here/$stage.py" "$gpus" --cfg-options optim_wrapper.accumulative_counts="$steps" "$@"
