"""The serial launcher: the algorithm as written, a plain `for` over stages in one process.

This is the reference that every other launcher must equal bit for bit, and what the authors' scripts do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from pipetrgl.channels.codecs import CODECS, Codec, received
from pipetrgl.channels.contracts import NullOutbox
from pipetrgl.engine import loop
from pipetrgl.engine.end_to_end import EndToEnd, one_stages_hooks
from pipetrgl.engine.idle import NOTHING
from pipetrgl.engine.metrics import Sink
from pipetrgl.engine.phases import Plan, Role
from pipetrgl.launchers.supervise import Budget
from pipetrgl.memory import peak_rss_bytes
from pipetrgl.microbatch import MicroBatch
from pipetrgl.worker import Job, build_hooks, build_loader, build_plan, build_stage, build_trainee, configure_torch


def launch(job: Job, sink: Sink, budget: Budget) -> None:
    """Train all stages here, one after another on every micro-batch."""
    blueprint = job.blueprint
    configure_torch(blueprint.config.train)
    codec = CODECS[blueprint.config.channel.codec]
    device = torch.device(blueprint.config.pipeline.hardware)
    plan = build_plan(job)
    stages = [build_stage(blueprint, index, device) for index in range(blueprint.num_stages)]
    loader = build_loader(job)
    hooks = [build_hooks(job, stage, loader, NullOutbox(), sink) for stage in stages]
    trainees: Sequence[loop.Trainee]
    if blueprint.end_to_end:
        trainees, hooks = [EndToEnd(stages, blueprint.config.train)], [one_stages_hooks(hooks)]
    else:
        trainees = [build_trainee(job, stage) for stage in stages]
    try:
        run(trainees, loader, plan, codec, hooks)
    finally:
        loader.close()
    for stage in stages:
        sink({"kind": "memory", "stage": stage.index, "peak_rss_bytes": peak_rss_bytes()})


def run(
    stages: Sequence[loop.Trainee],
    inbox: Iterable[MicroBatch],
    plan: Plan,
    codec: Codec,
    hooks: Sequence[Sequence[loop.Hook]],
) -> None:
    """Train all stages on a whole stream, evaluations included; `hooks` are each stage's own."""
    for micro_batch in inbox:
        for stage, watchers in zip(stages, hooks, strict=True):
            role = plan.role(stage.index, micro_batch)
            if role is Role.IDLE:  # it only counts the steps
                for hook in watchers:
                    hook(micro_batch.as_tick(), NOTHING)
                continue
            output = stage.forward(micro_batch, role is Role.TRAIN)
            # Computed before this stage's update, from the weights that made `output`, as a pipeline would.
            handed_on = received(codec, micro_batch.carrying(output.activation))
            if role is Role.TRAIN:
                stage.backward(output, micro_batch)
                if micro_batch.closes_step:
                    stage.update()
            for hook in watchers:
                hook(micro_batch, output)
            micro_batch = handed_on
            del output, handed_on  # nothing of stage k stays alive while stage k + 1 runs
    for watchers in hooks:
        for hook in watchers:
            hook.close()
