"""What a config may not ask for with `train.order: end_to_end`: one loss, and torch's schedules over the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipetrgl.config.schema import Config


def faults(config: Config) -> list[str]:
    """Each as "field: what is wrong"."""
    spread = config.launcher.name != "serial" and config.pipeline.stages > 1
    return [*_everywhere(config), *(_over_workers(config) if spread else [])]


def _everywhere(config: Config) -> list[str]:
    train, pipeline, channel = config.train, config.pipeline, config.channel
    unfit = {
        "objective.name: '%s' is a loss of every stage; end_to_end has the task loss alone: vangl": (
            config.objective.name if config.objective.name != "vangl" else None
        ),
        "plan: %s is for stages that do not wait for gradients; write model.cuts": config.plan,
        "model.cuts: %s measures stages that do not wait for gradients; write the cuts": (
            config.model.cuts if config.model.cuts == "auto" else None
        ),
        "train.precision: %s needs one loss scale for all stages; use bf16": (
            train.precision if train.precision == "fp16" else None
        ),
        "train.on_nonfinite: %s leaves out the update of one stage, and the gradient is everybody's; use stop": (
            train.on_nonfinite if train.on_nonfinite == "skip" else None
        ),
        "pipeline.replicas: %s; a stage of end_to_end has one": (
            pipeline.replicas if max(pipeline.replica_counts) > 1 else None
        ),
        "pipeline.device: %s has no gradients to send back": (
            pipeline.device if pipeline.device == "emulated" else None
        ),
        "channel.codec: %s rounds activations, and gradients go back through them; use fp32": (
            channel.codec if channel.codec != "fp32" else None
        ),
    }
    found = [text % value for text, value in unfit.items() if value is not None]
    found += [
        f"channel.{name}: torch's schedules have links of their own, which are as fast as they are"
        for name in ("delay_s", "jitter_s")
        if getattr(channel, name) > 0
    ]
    if config.launcher.faults:
        found.append("launcher.faults: no failure is rehearsed in end_to_end")
    return found


def _over_workers(config: Config) -> list[str]:
    train, stages, launcher = config.train, config.pipeline.stages, config.launcher.name
    found = []
    if launcher in ("threads", "ray"):
        found.append(f"launcher.name: '{launcher}' cannot run end_to_end over workers; use local, torchrun or serial")
    if config.pipeline.device == "cuda":
        found.append("pipeline.device: end_to_end over workers runs on the CPU; on a GPU use launcher.name: serial")
    if train.batch % train.accumulate:
        found.append(
            f"train.batch: {train.batch} rows do not make {train.accumulate} equal micro-batches (train.accumulate), "
            "which torch's schedules need"
        )
    if not train.drop_last:
        found.append("train.drop_last: torch's schedules take whole batches only; set it to true")
    if train.schedule == "1f1b" and train.accumulate < stages:
        found.append(
            f"train.accumulate: {train.accumulate} given; 1f1b over {stages} stages needs at least {stages} "
            "micro-batches, or use train.schedule: gpipe"
        )
    return found
