#!/usr/bin/env bash
# Train under torchrun: one process a stage.
#
#   one machine:     launch/torchrun.sh configs/quickstart.yaml
#   several:         NNODES=2 NPROC=2 RDZV=head-node:29400 launch/torchrun.sh configs/quickstart.yaml   (on every node)
#
# NNODES x NPROC must be pipeline.stages. Further arguments are key=value overrides.
set -euo pipefail
config=${1:?usage: launch/torchrun.sh CONFIG [key=value ...]}
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ -n "${RDZV:-}" ]; then
  where=(--nnodes "${NNODES:?}" --rdzv-backend c10d --rdzv-endpoint "$RDZV" --rdzv-id "${RDZV_ID:-pipetrgl}")
else
  where=(--standalone)
fi
exec torchrun "${where[@]}" --nproc-per-node "${NPROC:-4}" -m pipetrgl train "$config" "$@"
