"""The worker: builds one stage with its loader, links and hooks, and runs the loop; every launcher's one call."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from pipetrgl import kernels, optim, precision
from pipetrgl.blueprint import Blueprint
from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.contracts import Inbox, OneReplica, Outbox, ReplicaGroup
from pipetrgl.channels.delayed import DelayedInbox
from pipetrgl.channels.gradients import BucketedSum, GradientSum, Whole
from pipetrgl.channels.images import image_outbox
from pipetrgl.channels.replicas import Agreed, add_up
from pipetrgl.config.schema import Config, TrainConfig
from pipetrgl.data import catalogue
from pipetrgl.data.dataset import Dataset
from pipetrgl.data.loader import Ends, Loader
from pipetrgl.engine import loop
from pipetrgl.engine.cache import CACHES
from pipetrgl.engine.checkpoint import Checkpoint
from pipetrgl.engine.emulated import Device, EmulatedStage, Times
from pipetrgl.engine.end_to_end import EndToEnd
from pipetrgl.engine.evaluate import Evaluation
from pipetrgl.engine.faults import rehearse
from pipetrgl.engine.geometry import Geometry
from pipetrgl.engine.guard import StabilityGuard
from pipetrgl.engine.idle import idling
from pipetrgl.engine.listen import Listen
from pipetrgl.engine.metrics import Row, Sink, TrainMetrics
from pipetrgl.engine.nonfinite import watch
from pipetrgl.engine.phases import Plan, Recalling, plan_of
from pipetrgl.engine.pulse import Pulse, PulsedStage
from pipetrgl.engine.recall import RecallingStage
from pipetrgl.engine.replays import FreshHook, ReplayingStage, fresh_only, reusing
from pipetrgl.engine.saving import SaveCheckpoints, SaveSchedule
from pipetrgl.engine.trace import Trace, TracedInbox, TracedOutbox, TracedStage, TraceHook
from pipetrgl.memory import keep_freed_memory, peak_rss_bytes
from pipetrgl.models import stochastic
from pipetrgl.models.init import initialise
from pipetrgl.models.synchronised import Group, synchronise
from pipetrgl.objective import StageObjective
from pipetrgl.seeds import torch_stream
from pipetrgl.stage import Stage, StageParts
from pipetrgl.world import Place


@dataclass(frozen=True)
class Job:
    """A run as every worker of it knows it.

    Attributes:
        blueprint: config, data specification and cuts.
        run: the run folder.
        environ: read for $PIPETRGL_DATA only.
        checkpoint: to go on from; None for a fresh start.
        stop: set when the run shall end at the next step, with a checkpoint.
    """

    blueprint: Blueprint
    run: Path
    environ: dict[str, str]
    checkpoint: Checkpoint | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def first_step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0

    def dataset(self) -> Dataset:
        config = self.blueprint.config
        return catalogue.load(config.data, config.seed, self.environ)


class Links(Protocol):
    """How one worker reaches the others; asked for in this order, so that links come up in rank order."""

    def replicas(self, place: Place) -> ReplicaGroup:
        """Those that hold the same stage."""

    def inbox(self, place: Place) -> Inbox:
        """From the stage before."""

    def outbox(self, place: Place) -> Outbox:
        """To the stage behind; the last stage's takes nothing anywhere."""

    @property
    def clock_offset_s(self) -> float: ...


def run_worker(
    job: Job, place: Place, links: Links, sink: Sink, device: torch.device, alarm: Alarm, pulse: Pulse
) -> None:
    """Train one stage from the first micro-batch to the last.

    Args:
        job: the run.
        place: this worker's.
        links: to its neighbours.
        sink: takes its rows.
        device: of the stage.
        alarm: looked at after every micro-batch, so that a worker that never waits hears of failures as well.
        pulse: says what the stage is at.

    Raises:
        PipetrglError: the first error of any worker of the run.
    """
    blueprint = job.blueprint
    configure_torch(blueprint.config.train)
    replicas = links.replicas(place)
    stage = build_stage(blueprint, place.stage, device, replicas)
    if place.stage == 0:
        inbox: Inbox = build_loader(job, replicas)
    else:
        inbox = reusing(blueprint.config.train, _lengthened(links.inbox(place), job, place.stage, alarm))
    try:
        outbox = links.outbox(place)
        sink({"kind": "linked", **_who(place)})
        spans = build_trace(blueprint, place, links.clock_offset_s)
        hooks = build_hooks(job, stage, inbox, outbox, sink if place.replica == 0 else _for_all(sink))
        hooks = [*hooks, TraceHook(spans, place.stage, sink), Listen(alarm)]
        plan = build_plan(job)
        traced = TracedStage(PulsedStage(build_trainee(job, stage), pulse), spans)
        fresh = fresh_only(blueprint.config.train, TracedOutbox(outbox, spans))
        trainee, out = idling(plan, traced, with_images(blueprint, place.stage, fresh, device))
        loop.run(trainee, TracedInbox(inbox, spans), out, plan, hooks)
        sink({"kind": "memory", **_who(place), "peak_rss_bytes": peak_rss_bytes()})
    except BaseException as error:
        alarm.ring(error)  # so that the threads of this worker's own links end as well
        inbox.close()  # after a good end it stays open: the stage before may still have to be replaced
        raise


def build_stage(blueprint: Blueprint, index: int, device: torch.device, replicas: ReplicaGroup | None = None) -> Stage:
    """One stage with its start weights, which are a function of (seed, block name) alone.

    Args:
        replicas: the group that this one belongs to; None: it is alone.
    """
    replicas = replicas or OneReplica()
    config, init = blueprint.config, blueprint.config.model.init
    specs = blueprint.blocks(index)
    blocks = [spec.build() for spec in specs]
    for spec, block in zip(specs, blocks, strict=True):
        initialise(block, init, torch_stream(config.seed, "weights", spec.name))
    head = blueprint.head(index)
    last = [spec.name for spec in specs if spec.counted][-1]
    initialise(head, init, torch_stream(config.seed, "head", last))
    criterion = blueprint.criterion(index)  # from a stream of its own: the head's weights are every objective's
    initialise(criterion, init, torch_stream(config.seed, "criterion", last))
    for module in (*blocks, head, criterion):
        module.to(device)
    kernels.lay_out(config.train, (*blocks, head, criterion))
    gradients = _share_out((*blocks, head, criterion), replicas, config)
    named = [
        (prefix + name, parameter)
        for prefix, module in [
            *((spec.prefix, block) for spec, block in zip(specs, blocks, strict=True)),
            ("", head),
            ("criterion.", criterion),
        ]
        for name, parameter in module.named_parameters()
    ]
    itinerary = blueprint.itinerary
    own_steps = itinerary.sweep.num_updates(index, itinerary.total_steps)
    return Stage(
        StageParts(
            index=index,
            num_stages=blueprint.num_stages,
            specs=specs,
            blocks=blocks,
            calls=kernels.calls(config.train, blocks, device),
            head=head,
            criterion=criterion,
            objective=StageObjective(config.objective, blueprint.taus[index], device, not blueprint.end_to_end),
            precision=precision.build(config.train, device, index),
            optimizer=optim.build(config.optim, named),
            learning_rate=functools.partial(_learning_rate, blueprint, itinerary.steps_per_epoch, own_steps),
            replicas=replicas,
            gradients=gradients,
            reseed=stochastic.reseed,
            seed=config.seed,
            device=device,
        )
    )


def build_trainee(job: Job, stage: Stage) -> loop.Trainee:
    """The stage as the loop trains it: watched for non-finite values, rehearsing faults, recalling its input."""
    blueprint, config = job.blueprint, job.blueprint.config
    if blueprint.end_to_end:
        return EndToEnd([stage], config.train)
    emulated = config.pipeline.device == "emulated"
    trainee = _emulated(blueprint, stage) if emulated else watch(stage, config.train.on_nonfinite)
    trainee = rehearse(trainee, config.launcher.faults, job.run)
    if config.train.order == "replay":
        return ReplayingStage(trainee, stage)
    if blueprint.cache_bytes(stage.index) == 0:
        return trainee
    cache = CACHES[config.train.cache](job.run, blueprint.spec.num_train, blueprint.input_shape(stage.index))
    return RecallingStage(trainee, blueprint.seen(job.first_step), cache)


def _emulated(blueprint: Blueprint, stage: Stage) -> EmulatedStage:
    """The stage on a device that only takes its time."""
    shape, times = blueprint.output_shape(stage.index), Times(blueprint.config, stage.index)
    return EmulatedStage(stage, shape, blueprint.logits_shape, blueprint.max_rows, times, Device())


def build_plan(job: Job) -> Plan:
    """Which stage learns when."""
    train = job.blueprint.config.train
    plan = plan_of(train.order, job.blueprint.itinerary.sweep)
    return plan if train.cache == "none" else Recalling(plan, job.blueprint.seen(job.first_step))


def build_loader(job: Job, replicas: ReplicaGroup | None = None) -> Loader:
    """Stage 0's inbox: of all rows, or of one replica's share; its group ends the stream together."""
    config, world, seen = job.blueprint.config, job.blueprint.world, job.blueprint.seen(job.first_step)
    ends: Ends = job.stop
    share = None
    if replicas is not None and replicas.num_replicas > 1:
        place = world.place(world.rank(0, replicas.replica))
        ends, share = Agreed(job.stop, replicas), functools.partial(world.share, place)
    ride = job.blueprint.image_shape(1) is not None
    itinerary = job.blueprint.itinerary
    return Loader(job.dataset(), itinerary, config.data, config.seed, job.first_step, ends, share, seen, ride)


def with_images(blueprint: Blueprint, stage: int, outbox: Outbox, device: torch.device) -> Outbox:
    """The stage's outbox; where images ride along, one that knows which links they take."""
    if blueprint.image_shape(1) is None:
        return outbox
    return image_outbox(outbox, device, wanted=blueprint.image_shape(stage + 1) is not None)


def build_trace(blueprint: Blueprint, place: Place, clock_offset_s: float) -> Trace:
    """Of one worker, in the config's window of steps."""
    config = blueprint.config.trace
    return Trace(config.first_step, config.num_steps, place.rank, _title(blueprint, place), clock_offset_s)


def _share_out(modules: Sequence[torch.nn.Module], replicas: ReplicaGroup, config: Config) -> GradientSum:
    """Prepare a stage's modules for a replica group: its BatchNorm layers, and what adds its gradients up."""
    if replicas.num_replicas == 1:
        return Whole()
    synchronised = config.pipeline.batch_norm == "synchronised"
    if synchronised:
        group = Group(replicas.replica, replicas.num_replicas, functools.partial(add_up, replicas))
        for module in modules:
            synchronise(module, group)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    buffers = [buffer for module in modules for buffer in module.buffers() if buffer.is_floating_point()]
    # a step that is to be skipped must be known before anything is added up
    overlap = config.train.on_nonfinite != "skip"
    return BucketedSum(replicas, parameters, [] if synchronised else buffers, overlap)


def _lengthened(inbox: Inbox, job: Job, stage: int, alarm: Alarm) -> Inbox:
    """The inbox as the config's delays make it."""
    config = job.blueprint.config
    delay_s, jitter_s = config.channel.delay_s, config.channel.jitter_s
    if delay_s == jitter_s == 0:
        return inbox
    return DelayedInbox(inbox, delay_s, jitter_s, torch_stream(config.seed, "jitter", stage), alarm)


def build_hooks(job: Job, stage: Stage, inbox: Inbox, outbox: Outbox, sink: Sink) -> Sequence[loop.Hook]:
    """What looks at every micro-batch, in order; the stage and the metrics go on from the job's checkpoint."""
    config = job.blueprint.config
    momentum = config.optim.momentum
    guarded = config.optim.name == "sgd" and stage.replicas.replica == 0  # one warning for all
    learns, scored = config.pipeline.device != "emulated", job.blueprint.has_head(stage.index)
    metrics = TrainMetrics(stage, inbox, outbox, sink, config.metrics.every, learns and scored)
    if job.checkpoint is not None:
        job.checkpoint.load_into(stage, metrics)
        stage.num_updates = job.blueprint.itinerary.sweep.num_updates(stage.index, job.first_step)
    total_steps = job.blueprint.itinerary.total_steps
    schedule = SaveSchedule(config.checkpoint.every, config.run.save_final, total_steps)
    if not learns:
        schedule = SaveSchedule(every=0, final=False, total_steps=0)  # never, also when the run is stopped
    # before the metrics, which leave out what passes until they see an evaluation's micro-batch
    moved_alone = learns and not job.blueprint.end_to_end  # else a stage's input is not in the loop
    looks = [Geometry(stage, sink)] if moved_alone and stage.replicas.replica == 0 else []
    saves = SaveCheckpoints(stage, metrics, outbox, job.run, sink, schedule, job.first_step)
    hooks: list[loop.Hook] = [
        *([StabilityGuard(stage, optim.peak_rate(config.optim), momentum)] if guarded else []),
        *looks,
        metrics,
        *([Evaluation(stage, sink, config.train.on_nonfinite, learns)] if scored else []),
        saves,  # after the metrics, whose sums it saves
    ]
    return [FreshHook(hook) for hook in hooks] if config.train.order == "replay" else hooks


def _who(place: Place) -> Row:
    return {"stage": place.stage, "replica": place.replica}


def _title(blueprint: Blueprint, place: Place) -> str:
    """Of the worker's row in the timeline."""
    lone = blueprint.world.replicas[place.stage] == 1
    return f"stage {place.stage}" if lone else f"stage {place.stage}, replica {place.replica}"


def _for_all(sink: Sink) -> Sink:
    """Of the later replicas: leaves out the rows that the first one hands in for all of them."""

    def sink_own(row: Row) -> None:
        if row["kind"] not in ("train", "valid", "test", "summary", "last"):
            sink(row)

    return sink_own


def configure_torch(config: TrainConfig) -> None:
    """Threads, determinism and memory of this process."""
    torch.set_num_threads(config.threads)
    if config.keep_memory:
        keep_freed_memory()
    if config.compile:
        torch.use_deterministic_algorithms(config.deterministic)  # tells the compiler as well, for which it imports it
    else:
        torch.set_deterministic_debug_mode("error" if config.deterministic else "default")


def _learning_rate(blueprint: Blueprint, steps_per_epoch: int, own_steps: int, num_updates: int) -> float:
    return optim.learning_rate(blueprint.config.optim, num_updates, steps_per_epoch, own_steps)
