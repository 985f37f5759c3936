"""A worker's links over torch.distributed, opened through the run's store."""

from __future__ import annotations

import functools
import socket
from typing import final

import torch
from torch.distributed import ProcessGroup

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.board import Board
from pipetrgl.channels.codecs import CODECS, encoded_bytes
from pipetrgl.channels.connect import Connector
from pipetrgl.channels.contracts import Inbox, OneReplica, Outbox, ReplicaGroup
from pipetrgl.channels.link import LinkTerms
from pipetrgl.channels.peer import Hello, Site
from pipetrgl.channels.shares import join, split
from pipetrgl.channels.wire import TensorSpec, label_words
from pipetrgl.config.schema import Config
from pipetrgl.launchers.membership import Membership, name_of
from pipetrgl.seeds import derive
from pipetrgl.worker import Job
from pipetrgl.world import Place

_LEAST_REPLACEMENT_S = 10.0


@final
class StoreLinks:
    """Links over torch.distributed, opened through the run's store."""

    def __init__(self, job: Job, member: Membership, board: Board, alarm: Alarm) -> None:
        blueprint = self._blueprint = job.blueprint
        self._run_id = derive(0, blueprint.config_hash, job.run.name)
        self._member = member
        hello = Hello(
            rank=member.place.rank,
            name=name_of(member.place),
            host=socket.gethostname(),
            device=member.device.type,
            config=blueprint.config_hash,
            incarnation=member.incarnation,
        )
        hello.post(board)
        self._first_index = blueprint.itinerary.first_index(job.first_step)
        channel = blueprint.config.channel
        site = Site(board, hello, member.address, channel.start_timeout_s, alarm, _replacement_s(job, member))
        self._connector = Connector(site, channel.log_bytes)

    @property
    def clock_offset_s(self) -> float:
        return self._connector.clock_offset_s

    def look(self, board: Board) -> None:
        """Notice replaced neighbours, through the heartbeat's client of the store."""
        self._connector.look(board)

    def close(self) -> None:
        """End the links' threads; nobody will be replaced any more."""
        self._connector.close()

    def replicas(self, place: Place) -> ReplicaGroup:
        group = self._blueprint.world.group(place)
        if len(group) == 1:
            return OneReplica()
        timeout_s = self._blueprint.config.channel.wait_timeout_s
        name = f"the replicas of stage {place.stage}"
        ranks = [member.rank for member in group]
        return self._connector.replicas(ranks, place.replica, self._member.device, timeout_s, name)

    def inbox(self, place: Place) -> Inbox:
        expected = [TensorSpec(self._blueprint.input_shape(place.stage), torch.float32)]
        shape = self._blueprint.image_shape(place.stage)
        image = None if shape is None else TensorSpec(shape, torch.float32)
        senders = self._blueprint.world.senders(place)
        # a share's largest part would have to be known: it is learned from the header instead
        rooms = self._rooms(place) if len(senders) == self._blueprint.world.replicas[place.stage] == 1 else ()
        inboxes = [
            self._connector.inbox(
                sender.rank, self._terms(sender, place), expected, self._member.device, self._first_index, image, rooms
            )
            for sender in senders
        ]
        return join(inboxes)

    def outbox(self, place: Place) -> Outbox:
        world = self._blueprint.world
        receivers = world.receivers(place)
        outboxes = [
            self._connector.outbox(receiver.rank, self._terms(place, receiver), self._member.device)
            for receiver in receivers
        ]
        shares = [functools.partial(world.share, receiver) for receiver in receivers]
        return split(outboxes, shares)

    def pipeline(self, place: Place) -> tuple[ProcessGroup, ReplicaGroup]:
        size, timeout_s = self._blueprint.world.size, self._blueprint.config.channel.wait_timeout_s
        sums = self._connector.replicas(range(size), place.rank, self._member.device, timeout_s, "the stages")
        return self._connector.everyone(place.rank, size, timeout_s), sums

    def _rooms(self, place: Place) -> tuple[int, ...]:
        """Bytes of the largest payload tensors that a whole micro-batch can bring, images in training only."""
        blueprint, codec = self._blueprint, CODECS[self._blueprint.config.channel.codec]
        rooms = encoded_bytes(codec, (blueprint.max_rows, *blueprint.input_shape(place.stage)), torch.float32)
        if (image := blueprint.image_shape(place.stage)) is None:
            return rooms
        return rooms + encoded_bytes(codec, (blueprint.config.train.micro_batch_rows, *image), torch.float32)

    def _terms(self, sender: Place, receiver: Place) -> LinkTerms:
        channel = self._blueprint.config.channel
        return LinkTerms(
            run_id=self._run_id,
            capacity=channel.capacity,
            codec=CODECS[channel.codec],
            label_words=label_words(self._blueprint.max_rows, self._blueprint.network.target_shape),
            timeout_s=channel.wait_timeout_s,
            sender=name_of(sender),
            receiver=name_of(receiver),
        )


def _replacement_s(job: Job, member: Membership) -> float | None:
    """How long to wait for word of a replacement when a neighbour is lost; None where stages are not replaced."""
    config = job.blueprint.config
    if not (member.supervised and replaces_stages(config)):
        return None
    return max(_LEAST_REPLACEMENT_S, 2 * config.channel.heartbeat_timeout_s)


def replaces_stages(config: Config) -> bool:
    """Whether a worker that dies is replaced alone.

    Never on a GPU, where NCCL has no way to give up one broken pair, nor where any stage has replicas, which would have
    to open their group again as well, nor with a cache, which dies with the worker, nor in the replay order, where a
    replacement would not train to the weights that made what is sent already, nor in the end-to-end order, where all
    stages are at the same step: the whole run starts again.
    """
    launcher, pipeline, train = config.launcher, config.pipeline, config.train
    alone = train.cache == "none" and train.order not in ("replay", "end_to_end")
    possible = pipeline.hardware == "cpu" and max(pipeline.replica_counts) == 1 and alone
    return possible and launcher.restart == "stage" and launcher.max_failures > 0
