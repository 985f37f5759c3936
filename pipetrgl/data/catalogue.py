"""The data sets by name, each loaded into the three splits that a run uses."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pipetrgl.config.schema import DataConfig
from pipetrgl.data.cifar import CIFAR10, CIFAR100, cifar
from pipetrgl.data.dataset import Collection, Dataset, DataSpec, SubsetSamples
from pipetrgl.data.holdout import hold_out, keep_balanced
from pipetrgl.data.idx import fashion_mnist, mnist_idx
from pipetrgl.data.image_folder import image_folder
from pipetrgl.data.mini import fashion_mnist_mini
from pipetrgl.data.stl10 import stl10
from pipetrgl.data.synthetic import synthetic
from pipetrgl.data.text import text
from pipetrgl.seeds import numpy_stream

_NO_VARIABLES: Mapping[str, str] = MappingProxyType({})


def load(config: DataConfig, seed: int, environ: Mapping[str, str] = _NO_VARIABLES) -> Dataset:
    """The configured data set, with a validation split held out: stratified, or of a text a part of the file.

    Args:
        seed: fixes the validation split, the images that `num_train` keeps and the synthetic images.
        environ: the environment, of which only $PIPETRGL_DATA is read.
    Raises:
        DataError: files missing or damaged, or splits that cannot be made of them.
    """
    if config.name == "text":
        return text(config)
    collection = _published(config, seed, environ)
    train, valid = hold_out(collection.train.labels, config.valid_fraction, numpy_stream(seed, "validation"))
    if config.num_train is not None:
        kept = keep_balanced(collection.train.labels[train], config.num_train, numpy_stream(seed, "num_train"))
        train = train[kept]
    spec = DataSpec(
        name=config.name,
        num_train=len(train),
        num_valid=len(valid),
        num_test=len(collection.test),
        sample_shape=collection.image_shape,
        num_classes=collection.num_classes,
        mean=collection.mean,
        std=collection.std,
    )
    return Dataset(
        spec=spec,
        train=SubsetSamples(collection.train, train),
        valid=SubsetSamples(collection.train, valid),
        test=collection.test,
    )


def _published(config: DataConfig, seed: int, environ: Mapping[str, str]) -> Collection:
    match config.name:
        case "fashion_mnist_mini":
            return fashion_mnist_mini()
        case "fashion_mnist":
            return fashion_mnist(config, environ)
        case "mnist_idx":
            return mnist_idx(config, environ)
        case "cifar10":
            return cifar(config, environ, CIFAR10)
        case "cifar100":
            return cifar(config, environ, CIFAR100)
        case "stl10":
            return stl10(config, environ)
        case "image_folder":
            return image_folder(config, environ)
        case "synthetic":
            return synthetic(config, seed)
        case "text":
            raise AssertionError("a text is no collection of images")
