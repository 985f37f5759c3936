"""The only list of options and their defaults; knows nothing of torch, files or devices."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipetrgl.config import agreement

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
StepSize = Annotated[float, Field(gt=0, allow_inf_nan=True)]
Folder = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
Foreign = Annotated[str, Field(pattern=r"^(torchvision|timm):.")]
Seconds = Annotated[float, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the file: unknown keys are errors, values never change once read, no silent conversions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _raise(faults: list[str]) -> None:
    """End a validator with every fault found, each "field: what is wrong" with the field's path below the section."""
    if faults:
        raise ValueError("\n".join(faults))


class DataConfig(Section):
    """Where the images or the text come from and how they are prepared; only stage 0 reads them."""

    name: Literal[
        "fashion_mnist_mini", "fashion_mnist", "mnist_idx", "cifar10", "cifar100", "stl10", "image_folder", "synthetic",
        "text",
    ] = "fashion_mnist_mini"  # fmt: skip
    """The data set; text: the bytes of a file, for model.name: gpt."""
    root: Folder | None = None
    """Folder with its files, relative to the config file; unset: $PIPETRGL_DATA, then the usual places. text: a UTF-8
    file; unset: the novels of Debian's package r-cran-janeaustenr."""
    valid_fraction: Fraction = 0.1
    """Share of the training images held out as the validation split: stratified by class, fixed by the seed. Of text:
    the end of the training part."""
    num_train: Positive | None = None
    """Keep only this many training images, class-balanced, after the validation split is taken; of text the first."""
    context: Positive = 128
    """Bytes that a row reads, each of which the next one is to be told of (text only)."""
    crop_padding: NonNegative = 0
    """Random crop after zero padding by this many pixels; 0 switches it off."""
    flip: bool = False
    """Random horizontal flip."""
    image_size: Positive | None = None
    """Resize and centre-crop to this size (image_folder only)."""
    prefetch: Positive = 4
    """Batches that the loader's thread prepares ahead of stage 0."""
    shape: Annotated[tuple[Positive, Positive, Positive], Field(strict=False)] = (3, 32, 32)
    """Channels, height and width (synthetic only)."""
    num_classes: Annotated[int, Field(ge=2)] = 10
    """Number of classes (synthetic only)."""
    samples: Positive = 2048
    """Training images (synthetic only), valid_fraction included; samples / 8 more make the test split."""

    @model_validator(mode="after")
    def _only_where_used(self) -> DataConfig:
        unused = [] if self.name == "synthetic" else sorted({"shape", "num_classes", "samples"} & self.model_fields_set)
        faults = [f"{field}: only used with data.name: synthetic" for field in unused]
        if self.name != "text" and "context" in self.model_fields_set:
            faults.append("context: only used with data.name: text")
        if self.name == "text":
            faults += [f"{field}: text is not augmented" for field in ("crop_padding", "flip") if getattr(self, field)]
        if self.image_size is not None and self.name != "image_folder":
            faults.append("image_size: only used with data.name: image_folder")
        _raise(faults)
        return self


class HeadConfig(Section):
    """The auxiliary head of every stage."""

    name: Literal[
        "conv1", "linear1", "linear2", "linear3", "pool_linear", "conv1_fc2", "mlp_sr", "tokens", "next_token"
    ] = "conv1"
    """Layers, as in docs/method.md; a gpt has next_token, also where none is written."""
    pool: Positive | None = None
    """Side of the average pool of conv1; unset: 16 on maps of 48 or larger, 8 below, never above the map's own side."""


class InitConfig(Section):
    """Start weights, a function of (seed, block name)."""

    name: Literal["orthogonal", "kaiming", "trunc_normal"] = "orthogonal"
    """Of convolution and linear weights; biases start at 0, normalisation layers at 1 and 0."""
    gain: PositiveFloat = 0.1
    """Gain of orthogonal (the paper: 0.1, block-wise 0.05), or the standard deviation of trunc_normal."""


class ModelConfig(Section):
    """The network and where it is cut."""

    name: Literal["resnet", "resnet_preact", "vgg", "mlp", "vit", "gpt"] | Foreign = "resnet"
    """Family, gpt for text, the others for images; or another library's classifier, such as torchvision:swin_t or
    timm:vit_tiny_patch16_224."""
    depth: Positive = 14
    """resnet: 6n + 2 (stem cifar16) or 18, 34, 50, 101, 152; vgg: 11, 13, 16, 19; the others: blocks."""
    stem: Literal["cifar16", "cifar", "imagenet", "tiny_imagenet"] = "cifar16"
    """resnet: cifar16 is 3x3 to `width` channels with option-A shortcuts; cifar 3x3 s1; imagenet 7x7 s2 and max-pool;
    tiny_imagenet 7x7 s2."""
    width: Positive | None = None
    """Channels of the first resolution group, hidden units of the MLP, or embedding size of ViT and GPT; unset:
    the family's usual."""
    batch_norm: bool = True
    """vgg and mlp: BatchNorm after each convolution or linear layer."""
    patch: Positive = 4
    """vit: side of a patch in pixels."""
    num_heads: Positive | None = None
    """vit and gpt: attention heads; unset: one for each 64 features, at least 1."""
    dropout: Fraction = 0.0
    """vit, gpt and mlp: dropout after each linear layer."""
    drop_path: Fraction = 0.0
    """vit and gpt: stochastic depth, rising linearly from 0 at the first block to this at the last."""
    init: InitConfig = InitConfig()
    head: HeadConfig = HeadConfig()
    cuts: Literal["even", "parameters", "auto"] | list[Positive] | list[str] = "even"
    """Blocks of each stage: even by count, even by parameters, a list of counts, or a list of each later stage's first
    block. auto: profile this machine first, then train what `pipetrgl plan` would find for the workers of
    pipeline.stages and pipeline.replicas; no stage gets more replicas than the most that are written there."""

    @model_validator(mode="before")
    @classmethod
    def _text_has_a_head_of_its_own(cls, values: Any) -> Any:
        head = values.get("head", {}) if isinstance(values, dict) and values.get("name") == "gpt" else None
        return {**values, "head": {"name": "next_token", **head}} if isinstance(head, dict) else values

    @model_validator(mode="after")
    def _heads_answer_what_is_asked(self) -> ModelConfig:
        if (self.name == "gpt") != (self.head.name == "next_token"):
            raise ValueError(
                f"head.name: a {self.name} cannot have '{self.head.name}'; next_token is for gpt alone, its only head"
            )
        return self


class MultiplierConfig(Section):
    """Uzawa's multipliers: the weight of the transport cost is 1 / lambda, and lambda grows by h * task loss."""

    enabled: bool = False
    """Use them in place of tau."""
    initial: PositiveFloat = 1.0
    """lambda_0, the same for every stage."""
    step_size: PositiveFloat = 1.0
    """h."""
    every: Positive = 50
    """Optimizer steps between two updates of lambda."""
    on: Literal["task_loss", "unsmoothed_task_loss"] = "task_loss"
    """With label smoothing the task loss never reaches 0 and lambda grows for ever; the unsmoothed one can."""


class TransportConfig(Section):
    """The regulariser: C / (2 tau), C the sum over blocks of their mean squared residuals."""

    tau: StepSize | list[StepSize] = 1.0
    """Step size; a scalar, a list with one value a stage, or .inf for plain greedy learning (VanGL)."""
    half_rule: bool = False
    """Stages i < K // 2 use tau / 2, the others tau, as in the authors' code; only with a scalar tau."""
    kind: Literal["branch", "displacement", "stage"] = "branch"
    """branch: r before the addition; displacement: T(x) - x of each block; stage: T_k(z) - z of the whole stage."""
    norm: Literal["mean", "sum"] = "mean"
    """mean over all elements, or sum over features and mean over the batch; published values of tau belong to mean."""
    impl: Literal["auto", "autograd", "batchnorm"] = "auto"
    """batchnorm computes the same cost without storing r, where a branch ends in BatchNorm; auto uses it there."""
    multipliers: MultiplierConfig = MultiplierConfig()

    @model_validator(mode="after")
    def _no_silent_override(self) -> TransportConfig:
        faults = []
        if self.half_rule and isinstance(self.tau, list):
            faults.append("half_rule: needs a scalar tau; a list already says each stage's own")
        if self.multipliers.enabled and "tau" in self.model_fields_set:
            faults.append("tau: has no effect while multipliers.enabled is true; remove one of them")
        if self.impl == "batchnorm" and self.kind != "branch":
            faults.append(f"impl: batchnorm is an identity for residual branches; kind is '{self.kind}'")
        _raise(faults)
        return self


class PredSimConfig(Section):
    """The rival of arXiv 1901.06656: (1 - beta) * task loss + beta * similarity loss."""

    beta: Fraction = 0.99
    """Share of the similarity loss."""


class InfoProConfig(Section):
    """The rival of arXiv 2101.10832: lambda_1 * reconstruction + lambda_2 * task loss in all stages but the last."""

    reconstruction: Annotated[tuple[Weight, Weight], Field(strict=False)] = (1.0, 1.0)
    """lambda_1 of stage 0 and of the last stage but one; those between lie on a straight line."""
    task: Annotated[tuple[Weight, Weight], Field(strict=False)] = (1.0, 1.0)
    """lambda_2, in the same way."""
    target: Literal["image", "input"] = "image"
    """What a stage reconstructs: the image, as in the paper, which travels beside the activations; or its own input."""


class ObjectiveConfig(Section):
    """The local loss of a stage: task loss + transport cost / (2 tau), or a rival's."""

    name: Literal["trgl", "vangl", "predsim", "infopro"] = "trgl"
    """trgl; vangl: the task loss alone; predsim, infopro: rivals. The transport cost is measured in all of them."""
    label_smoothing: Fraction = 0.0
    """Of the cross-entropy."""
    transport: TransportConfig = TransportConfig()
    predsim: PredSimConfig = PredSimConfig()
    infopro: InfoProConfig = InfoProConfig()

    @property
    def needs_images(self) -> bool:
        """Whether a stage's loss depends on the image, which only stage 0 has."""
        return self.name == "infopro" and self.infopro.target == "image"

    @model_validator(mode="after")
    def _only_where_used(self) -> ObjectiveConfig:
        sections: dict[str, Section] = {"predsim": self.predsim, "infopro": self.infopro}
        _raise(
            [
                f"{name}.{field}: only used with objective.name: {name}"
                for name, section in sections.items()
                if name != self.name
                for field in sorted(section.model_fields_set)
            ]
        )
        return self


class ScheduleConfig(Section):
    """Learning rate over all updates of a stage, a function of their number alone; in the parallel order, the run's."""

    name: Literal["constant", "cosine", "one_cycle", "multistep"] = "constant"
    """Shape."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Linear warm-up from 0 (constant, cosine, multistep)."""
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """one_cycle: share of the run in which the rate rises from lr / 25; it ends at lr / 10,000."""
    milestones: list[PositiveFloat] = []
    """multistep: epochs at which the rate is multiplied by `factor`."""
    factor: PositiveFloat = 0.1
    """multistep: what the rate is multiplied by."""


class OptimConfig(Section):
    """The optimizer of every stage, for its blocks and its head alike."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """Table entry."""
    lr: PositiveFloat = 0.003
    """Learning rate; the peak of a schedule that rises."""
    momentum: Fraction = 0.9
    """sgd only."""
    nesterov: bool = False
    """sgd only."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    """adam and adamw only."""
    weight_decay: Annotated[float, Field(ge=0)] = 2e-4
    """L2 for sgd and adam, decoupled for adamw."""
    decay_vectors: bool = True
    """Also decay 1-d parameters (biases, normalisation) and position tables."""
    fused: bool = False
    """One kernel for the update of all parameters of a stage."""
    schedule: ScheduleConfig = ScheduleConfig()


class ReplayConfig(Section):
    """What a stage that waits for the one before it learns from again, with train.order: replay."""

    size: Positive = 8
    """Micro-batches that each stage but the first keeps: the newest that it received."""
    max_reuse: Positive = 2
    """Uses of one micro-batch, the first included; with 1 nothing is reused, as in the parallel order."""


class TrainConfig(Section):
    """How long, and in what portions."""

    order: Literal["parallel", "sequential", "multi_lap", "replay", "end_to_end"] = "parallel"
    """parallel: all stages learn at the same time; sequential: one after another, on the frozen ones before it;
    multi_lap: the whole sequential sweep several times; replay: parallel, but a stage that would wait learns from past
    activations once more, so the weights depend on the workers' speeds; end_to_end: one loss, at the last head, whose
    gradient goes through all stages."""
    schedule: Literal["gpipe", "1f1b"] = "1f1b"
    """end_to_end over workers: torch's pipeline schedule, whose micro-batches are those of `accumulate`; gpipe runs all
    forward passes first, 1f1b holds the activations of at most K micro-batches in a stage."""
    epochs: Positive = 8
    """Passes over the training split; of stage 0 in each lap if the order is not parallel."""
    epochs_growth: NonNegative = 0
    """sequential and multi_lap: stage i learns for epochs + i * epochs_growth epochs."""
    laps: Positive = 1
    """multi_lap: sweeps over all stages."""
    cache: Literal["none", "memory", "disk"] = "none"
    """sequential and multi_lap, without augmentation: the learning stage keeps what it is handed in the first epoch of
    its phase, in memory or in the run folder, and the stages before it rest in the later ones; see docs/method.md."""
    replay: ReplayConfig = ReplayConfig()
    max_steps: Positive | None = None
    """End after this many optimizer steps of the whole run, wherever in an epoch that is."""
    batch: Positive = 64
    """Rows of one optimizer step."""
    accumulate: Positive = 1
    """Micro-batches that make one optimizer step."""
    drop_last: bool = False
    """Leave out the last, smaller batch of an epoch; a rest of one row is always left out, for BatchNorm has no
    variance of it."""
    deterministic: bool = True
    """torch.use_deterministic_algorithms."""
    keep_memory: bool = True
    """Keep freed CPU memory for the next step (glibc's mallopt); about 15 % faster, see benchmarks/allocator.txt."""
    threads: Positive = 1
    """Intra-op threads of each worker; bit-equality over launchers is promised for 1."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of blocks and heads: bf16 and fp16 by autocast, fp16 with a loss scale. Parameters, losses and what a stage hands
    on are float32; see docs/performance.md for this and the next three."""
    channels_last: bool = False
    """Maps in memory as (N, H, W, C); not on links."""
    compile: bool = False
    """torch.compile of every block, in training; each worker compiles its own in its first steps."""
    recompute: bool = False
    """Keep only the input of every block in the forward pass, and run the block again in the backward pass."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When an activation or a loss is NaN or infinite: stop ends the run with exit code 4; skip leaves out the step's
    update of that stage, and counts it."""

    @model_validator(mode="after")
    def _micro_batches_hold_rows(self) -> TrainConfig:
        if self.accumulate > self.batch:
            raise ValueError(f"accumulate: {self.accumulate} micro-batches cannot share {self.batch} rows")
        return self

    @model_validator(mode="after")
    def _only_where_used(self) -> TrainConfig:
        faults = []
        if "epochs_growth" in self.model_fields_set and not self.one_by_one:
            faults.append("epochs_growth: only used with train.order: sequential or multi_lap")
        if "laps" in self.model_fields_set and self.order != "multi_lap":
            faults.append("laps: only used with train.order: multi_lap")
        if self.cache != "none" and not self.one_by_one:
            faults.append("cache: only used with train.order: sequential or multi_lap; else no stage is ever frozen")
        elif self.cache != "none" and self.epochs == 1 and self.epochs_growth == 0:
            faults.append("cache: every stage learns for one epoch at a time, so nothing is ever recalled")
        if self.order != "replay":
            faults += [
                f"replay.{name}: only used with train.order: replay" for name in sorted(self.replay.model_fields_set)
            ]
        elif self.accumulate > 1:
            faults.append("accumulate: train.order: replay makes an optimizer step of each micro-batch; use 1")
        if "schedule" in self.model_fields_set and self.order != "end_to_end":
            faults.append("schedule: only used with train.order: end_to_end")
        _raise(faults)
        return self

    @property
    def micro_batch_rows(self) -> int:
        """Of the largest micro-batch of a full step."""
        return -(-self.batch // self.accumulate)

    @property
    def one_by_one(self) -> bool:
        """Whether stages learn one after another; in the other orders all learn in every step."""
        return self.order in ("sequential", "multi_lap")


class EvaluateConfig(Section):
    """When the stream carries the validation and test splits; every head is scored."""

    valid_every: Annotated[float, Field(ge=0)] = 1.0
    """Epochs between two validations, 0.5 is twice an epoch; 0 switches them off."""
    at_start: bool = False
    """Also before the first step."""
    test_at_end: bool = True
    """The test split, once, after the last step."""
    batch: Positive = 250
    """Rows of an evaluation micro-batch."""


class EmulatedConfig(Section):
    """What stages take instead of computing, with pipeline.device: emulated; a number, or a list with one a stage."""

    forward_s: Seconds | list[Seconds] | None = None
    """Of one micro-batch; a plan sets it."""
    backward_s: Seconds | list[Seconds] | None = None
    """Of one micro-batch; a plan sets it."""
    update_s: Seconds | list[Seconds] = 0.0
    """Of one optimizer step; a plan sets it."""
    rows: Positive | None = None
    """Of the micro-batch that forward_s and backward_s are for, others take less or more; unset: the largest of a full
    step. A plan sets it."""
    jitter: Fraction = 0.0
    """Each micro-batch takes 1 - jitter to 1 + jitter of its time, evenly drawn from the seed."""


class PipelineConfig(Section):
    """How many stages, and on what they run."""

    stages: Positive = 4
    """K."""
    replicas: Positive | Annotated[list[Positive], Field(min_length=1)] = 1
    """Workers that hold the same stage and share the rows of every micro-batch; a number, or a list, one a stage."""
    batch_norm: Literal["local", "synchronised"] = "local"
    """Of a stage with replicas. local: each normalises its own rows, and running statistics are averaged at every
    update; synchronised: with the statistics of all rows, as one worker would."""
    device: Literal["cpu", "cuda", "emulated"] = "cpu"
    """cuda gives each local worker one GPU of its node, in rank order; emulated computes nothing, but takes its time:
    docs/performance.md."""
    emulated: EmulatedConfig = EmulatedConfig()

    @property
    def hardware(self) -> Literal["cpu", "cuda"]:
        """Where the tensors are."""
        return "cuda" if self.device == "cuda" else "cpu"

    @model_validator(mode="after")
    def _emulated_where_asked_for(self) -> PipelineConfig:
        emulated, faults = self.emulated, []
        if self.device != "emulated":
            faults = [f"emulated.{name}: only used with device: emulated" for name in sorted(emulated.model_fields_set)]
        else:
            for name in ("forward_s", "backward_s", "update_s"):
                value = getattr(emulated, name)
                if value is None:
                    faults.append(f"emulated.{name}: needed with device: emulated; or give a plan, which sets it")
                elif isinstance(value, list) and len(value) != self.stages:
                    faults.append(f"emulated.{name}: {len(value)} given; stages = {self.stages} needs one a stage")
        _raise(faults)
        return self

    @property
    def replica_counts(self) -> tuple[int, ...]:
        """Of every stage."""
        return tuple(self.replicas) if isinstance(self.replicas, list) else (self.replicas,) * self.stages

    @property
    def least_rows(self) -> int:
        """Of a micro-batch: one for each replica of a stage, two where BatchNorm sees each replica's rows alone."""
        most = max(self.replica_counts)
        return most if most == 1 or self.batch_norm == "synchronised" else 2 * most


class ChannelConfig(Section):
    """The links between stages."""

    capacity: Positive = 4
    """Micro-batches that a link holds; 1 is a test value, 2 hides the link's time, 4 absorbs jitter."""
    codec: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    """How an activation is written on the wire; part of the model, so the serial launcher applies it too."""
    start_timeout_s: PositiveFloat = 120.0
    """How long a worker waits for the others at start."""
    wait_timeout_s: PositiveFloat = 1800.0
    """Longest wait for one micro-batch; longer means that a neighbour hangs."""
    heartbeat_s: PositiveFloat = 2.0
    """Seconds between two signs of life of a worker."""
    heartbeat_timeout_s: PositiveFloat = 30.0
    """A worker silent for this long is taken for dead."""
    log_bytes: NonNegative = 512 * 2**20
    """What each stage keeps of its last activations, in bytes, so that the next stage can be replaced alone; kept only
    where launcher.max_failures and launcher.restart allow that, and let go when the next stage has saved."""
    delay_s: Seconds = 0.0
    """For rehearsals: every link is slower by so much, as a long cable is; it still carries as many micro-batches."""
    jitter_s: Seconds = 0.0
    """For rehearsals: up to so much more delay, drawn for each micro-batch."""

    @model_validator(mode="after")
    def _several_beats_before_death(self) -> ChannelConfig:
        if self.heartbeat_timeout_s < 2 * self.heartbeat_s:
            dead, beat = self.heartbeat_timeout_s, self.heartbeat_s
            raise ValueError(f"heartbeat_timeout_s: {dead:g} must be at least twice heartbeat_s ({beat:g})")
        return self


class FaultConfig(Section):
    """One failure to rehearse, once in the life of a run folder; see docs/reliability.md."""

    stage: NonNegative
    """That it happens to."""
    step: NonNegative
    """Optimizer step, from 0: it happens just before that step's first forward pass."""
    action: Literal["kill", "raise", "hang", "nan", "slow"]
    """kill: SIGKILL of the worker's process; raise: an error as from a bug; hang: the stage never goes on; nan: its
    input is multiplied by NaN; slow: it sleeps."""
    seconds: PositiveFloat = 1.0
    """slow only: how long it sleeps."""
    num_steps: Positive = 1
    """nan and slow only: in how many consecutive steps."""

    @model_validator(mode="after")
    def _only_where_used(self) -> FaultConfig:
        faults = []
        if "seconds" in self.model_fields_set and self.action != "slow":
            faults.append("seconds: only used with action: slow")
        if "num_steps" in self.model_fields_set and self.action not in ("nan", "slow"):
            faults.append("num_steps: only used with action: nan or slow")
        _raise(faults)
        return self


class RayConfig(Section):
    """How Ray places the workers (launcher.name: ray)."""

    address: Annotated[str, Field(min_length=1)] | None = None
    """Of the cluster, host:port or auto; unset: $RAY_ADDRESS, which a Ray job has set, else a Ray of the run's own on
    this machine; local: always that."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Of the placement group: PACK puts the workers on as few nodes as possible, SPREAD on as many."""
    cpus: PositiveFloat | list[PositiveFloat] = 1.0
    """CPUs of each worker, or a list with one value a stage; may be fractions."""
    gpus: PositiveFloat | list[PositiveFloat] | None = None
    """GPUs of each worker; unset: 1 with pipeline.device: cuda, else none."""
    resources: dict[str, PositiveFloat] | list[dict[str, PositiveFloat]] = {}
    """Custom resources of each worker, such as {fast_disk: 0.5}, or a list with one section a stage."""
    labels: dict[str, str] | list[dict[str, str]] = {}
    """Labels that a worker's node must have, or a list with one section a stage."""


class LauncherConfig(Section):
    """Who starts the workers."""

    name: Literal["local", "threads", "serial", "torchrun", "ray"] = "local"
    """local: processes on this machine; threads; serial: the plain loop; torchrun: this process is one rank (chosen by
    itself under torchrun); ray: actors of a Ray cluster."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the run's store (local and ray); 0 takes a free one."""
    ray: RayConfig = RayConfig()
    max_failures: NonNegative = 0
    """So many times in all a stage is replaced, or the whole run started again from its newest complete checkpoint."""
    restart: Literal["stage", "run"] = "stage"
    """After a worker died. stage: replace it alone while the others wait, where that is possible (local and ray, CPU,
    no replay order), else start the run again; run: always start the whole run again."""
    faults: list[FaultConfig] = []
    """Failures to rehearse, such as [{stage: 2, step: 100, action: kill}]."""


class MetricsConfig(Section):
    """What is written down while training."""

    every: Positive = 10
    """Optimizer steps between two metrics rows of each stage."""


class TraceConfig(Section):
    """A window of steps whose compute, send and wait spans are recorded on every worker."""

    first_step: NonNegative = 20
    """First optimizer step of the window."""
    num_steps: NonNegative = 20
    """Length of the window; 0 records nothing."""


class CheckpointConfig(Section):
    """What is saved while training, and what a run starts from."""

    every: NonNegative = 0
    """Optimizer steps between two checkpoints; 0 writes only the final one."""
    keep: Positive = 2
    """Newest complete checkpoints that are kept."""
    resume: Annotated[str, Field(min_length=1)] = "never"
    """never; auto: go on with the newest unfinished run of this name and config, if there is one; or a run folder."""


class RunConfig(Section):
    """Where a run leaves its files."""

    name: str = "trgl"
    """Start of the run folder's name."""
    folder: Folder = "runs"
    """Parent of the run folders, relative to the working directory."""
    save_final: bool = True
    """Write every stage's final weights."""
    report: bool = True
    """Write report.html when the run ends; needs the extra `plot`."""

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if name in ("", ".", "..") or any(c in "/\\" or not c.isprintable() for c in name):
            raise ValueError(f"{name!r} cannot start a folder's name; expected printable text without / and \\")
        return name


class Config(Section):
    """A reproducible run."""

    seed: NonNegative = 0
    """Every random stream is derived from it."""
    plan: Folder | None = None
    """A plan.json of `pipetrgl plan`, relative to the config file; it sets model.cuts, pipeline.stages and
    pipeline.replicas, which must not be written beside it. A run folder's config holds these in its place."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    pipeline: PipelineConfig = PipelineConfig()
    channel: ChannelConfig = ChannelConfig()
    launcher: LauncherConfig = LauncherConfig()
    metrics: MetricsConfig = MetricsConfig()
    trace: TraceConfig = TraceConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        _raise(agreement.faults(self))
        return self
