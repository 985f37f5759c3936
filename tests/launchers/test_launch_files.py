"""The files in launch/: shell that parses, a manifest with the fields that KubeRay documents, options that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
# of RayJobSpec in KubeRay's ray-operator/apis/ray/v1/rayjob_types.go
RAY_JOB_FIELDS = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "clusterSelector",
    "deletionStrategy",
    "entrypoint",
    "entrypointNumCpus",
    "entrypointNumGpus",
    "entrypointResources",
    "jobId",
    "managedBy",
    "metadata",
    "rayClusterSpec",
    "runtimeEnvYAML",
    "shutdownAfterJobFinishes",
    "submissionMode",
    "submitterConfig",
    "submitterPodTemplate",
    "suspend",
    "ttlSecondsAfterFinished",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_launch_script_parses_and_stops_at_its_first_error(script: Path) -> None:
    parsed = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=30)
    assert (parsed.returncode, parsed.stderr) == (0, "")
    assert "\nset -euo pipefail\n" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize("script", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_a_launch_file_says_what_it_does_and_how_to_call_it(script: Path) -> None:
    head = re.match(r"(#.*\n)+", script.read_text(encoding="utf-8"))
    assert head is not None
    assert re.search(rf"^# +.*launch/{re.escape(script.name)}", head[0], re.MULTILINE)


def test_a_slurm_job_is_warned_and_may_be_queued_again() -> None:
    for script in LAUNCH.glob("*.sbatch"):
        options = re.findall(r"^#SBATCH (.+)$", script.read_text(encoding="utf-8"), re.MULTILINE)
        assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= set(options)


def test_the_kuberay_manifest_is_a_ray_job() -> None:
    manifest = yaml.safe_load((LAUNCH / "kuberay_rayjob.yaml").read_text(encoding="utf-8"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    spec = manifest["spec"]
    assert spec.keys() <= RAY_JOB_FIELDS
    assert spec["entrypoint"].startswith("python -m pipetrgl train /config/train.yaml launcher.name=ray ")
    assert yaml.safe_load(spec["runtimeEnvYAML"]).keys() == {"env_vars"}
    cluster = spec["rayClusterSpec"]
    groups: list[dict[str, Any]] = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all({"rayStartParams", "template"} <= group.keys() for group in groups)
    for worker in cluster["workerGroupSpecs"]:
        assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]


def test_every_pod_of_the_manifest_mounts_only_volumes_that_it_has() -> None:
    manifest = yaml.safe_load((LAUNCH / "kuberay_rayjob.yaml").read_text(encoding="utf-8"))
    cluster = manifest["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            assert container["resources"]["requests"].keys() <= container["resources"]["limits"].keys()


def test_the_runs_of_a_requeued_job_are_found_again() -> None:
    for script in LAUNCH.glob("*.sbatch"):
        assert 'run.name="slurm-$SLURM_JOB_ID" checkpoint.resume=auto "$@"' in script.read_text(encoding="utf-8")
