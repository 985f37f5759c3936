"""What the sections of a config must agree on: every rule that no section can check alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipetrgl.config import end_to_end

if TYPE_CHECKING:
    from pipetrgl.config.schema import Config


def faults(config: Config) -> list[str]:
    """Each as "field: what is wrong"."""
    return [
        *_kernels(config),
        *_text(config),
        *_stages(config),
        *_faults_to_rehearse(config),
        *(_cache(config) if config.train.cache != "none" else []),
        *(_replay(config) if config.train.order == "replay" else []),
        *(end_to_end.faults(config) if config.train.order == "end_to_end" else []),
        *(_emulated(config) if config.pipeline.device == "emulated" else []),
    ]


def _kernels(config: Config) -> list[str]:
    train, optim, found = config.train, config.optim, []
    if train.channels_last and config.model.name in ("mlp", "gpt"):
        found.append(f"train.channels_last: model.name: {config.model.name} has no maps to lay out")
    if train.compile and config.pipeline.batch_norm == "synchronised":
        found.append("train.compile: not with pipeline.batch_norm: synchronised, whose sums cannot be traced")
    if optim.fused and train.precision == "fp16" and optim.name == "sgd" and optim.momentum > 0:
        found.append(
            "optim.fused: not for sgd with momentum and train.precision: fp16; where the loss scale leaves out the "
            "first update, torch's fused SGD goes on with a momentum that it never set; use bf16, or adam or adamw"
        )
    return found


def _text(config: Config) -> list[str]:
    data, model, objective, found = config.data.name, config.model.name, config.objective.name, []
    if (data == "text") != (model == "gpt"):
        what = "text, which only gpt reads" if data == "text" else f"{data}, which are images; gpt reads text"
        found.append(f"model.name: '{model}' with data.name: {what}")
    if data == "text" and objective in ("predsim", "infopro"):
        found.append(f"objective.name: '{objective}' is defined for images, not for text")
    return found


def _stages(config: Config) -> list[str]:
    stages, cuts, found = config.pipeline.stages, config.model.cuts, []
    ray = config.launcher.ray
    one_a_stage: dict[str, object] = {
        "objective.transport.tau": config.objective.transport.tau,
        "pipeline.replicas": config.pipeline.replicas,
        **{f"launcher.ray.{name}": getattr(ray, name) for name in ("cpus", "gpus", "resources", "labels")},
    }
    found += [
        f"{field}: {len(values)} given; pipeline.stages = {stages} needs one a stage"
        for field, values in one_a_stage.items()
        if isinstance(values, list) and len(values) != stages
    ]
    if isinstance(cuts, list):
        named = bool(cuts) and isinstance(cuts[0], str)
        expected = stages - 1 if named else stages
        if len(cuts) != expected:
            what = "first blocks, one of each later stage" if named else "counts, one a stage"
            found.append(f"model.cuts: {len(cuts)} given; pipeline.stages = {stages} needs {expected} {what}")
    if cuts == "auto" and config.checkpoint.resume == "auto":
        found.append(
            "model.cuts: auto may find other cuts each time, so checkpoint.resume: auto would not find its run "
            "again; write a plan with `pipetrgl plan` and use that"
        )
    train, needed = config.train, config.pipeline.least_rows
    if train.batch < needed * train.accumulate:
        found.append(
            f"train.batch: {train.batch} rows in {train.accumulate} micro-batches are too few: with "
            f"these replicas each micro-batch needs {needed}"
        )
    if needed > 1 and config.evaluate.batch < 2 * needed:
        found.append(f"evaluate.batch: {config.evaluate.batch} rows are too few: these replicas need {2 * needed}")
    return found


def _faults_to_rehearse(config: Config) -> list[str]:
    stages, found = config.pipeline.stages, []
    for number, fault in enumerate(config.launcher.faults):
        field = f"launcher.faults.{number}"
        if fault.stage >= stages:
            last = stages - 1
            found.append(
                f"{field}.stage: there is no stage {fault.stage}; pipeline.stages = {stages} has stages 0 to {last}"
            )
        if fault.action == "nan":
            found += [f"{field}.action: {why}" for why in _no_poison(config, fault.stage)]
    return found


def _no_poison(config: Config, stage: int) -> list[str]:
    """Why the input of a stage cannot be made nan."""
    found = []
    if config.data.name == "text" and stage == 0:
        found.append("stage 0 reads bytes, of which none is nan; poison a later stage")
    if config.train.cache != "none":
        found.append(f"nan not with train.cache: {config.train.cache}, which would keep it beyond its steps")
    if config.pipeline.device == "emulated":
        found.append("emulated stages do not read their input, so nan changes nothing")
    return found


def _cache(config: Config) -> list[str]:
    """What is recalled must stay true."""
    cache, found = config.train.cache, []
    if config.data.crop_padding > 0:
        found.append(f"data.crop_padding: not with train.cache: {cache}, which recalls an image as it first was")
    if config.data.flip:
        found.append(f"data.flip: not with train.cache: {cache}, which recalls an image as it first was")
    if config.pipeline.stages == 1:
        found.append(f"train.cache: {cache} needs a frozen stage before the learning one; pipeline.stages is 1")
    if max(config.pipeline.replica_counts) > 1:
        found.append(f"pipeline.replicas: not with train.cache: {cache}; a replica is handed other rows each time")
    if config.objective.needs_images:
        found.append(f"train.cache: {cache} keeps no images; use objective.infopro.target: input")
    if config.pipeline.device == "emulated":
        found.append(f"train.cache: {cache} has nothing to keep; emulated stages hand on zeros")
    return found


def _replay(config: Config) -> list[str]:
    """A stage must see what is late."""
    found = []
    if max(config.pipeline.replica_counts) > 1:
        found.append("pipeline.replicas: not with train.order: replay, where each would reuse on its own")
    if config.channel.capacity == 1:
        found.append("channel.capacity: train.order: replay needs 2, or nothing could arrive while a stage learns")
    return found


def _emulated(config: Config) -> list[str]:
    found = []
    if config.checkpoint.every > 0:
        found.append("checkpoint.every: emulated stages learn nothing that could be saved")
    if config.checkpoint.resume != "never":
        found.append("checkpoint.resume: emulated stages save nothing to go on from")
    if config.train.on_nonfinite == "skip":
        found.append("train.on_nonfinite: emulated stages compute nothing that could be skipped")
    return found
