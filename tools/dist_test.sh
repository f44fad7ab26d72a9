#!/usr/bin/env bash
# Evaluate on several GPUs of one node:
#
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [any flag of tools/test.py]
#
# PYTHON        interpreter (python)
set -euo pipefail
if [ $# -lt 3 ] || ! [[ $3 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: tools/dist_test.sh CONFIG CHECKPOINT GPUS [flags of tools/test.py]" >&2
  exit 2
fi
config="$1" checkpoint="$2" gpus="$3"
shift 3
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "$gpus" \
  "$(dirname "${BASH_SOURCE[0]}")/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
