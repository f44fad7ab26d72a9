#!/usr/bin/env bash
# Submit a stage to SLURM with its total batch:
#
#   NNODES=8 projects/coco_detection/deta/slurm_train.sh PARTITION STAGE [flags of tools/train.py]
#
# STAGE is a config of this folder without its .py, and the name of the job. For the other variables see
# tools/slurm_train.sh, for flags tools/train.py --help; run it in the folder that contains tools/.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: projects/coco_detection/deta/slurm_train.sh PARTITION STAGE [flags of tools/train.py]" >&2
  exit 2
fi
here="$(dirname "${BASH_SOURCE[0]}")" partition="$1" stage="$2"
shift 2
steps="$("${PYTHON:-python}" "$here/accumulation.py" "$here/$stage.py" $((${GPUS_PER_NODE:-8} * ${NNODES:-1})))"
exec tools/slurm_train.sh "$partition" "$stage" "$here/$stage.py" \
  --cfg-options optim_wrapper.accumulative_counts="$steps" "$@"
