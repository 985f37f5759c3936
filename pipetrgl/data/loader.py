"""The loader: stage 0's inbox, whose thread prepares the itinerary's micro-batches ahead of the stage."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from pipetrgl.config.schema import DataConfig
from pipetrgl.data.augment import crop_and_flip, normalise
from pipetrgl.data.dataset import Bytes, Dataset, Images, Indices, Rows
from pipetrgl.data.itinerary import Itinerary, Stop
from pipetrgl.data.order import Draws, epoch_draws, epoch_order
from pipetrgl.data.seen import NothingSeen, Seen
from pipetrgl.microbatch import MicroBatch, Split


@dataclass(frozen=True, eq=False)
class _Prepared:
    stop: Stop
    inputs: NDArray[np.float32] | Indices | None  # None: a tick
    labels: Indices
    positions: Indices


@dataclass(frozen=True, eq=False)
class _Epoch:
    """Order and draws of the training split in one epoch."""

    number: int
    order: Indices
    draws: Draws


@dataclass(frozen=True)
class _End:
    """Closes the queue: the itinerary is done, or the thread failed."""

    failure: BaseException | None = None


class Ends(Protocol):
    """Whether the stream shall end before its time; asked between two optimizer steps."""

    def is_set(self) -> bool: ...


class Loader:
    """An iterator over a run's micro-batches from `first_step` on; its arrays are fresh, never reused.

    The thread starts at the first micro-batch and works with numpy only. It ends with the itinerary or at close(); an
    error in it is raised where the micro-batch would have come.

    Args:
        ends: where it is set, the stream ends before its time, after a whole optimizer step.
        share: of the rows of a micro-batch, those that this replica of stage 0 reads.
        seen: what the learning stage recalls by itself; no image of it is read.
        images_ride: whether training micro-batches keep their image for the later stages.
        images: False where only the targets are wanted: images of no pixel.

    Attributes:
        waited_s: time in which the stage waited for a micro-batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        itinerary: Itinerary,
        config: DataConfig,
        seed: int,
        first_step: int = 0,
        ends: Ends | None = None,
        share: Callable[[range], range] | None = None,
        seen: Seen | None = None,
        images_ride: bool = False,
        images: bool = True,
    ) -> None:
        self.waited_s = 0.0
        self._ends = ends or threading.Event()
        self._seen = seen or NothingSeen()
        self._between_steps = True
        self._dataset = dataset
        self._as_inputs = (
            _tokens if dataset.spec.name == "text" else partial(normalise, mean=dataset.spec.mean, std=dataset.spec.std)
        )
        self._config = config
        self._seed = seed
        self._images_ride = images_ride
        self._images = images
        stops = itinerary.stops(first_step)
        self._stops = stops if share is None else (stop.share(share) for stop in stops)
        self._queue: queue.Queue[_Prepared | _End] = queue.Queue(config.prefetch)
        self._closed = threading.Event()
        self._closing = threading.Lock()
        self._started = False
        self._thread = threading.Thread(target=self._work, name="pipetrgl-loader", daemon=True)

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        if self._between_steps and self._ends.is_set():
            self.close()
        if self._closed.is_set():
            raise StopIteration
        if not self._started:
            self._started = True
            self._thread.start()
        start = time.perf_counter()
        item = self._queue.get()
        self.waited_s += time.perf_counter() - start
        if isinstance(item, _End):
            self.close()
            if item.failure is not None:
                raise item.failure
            raise StopIteration
        self._between_steps = item.stop.closes_step or item.stop.split is not Split.TRAIN
        micro_batch = _micro_batch(item)
        kept = self._images_ride and micro_batch.split is Split.TRAIN
        return micro_batch.beside(micro_batch.tensors[0]) if kept else micro_batch

    def close(self) -> None:
        """Ends the thread and the iteration; may be called twice, or while another thread waits in next()."""
        self._closed.set()
        if not self._started:
            return
        with self._closing:
            # The thread may be blocked on a full queue. Room for its one pending item lets it see the event.
            self._drain()
            self._thread.join(timeout=5.0)  # it may hang in a read from a dead file system
            self._drain()
            self._queue.put_nowait(_End())  # for a thread that waits in next()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drain(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            return

    def _work(self) -> None:
        end = _End()
        try:
            for item in self._prepare_all():
                self._queue.put(item)
                if self._closed.is_set():
                    return
        except BaseException as failure:
            end = _End(failure)
        self._queue.put(end)

    def _prepare_all(self) -> Iterator[_Prepared]:
        epoch: _Epoch | None = None
        for stop in self._stops:
            if stop.split is not Split.TRAIN:
                yield self._evaluation(stop)
                continue
            if epoch is None or epoch.number != stop.epoch:
                epoch = self._epoch(stop.epoch)
            yield self._training(stop, epoch)

    def _epoch(self, number: int) -> _Epoch:
        num_samples = len(self._dataset.train)
        draws = epoch_draws(self._seed, number, num_samples, self._config.crop_padding, self._config.flip)
        return _Epoch(number, epoch_order(self._seed, number, num_samples), draws)

    def _training(self, stop: Stop, epoch: _Epoch) -> _Prepared:
        positions = epoch.order[stop.first_row : stop.end_row].copy()
        if self._seen.all(stop.step, positions):
            return _Prepared(stop, None, _labels(self._dataset.train, positions), positions)
        if not self._images:
            return _Prepared(stop, _no_images(stop), _labels(self._dataset.train, positions), positions)
        images = self._dataset.train.read(positions)
        if self._config.crop_padding or self._config.flip:
            images = crop_and_flip(images, epoch.draws.at(positions), self._config.crop_padding)
        return self._prepared(stop, images, self._dataset.train, positions)

    def _evaluation(self, stop: Stop) -> _Prepared:
        samples = self._dataset.valid if stop.split is Split.VALID else self._dataset.test
        positions = np.arange(stop.first_row, stop.end_row, dtype=np.int64)
        if not self._images:
            return _Prepared(stop, _no_images(stop), _labels(samples, positions), positions)
        return self._prepared(stop, samples.read(positions), samples, positions)

    def _prepared(self, stop: Stop, read: Images, samples: Rows, positions: Indices) -> _Prepared:
        return _Prepared(stop, self._as_inputs(read), _labels(samples, positions), positions)


def _labels(samples: Rows, positions: Indices) -> Indices:
    return samples.labels[positions].astype(np.int64, copy=False)


def _tokens(rows: Bytes) -> Indices:
    return rows.astype(np.int64)


def _no_images(stop: Stop) -> NDArray[np.float32]:
    return np.empty((stop.num_rows, 0), dtype=np.float32)


def _micro_batch(item: _Prepared) -> MicroBatch:
    stop = item.stop
    return MicroBatch(
        activation=() if item.inputs is None else _tensor(item.inputs),
        target=_tensor(item.labels),
        positions=_tensor(item.positions),
        split=stop.split,
        epoch=stop.epoch,
        step=stop.step,
        index=stop.index,
        row_start=stop.row_start,
        batch_rows=stop.batch_rows,
        closes_step=stop.closes_step,
        closes_split=stop.closes_split,
        closes_phase=stop.closes_phase,
        share_of=stop.share_of,
    )


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(array)
