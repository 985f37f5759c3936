"""IDX files of three images of 2 x 2, whole and damaged."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from pipetrgl.config.schema import DataConfig
from pipetrgl.data.catalogue import load
from pipetrgl.data.idx import fashion_mnist, mnist_idx, read_idx
from pipetrgl.errors import DataError

PIXELS = bytes(range(12))
IMAGES = bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 2]) + PIXELS
LABELS = bytes([0, 0, 8, 1, 0, 0, 0, 3]) + bytes([1, 0, 1])


def write(folder: Path) -> DataConfig:
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte").write_bytes(IMAGES)
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(LABELS))
    return DataConfig(name="mnist_idx", root=str(folder), valid_fraction=0.0)


def test_plain_and_gzipped_files_are_read(tmp_path: Path) -> None:
    data = load(write(tmp_path), seed=0)
    assert (data.spec.sample_shape, data.spec.num_classes) == ((1, 2, 2), 2)
    assert data.test.read(np.array([2])).tolist() == [[[[8, 9], [10, 11]]]]
    assert data.test.labels.tolist() == [1, 0, 1]


def test_the_variable_names_a_folder_of_data_sets(tmp_path: Path) -> None:
    write(tmp_path / "MNIST" / "raw")
    config = DataConfig(name="mnist_idx", valid_fraction=0.0)
    assert load(config, seed=0, environ={"PIPETRGL_DATA": str(tmp_path)}).spec.num_train == 3


def test_root_keeps_the_variable_from_being_tried(tmp_path: Path) -> None:
    write(tmp_path / "here")
    config = DataConfig(name="mnist_idx", root=str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match="elsewhere: no such folder"):
        load(config, seed=0, environ={"PIPETRGL_DATA": str(tmp_path / "here")})


def test_a_missing_data_set_tells_where_it_was_sought(tmp_path: Path) -> None:
    config = DataConfig(name="fashion_mnist")
    with pytest.raises(DataError) as caught:
        fashion_mnist(config, {"PIPETRGL_DATA": str(tmp_path)}, usual=(tmp_path / "usual",))
    text = str(caught.value)
    assert f"{tmp_path}/FashionMNIST/raw: no such folder" in text
    assert f"{tmp_path}/usual: no such folder" in text
    assert f"{tmp_path}: no train-images-idx3-ubyte" in text
    assert "apt-get install dataset-fashion-mnist" in text


def test_without_any_place_the_error_says_what_to_set() -> None:
    with pytest.raises(DataError, match=r"nowhere: data.root and \$PIPETRGL_DATA are unset"):
        mnist_idx(DataConfig(name="mnist_idx"), {})


def test_a_half_copied_folder_tells_what_it_lacks(tmp_path: Path) -> None:
    config = write(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(DataError, match="lacks t10k-images-idx3-ubyte"):
        load(config, seed=0)


def test_a_truncated_file_tells_both_sizes(tmp_path: Path) -> None:
    config = write(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(IMAGES[:-5])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte: got 23 bytes, expected 28 for shape \(3, 2, 2\)"):
        load(config, seed=0)


@pytest.mark.parametrize("content", [b"", IMAGES[:4], IMAGES[:11]])
def test_a_file_that_ends_in_its_head_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match="got|starts with nothing"):
        read_idx(tmp_path / "file", num_axes=3)


def test_a_file_of_another_format_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"<html>")
    with pytest.raises(DataError, match="starts with 3c 68 74 6d, expected 00 00 08 03"):
        read_idx(tmp_path / "file", num_axes=3)


def test_a_truncated_gzip_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file.gz").write_bytes(gzip.compress(IMAGES)[:-9])
    with pytest.raises(DataError, match=r"file\.gz: cannot be read: .*ended"):
        read_idx(tmp_path / "file", num_axes=3)


def test_images_without_labels_are_an_error(tmp_path: Path) -> None:
    config = write(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 1, 0]))
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte holds 3 images, t10k-labels-idx1-ubyte 2 labels"):
        load(config, seed=0)


def test_other_files_under_fashion_mnists_names_are_an_error(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match="the content has MD5 .*, expected f4a8712d7a061bf5bd6d2ca38dc4d50a"):
        load(DataConfig(name="fashion_mnist", root=str(tmp_path)), seed=0)


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="needs Debian's package dataset-fashion-mnist"
)
def test_fashion_mnist_is_found_where_debian_puts_it() -> None:
    spec = load(DataConfig(name="fashion_mnist"), seed=0).spec
    assert (spec.num_train, spec.num_valid, spec.num_test) == (54_000, 6_000, 10_000)
