"""The embedded part of Fashion-MNIST is what the tool makes of Debian's package."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from pipetrgl.config.schema import DataConfig
from pipetrgl.data import mini
from pipetrgl.data.catalogue import load
from pipetrgl.data.mini import fashion_mnist_mini

SHA256 = "f3165a2eb6a7e1521463f41c8a27e45f7048e42c334999a340acc46af83e3866"
TOOL = Path(__file__).parents[2] / "tools" / "make_fashion_mnist_mini.py"
SOURCE = Path("/usr/share/datasets/fashion-mnist")


def test_classes_are_equally_large() -> None:
    collection = fashion_mnist_mini()
    assert np.bincount(collection.train.labels).tolist() == [600] * 10
    assert np.bincount(collection.test.labels).tolist() == [100] * 10


def test_the_committed_file_has_its_checksum() -> None:
    assert hashlib.sha256(mini.PATH.read_bytes()).hexdigest() == SHA256


@pytest.mark.skipif(not SOURCE.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_tool_writes_the_same_bytes_again(tmp_path: Path) -> None:
    specification = importlib.util.spec_from_file_location("make_fashion_mnist_mini", TOOL)
    assert specification is not None and specification.loader is not None
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    tool.make(SOURCE, tmp_path / "again.npz")
    assert hashlib.sha256((tmp_path / "again.npz").read_bytes()).hexdigest() == SHA256


def test_the_licence_lies_beside_it() -> None:
    licence = mini.PATH.with_suffix(".LICENSE").read_text()
    assert "Zalando SE" in licence and "Permission is hereby granted, free of charge" in licence


def test_a_tenth_is_held_out_class_by_class() -> None:
    dataset = load(DataConfig(), seed=0)
    assert (dataset.spec.num_train, dataset.spec.num_valid, dataset.spec.num_test) == (5400, 600, 1000)
    assert np.bincount(dataset.valid.labels).tolist() == [60] * 10
    assert dataset.train.read(np.array([3, 5])).shape == (2, *dataset.spec.sample_shape)
