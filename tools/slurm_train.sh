#!/usr/bin/env bash
# Submit a training to SLURM:
#
#   NNODES=8 tools/slurm_train.sh PARTITION JOB CONFIG [any flag of tools/train.py]
#
# NNODES         number of nodes (1)
# GPUS_PER_NODE  (8)
# CPUS_PER_GPU   (8)
# TIME           limit, days-hours:minutes (3-00:00)
# GRACE          seconds before the limit at which the run saves its state and queues again (600)
# SBATCH_ARGS    further options of sbatch, such as "--account x --qos y"
# PYTHON         interpreter (python)
#
# Preempted or at the time limit, the job finishes the step, saves, and queues again; it goes on from its checkpoint.
# So does a job that SLURM requeues after the loss of a node; the loss of a process alone restarts the processes.
set -euo pipefail

if [ -z "${PE_SPATIAL_IN_JOB:-}" ]; then
  if [ $# -lt 3 ]; then
    echo "usage: tools/slurm_train.sh PARTITION JOB CONFIG [flags of tools/train.py]" >&2
    exit 2
  fi
  partition="$1" job="$2"
  shift 2
  gpus="${GPUS_PER_NODE:-8}"
  mkdir -p work_dirs
  # shellcheck disable=SC2086  # several options
  exec sbatch --partition "$partition" --job-name "$job" --nodes "${NNODES:-1}" --ntasks-per-node 1 --gpus-per-node "$gpus" \
    --cpus-per-task $((gpus * ${CPUS_PER_GPU:-8})) --time "${TIME:-3-00:00}" --requeue --open-mode append \
    --output "work_dirs/%x.%j.log" --signal "B:USR1@${GRACE:-600}" --export "ALL,PE_SPATIAL_IN_JOB=$gpus" \
    ${SBATCH_ARGS:-} "${BASH_SOURCE[0]}" "$@"
fi

# From here on: in the job, on its first node. sbatch runs a copy of this file, in the folder it was submitted from.
gpus="$PE_SPATIAL_IN_JOB"
unset PE_SPATIAL_IN_JOB
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR NNODES="$SLURM_NNODES" JOB="$SLURM_JOB_ID" PORT="$((20000 + SLURM_JOB_ID % 40000))"

told=
pass_on() {  # to the training processes themselves: torchrun would give them 30 seconds
  told=yes
  srun --overlap --ntasks-per-node 1 pkill -USR1 -f -- '-u tools/train.py' || true
}
trap pass_on USR1 TERM

srun --kill-on-bad-exit=1 tools/dist_train.sh "$1" "$gpus" "${@:2}" &
training=$!
while kill -0 "$training" 2>/dev/null; do
  status=0
  wait "$training" || status=$?
done
if [ -n "$told" ]; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
