"""Image folders of a handful of plain-coloured files."""

import sys
from pathlib import Path

import numpy as np
import pytest

from pipetrgl.config.schema import DataConfig
from pipetrgl.data.catalogue import load
from pipetrgl.data.image_folder import read_image
from pipetrgl.errors import DataError

Image = pytest.importorskip("PIL.Image")


def paint(path: Path, colour: object, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def imagenet(root: Path, **options: object) -> DataConfig:
    for split in ("train", "val"):
        paint(root / split / "n02" / "b.png", (0, 255, 0))
        paint(root / split / "n01" / "a.png", (255, 0, 0))
        (root / split / "n01" / "readme.txt").write_text("no image")
    return DataConfig(name="image_folder", root=str(root), valid_fraction=0.0, **options)


def test_imagenet_layout_numbers_the_classes_by_name(tmp_path: Path) -> None:
    data = load(imagenet(tmp_path, image_size=4), seed=0)
    assert (data.spec.num_train, data.spec.num_test, data.spec.num_classes) == (2, 2, 2)
    assert data.spec.sample_shape == (3, 4, 4)
    assert data.train.labels.tolist() == [0, 1]
    assert data.train.read(np.array([1, 0]))[:, :, 0, 0].tolist() == [[0, 255, 0], [255, 0, 0]]


def test_imagenet_layout_needs_an_image_size(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.image_size: needed for .* for example to 224"):
        load(imagenet(tmp_path), seed=0)


def test_tiny_imagenet_layout_reads_the_annotations(tmp_path: Path) -> None:
    for name in ("n01", "n02"):
        paint(tmp_path / "train" / name / "images" / f"{name}_0.JPEG", (9, 9, 9), (64, 64))
    paint(tmp_path / "val" / "images" / "val_0.JPEG", (9, 9, 9), (64, 64))
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t62\t62\n")
    data = load(DataConfig(name="image_folder", root=str(tmp_path), valid_fraction=0.0), seed=0)
    assert data.spec.sample_shape == (3, 64, 64)
    assert data.train.labels.tolist() == [0, 1] and data.test.labels.tolist() == [1]
    assert data.test.read(np.array([0])).tolist() == np.full((1, 3, 64, 64), 9).tolist()


def test_the_centre_of_a_wide_image_is_kept(tmp_path: Path) -> None:
    # 2 x 6 pixels in columns 0 1 2 3 4 5: the middle two.
    columns = np.tile(np.arange(6, dtype=np.uint8), (2, 1))
    Image.fromarray(columns).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png", size=2).tolist() == [[[2, 3], [2, 3]]] * 3


def test_the_shorter_side_is_resized(tmp_path: Path) -> None:
    paint(tmp_path / "tall.png", (1, 2, 3), size=(10, 31))
    assert read_image(tmp_path / "tall.png", size=5).shape == (3, 5, 5)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    config = imagenet(tmp_path, image_size=4)
    (tmp_path / "train" / "n02" / "b.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"n02/b\.png: cannot be read as an image"):
        load(config, seed=0).train.read(np.array([1]))


def test_a_validation_class_unknown_to_train_is_an_error(tmp_path: Path) -> None:
    config = imagenet(tmp_path, image_size=4)
    paint(tmp_path / "val" / "n03" / "c.png", (0, 0, 0))
    with pytest.raises(DataError, match=r"c\.png: is of class 'n03', of which .*train has no folder"):
        load(config, seed=0)


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match=r"train: holds no image\. Looked for \.bmp"):
        load(DataConfig(name="image_folder", root=str(tmp_path), image_size=4), seed=0)


def test_without_pillow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match="pip install pillow"):
        load(DataConfig(name="image_folder", root=str(tmp_path)), seed=0)
