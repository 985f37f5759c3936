#!/usr/bin/env bash
# Train on a running Ray cluster, as a Ray job. Waits for the job and ends with the trainer's exit code.
#
#   export RAY_API_SERVER_ADDRESS=http://head-node:8265
#   RUN_FOLDER=/shared/runs launch/ray_job.sh configs/quickstart.yaml [key=value ...]
#
# WORKING_DIR  what is sent to the cluster (default: this directory, less what .gitignore names); it holds CONFIG.
# RUN_FOLDER   an absolute path on the cluster's storage: Ray deletes a job's working directory.
# PYTHON       the cluster's interpreter (default: python). It must find torch and pipetrgl's other dependencies; or
# RUNTIME_ENV  a JSON runtime environment that installs them, such as '{"pip": ["torch==2.13.0", "pydantic", ...]}'.
# Ctrl-C or SIGTERM stop the job: the trainer then has STOP_S seconds to write its checkpoint.
#
# Run here, Ray 2.60 on one node: a whole training (0) and a wrong config (2) by tests/launchers/test_ray_job.py; with a
# stand-in for the trainer its exit code 4, a missing interpreter (127), SIGTERM (130), no cluster (1). Never run: a
# cluster on other machines, RUNTIME_ENV with packages.
set -euo pipefail
config=${1:?usage: RUN_FOLDER=/shared/runs launch/ray_job.sh CONFIG [key=value ...]}
shift
: "${RUN_FOLDER:?an absolute path on storage that the cluster keeps}"
python=${PYTHON:-python}
job=pipetrgl-$(date -u +%Y%m%dT%H%M%S)-$RANDOM
# read by the process that stops the job; Ray's own patience is three seconds
default_env="{\"env_vars\": {\"RAY_JOB_STOP_WAIT_TIME_S\": \"${STOP_S:-60}\"}, \"excludes\": [\".git\"]}"

ray job submit --submission-id "$job" --working-dir "${WORKING_DIR:-.}" \
  --runtime-env-json "${RUNTIME_ENV:-$default_env}" \
  -- "$python" -m pipetrgl train "$config" launcher.name=ray run.folder="$RUN_FOLDER" "$@" &
client=$!
trap 'ended=no; ray job stop "$job" >&2 || true' INT TERM
# a trapped signal ends `wait` early, while the job still writes its checkpoint
until
  ended=yes code=0
  wait $client || code=$?
  [ $ended = yes ]
do :; done
# the client says 1 for every failure; Ray knows the trainer's own code, unless the job was stopped or never started
python3 - "$job" "$code" <<'PYTHON'
import sys

from ray.job_submission import JobSubmissionClient

job, code = sys.argv[1], int(sys.argv[2])
try:
    details = JobSubmissionClient().get_job_info(job)
except (RuntimeError, ConnectionError) as error:
    sys.exit(f"{job}: {error}")
if details.driver_exit_code is not None:
    code = details.driver_exit_code
elif details.status == "STOPPED":
    code = 130
print(f"{job}: {details.status}, exit code {code}")
sys.exit(code)
PYTHON
