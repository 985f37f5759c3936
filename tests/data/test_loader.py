"""The loader's micro-batches, bit for bit, and the end of its thread."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from pipetrgl.config.schema import DataConfig, EvaluateConfig, TrainConfig
from pipetrgl.data.catalogue import load
from pipetrgl.data.dataset import Dataset, Images, Indices
from pipetrgl.data.itinerary import Itinerary
from pipetrgl.data.loader import Loader
from pipetrgl.microbatch import MicroBatch, Split

CONFIG = DataConfig(name="synthetic", shape=(3, 6, 5), num_classes=3, samples=33, crop_padding=2, flip=True, prefetch=1)
TRAIN = TrainConfig(epochs=3, batch=8, accumulate=2)
EVALUATE = EvaluateConfig(batch=3, at_start=True)


def dataset(seed: int = 0) -> Dataset:
    return load(CONFIG, seed)


@contextmanager
def loader(data: Dataset, first_step: int = 0, train: TrainConfig = TRAIN) -> Iterator[Loader]:
    before = set(threading.enumerate())  # perhaps one that another test has left
    with Loader(
        data, Itinerary(train, EVALUATE, data.spec, num_stages=1), CONFIG, seed=0, first_step=first_step
    ) as opened:
        yield opened
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "pipetrgl-loader"]


def contents(batch: MicroBatch) -> tuple[object, ...]:
    assert isinstance(batch.activation, torch.Tensor)
    tensors = (batch.activation, batch.target, batch.positions)
    place = (batch.split, batch.epoch, batch.step, batch.index, batch.row_start, batch.batch_rows)
    return (*(tensor.numpy().tobytes() for tensor in tensors), *place, batch.closes_step, batch.closes_split)


def test_every_epoch_brings_every_training_image_once() -> None:
    with loader(dataset()) as stream:
        train = [batch for batch in stream if batch.split is Split.TRAIN]
    for epoch in range(3):
        positions = torch.cat([batch.positions for batch in train if batch.epoch == epoch])
        assert sorted(positions.tolist()) == list(range(30))


def test_micro_batches_hold_float_images_and_integer_labels() -> None:
    data = dataset()
    with loader(data) as stream:
        for batch in stream:
            assert isinstance(batch.activation, torch.Tensor)
            assert batch.activation.dtype == torch.float32 and batch.activation.is_contiguous()
            assert batch.activation.shape == (batch.num_rows, 3, 6, 5)
            samples = {Split.TRAIN: data.train, Split.VALID: data.valid, Split.TEST: data.test}[batch.split]
            assert batch.target.tolist() == samples.labels[batch.positions.numpy()].tolist()


def test_evaluation_keeps_the_stored_order_and_the_images_as_they_are() -> None:
    data = dataset()
    with loader(data) as stream:
        tests = [batch for batch in stream if batch.split is Split.TEST]
    assert torch.cat([batch.positions for batch in tests]).tolist() == list(range(4))
    images = data.test.read(np.arange(4)).astype(np.float64) / 255
    seen = np.concatenate([np.asarray(batch.activation) for batch in tests])
    # float32 rounding of the scale, the product and the sum, each of magnitude up to 4
    np.testing.assert_allclose(seen, (images - 0.5) / 0.25, atol=12 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("first_step", [1, 4, 6, 11])
def test_a_resumed_stream_is_the_tail_of_the_whole_one_bit_for_bit(first_step: int) -> None:
    with loader(dataset()) as stream:
        whole = [contents(batch) for batch in stream]
    with loader(dataset(), first_step) as stream:
        tail = [contents(batch) for batch in stream]
    assert tail and tail == whole[-len(tail) :]


def test_augmentation_of_a_sample_does_not_depend_on_the_batch_size() -> None:
    def images(train: TrainConfig) -> dict[int, bytes]:
        with loader(dataset(), train=train) as stream:
            return {
                int(position): np.asarray(image).tobytes()
                for batch in stream
                if batch.split is Split.TRAIN and batch.epoch == 1
                for position, image in zip(batch.positions, batch.activation, strict=True)
            }

    assert images(TrainConfig(epochs=2, batch=5)) == images(TrainConfig(epochs=2, batch=30, accumulate=7))


def test_no_two_micro_batches_share_memory() -> None:
    with loader(dataset()) as stream:
        kept = [
            (batch.activation, batch.activation.clone())
            for batch in stream
            if isinstance(batch.activation, torch.Tensor)
        ]
    assert len({tensor.data_ptr() for tensor, _ in kept}) == len(kept)
    assert all(torch.equal(tensor, copy) for tensor, copy in kept)


def test_leaving_early_ends_the_thread() -> None:
    with loader(dataset()) as stream:
        next(stream)
        stream.close()
        assert list(stream) == []


def test_closing_a_loader_that_never_started_is_allowed() -> None:
    with loader(dataset()):
        pass


class _BrokenSamples:
    """The second read fails."""

    def __init__(self, data: Dataset) -> None:
        self._samples = data.train
        self.labels = data.train.labels
        self.num_reads = 0

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Indices) -> Images:
        self.num_reads += 1
        if self.num_reads == 2:
            raise OSError("disk gone")
        return self._samples.read(indices)


def test_an_error_in_the_thread_is_raised_where_its_micro_batch_would_have_come() -> None:
    good = dataset()
    data = Dataset(good.spec, _BrokenSamples(good), good.valid, good.test)
    seen = []
    with loader(data) as stream, pytest.raises(OSError, match="disk gone"):
        for batch in stream:
            seen.append(batch.split)
    assert seen == [Split.VALID, Split.TRAIN]
    assert stream.waited_s > 0


def test_the_thread_runs_ahead_by_no_more_than_prefetch() -> None:
    good = dataset()
    samples = _BrokenSamples(good)
    samples.num_reads = 2  # past the failing one
    data = Dataset(good.spec, samples, good.valid, good.test)
    with loader(data) as stream:
        next(stream)  # the validation at the start is one micro-batch
        time.sleep(0.05)
        # one in the queue of length 1, one in the thread's hands
        assert samples.num_reads - 2 <= 2
