#!/usr/bin/env bash
# Train under torchrun: one process a stage.
#
#   one machine:     launch/torchrun.sh configs/quickstart.yaml
#   several:         NNODES=2 NPROC=2 RDZV=head-node:29400 launch/torchrun.sh configs/quickstart.yaml   (on every node)
#
# NNODES x NPROC must be the number of workers (pipeline.stages, or its replicas summed). Further arguments are key=value overrides. MAX_RESTARTS=3 starts all workers
# again after a failure, from the newest complete checkpoint.
# SIGTERM, SIGINT or SIGUSR1 ask every worker to stop at a step boundary; SIGKILL follows SHUTDOWN_S seconds later.
# torchrun itself then ends with exit code 1, whatever its workers' codes were.
set -euo pipefail
config=${1:?usage: launch/torchrun.sh CONFIG [key=value ...]}
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# in the environment, since a torchrun that does not know an option refuses it: such a torchrun dies of SIGUSR1
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export PET_SHUTDOWN_TIMEOUT=${SHUTDOWN_S:-60}
if [ -n "${RDZV:-}" ]; then
  where=(--nnodes "${NNODES:?}" --rdzv-backend c10d --rdzv-endpoint "$RDZV" --rdzv-id "${RDZV_ID:-pipetrgl}")
else
  where=(--standalone)
fi
exec torchrun "${where[@]}" --nproc-per-node "${NPROC:-4}" --max-restarts "${MAX_RESTARTS:-0}" \
  -m pipetrgl train "$config" "$@"
