"""Data sets by name, down to their specification."""

import json
import random

import numpy as np
import pytest
import torch

from pipetrgl.config.schema import DataConfig
from pipetrgl.data.catalogue import load
from pipetrgl.data.dataset import DataSpec
from pipetrgl.errors import DataError


def synthetic(**options: object) -> DataConfig:
    return DataConfig(name="synthetic", **{"shape": (2, 8, 8), "num_classes": 4, "samples": 80, **options})


def test_specification_survives_json() -> None:
    spec = DataSpec("synthetic", 72, 8, 10, (2, 8, 8), 4)
    assert DataSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_synthetic_counts() -> None:
    assert load(synthetic(), seed=0).spec == DataSpec("synthetic", 72, 8, 10, (2, 8, 8), 4, (0.5, 0.5), (0.25, 0.25))


def test_num_train_is_taken_after_the_validation_split() -> None:
    whole, part = load(synthetic(), seed=0), load(synthetic(num_train=8), seed=0)
    assert np.bincount(part.train.labels).tolist() == [2, 2, 2, 2]
    every = np.arange(8)
    assert np.array_equal(part.valid.read(every), whole.valid.read(every))


def test_synthetic_images_come_from_the_seed_alone() -> None:
    def images(seed: int) -> bytes:
        return load(synthetic(), seed).train.read(np.arange(72)).tobytes()

    first = images(0)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert images(0) == first
    assert images(1) != first


def test_synthetic_is_learnable_from_class_means() -> None:
    data = load(DataConfig(name="synthetic"), seed=0)
    train = data.train.read(np.arange(len(data.train))).reshape(len(data.train), -1).astype(np.float64)
    means = np.stack([train[data.train.labels == label].mean(0) for label in range(10)])
    test = data.test.read(np.arange(256)).reshape(256, -1)
    nearest = ((test[:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == data.test.labels).mean() > 0.95


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 70)])
def test_synthetic_takes_any_shape(shape: tuple[int, int, int]) -> None:
    data = load(synthetic(shape=shape), seed=0)
    assert data.train.read(np.arange(3)).shape == (3, *shape)
    assert len(data.spec.mean) == len(data.spec.std) == shape[0]


def test_fewer_images_than_classes_is_an_error() -> None:
    with pytest.raises(DataError, match="data.samples: 3 images cannot show 4 classes"):
        load(synthetic(samples=3), seed=0)
