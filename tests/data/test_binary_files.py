"""CIFAR and STL-10 files of a few images, made here, with their own table of sizes and checksums."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

from pipetrgl.config.schema import DataConfig
from pipetrgl.data.catalogue import load
from pipetrgl.data.cifar import CIFAR10, CIFAR100, CifarFiles, cifar
from pipetrgl.data.stl10 import STL10, StlFiles, stl10
from pipetrgl.data.verified import KnownFile
from pipetrgl.errors import DataError


def put(folder: Path, name: str, content: bytes) -> KnownFile:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return KnownFile(name, len(content), hashlib.md5(content, usedforsecurity=False).hexdigest())


def record(label: bytes, pixels: np.ndarray) -> bytes:
    return label + pixels.astype(np.uint8).tobytes()


RAMP = np.arange(3 * 32 * 32) % 251


def fake_cifar(folder: Path, known: CifarFiles, label_bytes: int) -> CifarFiles:
    """Two classes; train holds them as 1, 0, test as 0, 1. Image i is the ramp plus i."""
    coarse = b"\x13" * (label_bytes - 1)
    train = [put(folder, f"train{i}.bin", record(coarse + bytes([1 - i]), RAMP + i)) for i in range(2)]
    test = put(folder, "test.bin", b"".join(record(coarse + bytes([i]), RAMP + i) for i in range(2)))
    return dataclasses.replace(known, train=tuple(train), test=(test,), num_classes=2)


@pytest.mark.parametrize(("known", "label_bytes"), [(CIFAR10, 1), (CIFAR100, 2)])
def test_cifar_records_are_parsed(tmp_path: Path, known: CifarFiles, label_bytes: int) -> None:
    files = fake_cifar(tmp_path / known.folder, known, label_bytes)
    data = cifar(DataConfig(name="cifar10"), {"PIPETRGL_DATA": str(tmp_path)}, files)
    assert data.train.labels.tolist() == [1, 0] and data.test.labels.tolist() == [0, 1]
    image = data.train.read(np.array([1]))[0]
    assert image[:, 0, :3].tolist() == [[1, 2, 3], [21, 22, 23], [41, 42, 43]]  # 1024 % 251 = 20
    assert image[0, 1, 0] == 33


def test_a_truncated_cifar_file_tells_both_sizes(tmp_path: Path) -> None:
    files = fake_cifar(tmp_path, CIFAR10, 1)
    (tmp_path / "test.bin").write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match=r"test\.bin: got 100 bytes, expected 6146"):
        cifar(DataConfig(name="cifar10", root=str(tmp_path)), {}, files)


def test_a_changed_pixel_is_found_by_its_checksum(tmp_path: Path) -> None:
    files = fake_cifar(tmp_path, CIFAR10, 1)
    content = bytearray((tmp_path / "test.bin").read_bytes())
    content[7] ^= 1
    (tmp_path / "test.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"test\.bin: the content has MD5 \w+, expected \w+; it is damaged"):
        cifar(DataConfig(name="cifar10", root=str(tmp_path)), {}, files)


def test_without_a_checksum_unequal_classes_are_found(tmp_path: Path) -> None:
    files = fake_cifar(tmp_path, CIFAR100, 2)
    content = bytearray((tmp_path / "test.bin").read_bytes())
    content[1] = 9
    (tmp_path / "test.bin").write_bytes(content)
    unchecked = dataclasses.replace(files, test=(KnownFile("test.bin", len(content)),))
    with pytest.raises(DataError, match=r"label 0 occurs 0 times in test\.bin, expected 1 times each of 0 to 1"):
        cifar(DataConfig(name="cifar100", root=str(tmp_path)), {}, unchecked)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_a_missing_data_set_tells_which_archive_to_get(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"(cifar-10-binary|cifar-100-binary|stl10_binary)\.tar\.gz"):
        load(DataConfig(name=name, root=str(tmp_path)), seed=0)


def fake_stl(folder: Path) -> StlFiles:
    """Ten images, one of each class; image i is i everywhere but for its second stored pixel."""
    images = np.repeat(np.arange(10, dtype=np.uint8), 3 * 96 * 96).reshape(10, -1)
    images[:, 1] = 200
    labels = bytes(range(1, 11))
    train = put(folder, "train_X.bin", images.tobytes()), put(folder, "train_y.bin", labels)
    test = put(folder, "test_X.bin", images.tobytes()), put(folder, "test_y.bin", labels)
    return StlFiles(train, test)


def test_stl_images_are_stored_column_by_column(tmp_path: Path) -> None:
    data = stl10(DataConfig(name="stl10", root=str(tmp_path)), {}, fake_stl(tmp_path))
    image = data.train.read(np.array([4]))[0]
    assert image[0, :2, :2].tolist() == [[4, 4], [200, 4]]  # the second stored pixel is below the first
    assert data.train.labels.tolist() == list(range(10))


def test_an_stl_label_of_zero_is_an_error(tmp_path: Path) -> None:
    files = fake_stl(tmp_path)
    labels = put(tmp_path, "test_y.bin", bytes(range(10)))
    with pytest.raises(DataError, match=r"label 9 occurs 0 times in test_y\.bin"):
        stl10(
            DataConfig(name="stl10", root=str(tmp_path)), {}, dataclasses.replace(files, test=(files.test[0], labels))
        )


def test_published_sizes_are_those_of_the_images() -> None:
    assert sum(file.num_bytes for file in CIFAR10.train) == 50_000 * (1 + 3072)
    assert [file.num_bytes for file in (*CIFAR100.train, *CIFAR100.test)] == [50_000 * 3074, 10_000 * 3074]
    assert [file.num_bytes for file in (STL10.train[0], STL10.test[0])] == [5_000 * 27_648, 8_000 * 27_648]
