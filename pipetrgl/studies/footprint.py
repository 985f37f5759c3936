"""The memory of every stage, counted byte by byte, beside end-to-end training, GPipe and 1F1B.

    TRGL, VanGL      stage k keeps         saved(blocks of k, head k)      of one micro-batch of b = B / accumulate rows
    end-to-end       its one worker keeps  saved(all blocks, last head)    of one micro-batch of b rows
    GPipe            stage k keeps         input(k) + saved(blocks of k)   of all M micro-batches of B / M rows
    1F1B             stage k keeps         input(k) + saved(blocks of k)   of min(M, K - k) of them

B: rows of a step. saved: see `SavedBytes`. input: what a stage of GPipe or 1F1B received, which it needs again in its
backward pass (stage 0: nothing, for its input is the data). The last stage of GPipe and 1F1B also keeps saved(last
head). Sources: Huang et al., arXiv 1811.06965; Narayanan et al., arXiv 2104.04473, section 2.2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.channels.codecs import CODECS, Plain, encoded_bytes
from pipetrgl.config.schema import Config, TransportConfig
from pipetrgl.data.dataset import DataSpec
from pipetrgl.microbatch import MicroBatch, Split
from pipetrgl.stage import Stage
from pipetrgl.studies.saved import SavedBytes
from pipetrgl.worker import build_stage

_CPU = torch.device("cpu")
_FEW_ROWS = (2, 3, 5)
"""Rows of the counts that a line is laid through; BatchNorm needs two."""


@dataclass(frozen=True)
class StageFootprint:
    """Bytes of one stage, or of end-to-end training.

    Attributes:
        span: first and last block.
        vangl, identity, stored: saved activations without the transport cost, with it by the BatchNorm identity where
            there is one (`impl: auto`), and with every residual kept (`impl: autograd`); for end-to-end training all
            three, and those of GPipe and 1F1B, are its own.
        gpipe, one_f_one_b: saved activations of the same blocks in those schedules.
        parameters: of blocks and head; their gradients take as much again.
        optimizer: what the optimizer remembers.
        links: the inbox's slots (of stage 0: the loader's batches), the ring of the replay order, and the one
            micro-batch that is being sent, with the images that ride along where the run's own objective needs them.
        cache: what `train.cache` keeps while the stage learns.
    """

    span: str
    vangl: int
    identity: int
    stored: int
    gpipe: int
    one_f_one_b: int
    parameters: int
    optimizer: int
    links: int
    cache: int


@dataclass(frozen=True)
class Footprint:
    """Of a whole run.

    Attributes:
        network: its name.
        rows: of a training micro-batch.
        num_micro_batches: M, of GPipe and 1F1B.
        end_to_end: the same blocks with one loss at the last head, in one worker.
        cache: `train.cache`: where that is.
    """

    network: str
    rows: int
    num_micro_batches: int
    end_to_end: StageFootprint
    stages: tuple[StageFootprint, ...]
    cache: str


@dataclass(frozen=True)
class Saved:
    """Saved-activation bytes of one stage, of its blocks and of its head with the loss."""

    blocks: int
    head: int

    @property
    def total(self) -> int:
        return self.blocks + self.head


def footprint(config: Config, spec: DataSpec, num_micro_batches: int | None = None) -> Footprint:
    """Count on the CPU: forward passes of a few rows, no backward pass.

    Args:
        config: of the run; objective.name, tau and impl are replaced by those of each column.
        spec: of its data.
        num_micro_batches: M; None is K, the least that keeps every stage of GPipe busy.
    """
    variants = tuple(_variant(config, spec, name) for name in ("vangl", "identity", "stored"))
    num_micro = num_micro_batches or config.pipeline.stages
    run = dataclasses.replace(variants[0], config=config)  # whose objective says what the links carry
    stages = tuple(_stage_footprint(run, variants, k, num_micro) for k in range(config.pipeline.stages))
    name, rows = variants[0].network.name, config.train.micro_batch_rows
    return Footprint(name, rows, num_micro, _end_to_end(variants[0]), stages, config.train.cache)


def _stage_footprint(run: Blueprint, variants: Sequence[Blueprint], k: int, num_micro_batches: int) -> StageFootprint:
    vangl, identity, stored = variants
    rows, share = vangl.config.train.micro_batch_rows, math.ceil(vangl.config.train.batch / num_micro_batches)
    last = k == vangl.num_stages - 1
    stage = build_stage(vangl, k, _CPU)
    count = _counter(stage, vangl)
    piped = count(share).total if last else count(share).blocks
    if k > 0:
        piped += _bytes_of((share, *vangl.input_shape(k)))
    return StageFootprint(
        span=stage.span,
        vangl=count(rows).total,
        identity=count_saved(identity, k, rows).total,
        stored=count_saved(stored, k, rows).total,
        gpipe=num_micro_batches * piped,
        one_f_one_b=min(num_micro_batches, vangl.num_stages - k) * piped,
        parameters=parameter_bytes(stage),
        optimizer=optimizer_bytes(stage),
        links=link_bytes(run, k),
        cache=run.cache_bytes(k),
    )


def undivided(blueprint: Blueprint) -> Blueprint:
    """End-to-end training of the same blocks: one stage, whose head is the last one."""
    return dataclasses.replace(blueprint, ranges=(range(len(blueprint.network.blocks)),))


def count_saved(blueprint: Blueprint, stage: int, rows: int) -> Saved:
    """What a stage saves in a forward pass of `rows` rows.

    Counted at 2, 3 and 5 rows; if these lie on a line, so do all other counts, for every tensor has either a row for
    each row of the batch or none. If they do not, it is counted at `rows` itself.
    """
    return _counter(build_stage(blueprint, stage, _CPU), blueprint)(rows)


def count_at(stage: Stage, blueprint: Blueprint, rows: int) -> Saved:
    """What a stage saves, counted in a forward pass of just so many rows."""
    micro_batch = _micro_batch(blueprint, stage.index, rows)
    assert isinstance(micro_batch.activation, torch.Tensor)
    modules = [module for _, module in stage.named_modules()]
    owned = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    before_head: list[int] = []
    with SavedBytes([micro_batch.activation, micro_batch.target, *owned]) as saved:
        handle = stage.head.register_forward_pre_hook(lambda module, inputs: before_head.append(saved.total))
        stage.forward(micro_batch, train=True)
        handle.remove()
    return Saved(before_head[0], saved.total - before_head[0])


def parameter_bytes(stage: Stage) -> int:
    return sum(parameter.nbytes for _, parameter in stage.named_parameters())


def optimizer_bytes(stage: Stage) -> int:
    """What the optimizer remembers after its first update; the stage's weights are changed."""
    for _, parameter in stage.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
    stage.update()
    return sum(value.nbytes for value in stage.optimizer_state().values())


def link_bytes(blueprint: Blueprint, stage: int) -> int:
    """The inbox's slots, each as large as the largest micro-batch, and the one micro-batch that is being sent.

    A codec other than fp32 also needs what it decoded. Stage 0's inbox is the loader with its prepared batches. Images
    ride in training only.
    """
    config, rows, train_rows = blueprint.config, blueprint.max_rows, blueprint.config.train.micro_batch_rows
    codec = config.channel.codec
    if stage == 0:
        network = blueprint.network
        received = config.data.prefetch * math.prod((rows, *network.input_shape)) * network.input_dtype.itemsize
    else:
        slot, kept = (
            _slot_bytes((rows, *blueprint.input_shape(stage)), codec),
            (train_rows, *blueprint.input_shape(stage)),
        )
        held = _bytes_of(kept)
        if (image := blueprint.image_shape(stage)) is not None:
            slot += _slot_bytes((train_rows, *image), codec)
            held += _bytes_of((train_rows, *image))
        received = config.channel.capacity * slot
        if config.train.order == "replay":  # the ring, and the copy that the stage has in hand
            received += (config.train.replay.size + 1) * held
    if stage == blueprint.num_stages - 1:
        return received
    sent = _encoded_bytes((rows, *blueprint.output_shape(stage)), codec)
    if (image := blueprint.image_shape(stage + 1)) is not None:
        sent += _encoded_bytes((train_rows, *image), codec)
    return received + sent


def _variant(config: Config, spec: DataSpec, name: str) -> Blueprint:
    """The run with the objective of one column; tau is any finite number, for bytes do not depend on it."""
    given = config.objective.transport
    transport = TransportConfig(kind=given.kind, norm=given.norm, impl="autograd" if name == "stored" else "auto")
    objective = config.objective.model_copy(
        update={"name": "vangl" if name == "vangl" else "trgl", "transport": transport}
    )
    # every stage with its head, also of a network that is to be trained end to end
    order = "parallel" if config.train.order == "end_to_end" else config.train.order
    train = config.train.model_copy(update={"order": order})
    return draw_up(config.model_copy(update={"objective": objective, "train": train}), spec)


def _end_to_end(vangl: Blueprint) -> StageFootprint:
    whole = undivided(vangl)
    stage = build_stage(whole, 0, _CPU)
    saved = _counter(stage, whole)(vangl.config.train.micro_batch_rows).total
    return StageFootprint(
        span=stage.span,
        vangl=saved,
        identity=saved,
        stored=saved,
        gpipe=saved,
        one_f_one_b=saved,
        parameters=parameter_bytes(stage),
        optimizer=optimizer_bytes(stage),
        links=link_bytes(whole, 0),
        cache=0,
    )


def _counter(stage: Stage, blueprint: Blueprint) -> Callable[[int], Saved]:
    few = {rows: count_at(stage, blueprint, rows) for rows in _FEW_ROWS}

    def count(rows: int) -> Saved:
        blocks = _on_the_line({n: saved.blocks for n, saved in few.items()}, rows)
        head = _on_the_line({n: saved.head for n, saved in few.items()}, rows)
        if blocks is None or head is None:
            return count_at(stage, blueprint, rows)
        return Saved(blocks, head)

    return count


def _on_the_line(counts: dict[int, int], rows: int) -> int | None:
    """The count at `rows` on the line through the given ones; None if there is no such line."""
    (first, one), (second, two), (third, three) = counts.items()
    slope, rest = divmod(two - one, second - first)
    if rest or three - two != slope * (third - second):
        return None
    return one + slope * (rows - first)


def _micro_batch(blueprint: Blueprint, stage: int, rows: int) -> MicroBatch:
    return MicroBatch(
        activation=blueprint.draw_input(stage, rows, torch.Generator().manual_seed(0)),
        target=torch.zeros(rows, *blueprint.network.target_shape, dtype=torch.int64),
        positions=torch.arange(rows),
        split=Split.TRAIN,
        epoch=0,
        step=0,
        index=0,
        row_start=0,
        batch_rows=rows,
        closes_step=True,
        closes_split=False,
    )


def _slot_bytes(shape: tuple[int, ...], codec: str) -> int:
    decoded = 0 if isinstance(CODECS[codec], Plain) else _bytes_of(shape)
    return _encoded_bytes(shape, codec) + decoded


def _encoded_bytes(shape: tuple[int, ...], codec: str) -> int:
    return sum(encoded_bytes(CODECS[codec], shape, torch.float32))


def _bytes_of(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * torch.float32.itemsize
