"""Folders of image files, laid out as ImageNet or TinyImageNet are, read when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipetrgl.config.schema import DataConfig
from pipetrgl.data.dataset import Collection, Images, Indices
from pipetrgl.data.places import find
from pipetrgl.errors import DataError

_SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".webp"})
_ANNOTATIONS = "val_annotations.txt"
_TINY_SIZE = 64


class ImageFiles:
    """Images that lie in a file each, as RGB: the shorter side resized to `size`, the centre cut out."""

    def __init__(self, paths: Sequence[Path], labels: Indices, size: int) -> None:
        self.labels = labels
        self._paths = paths
        self._size = size

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, indices: Indices) -> Images:
        images = np.empty((len(indices), 3, self._size, self._size), np.uint8)
        for row, index in enumerate(indices):
            images[row] = read_image(self._paths[index], self._size)
        return images


def image_folder(config: DataConfig, environ: Mapping[str, str]) -> Collection:
    """A data set in one of two layouts; the folder `val` is the test split, classes are numbered by name.

        ImageNet       train/CLASS/*.JPEG          val/CLASS/*.JPEG
        TinyImageNet   train/CLASS/images/*.JPEG   val/images/*.JPEG   val/val_annotations.txt

    Channel means and standard deviations are ImageNet's.

    Raises:
        DataError: no such folder, no image or an unknown class in it, no `data.image_size`, or no Pillow.
    """
    _require_pillow()
    root = find(
        config,
        environ,
        inner=("tiny-imagenet-200", "imagenet"),
        files=("train", "val"),
        advice="An image folder holds train/CLASS/*.JPEG and val/CLASS/*.JPEG (or TinyImageNet's val/images).",
    )
    tiny = (root / "val" / _ANNOTATIONS).exists()
    size = config.image_size or (_TINY_SIZE if tiny else None)
    if size is None:
        raise DataError(
            f"data.image_size: needed for {root}, whose images may have any size. Set it, for example to 224."
        )
    classes = sorted(folder.name for folder in (root / "train").iterdir() if folder.is_dir())
    numbers = {name: number for number, name in enumerate(classes)}
    train = _samples(root / "train", _by_class(root / "train"), numbers, size)
    test = _samples(root / "val", _by_annotation(root / "val") if tiny else _by_class(root / "val"), numbers, size)
    return Collection(train, test, (3, size, size), len(classes), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def read_image(path: Path, size: int) -> NDArray[np.uint8]:
    """(3, size, size), bilinear; grey images and palettes become RGB.

    Raises:
        DataError: not an image that Pillow can read.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError on a damaged PNG
        raise DataError(f"{path}: cannot be read as an image: {error}. Replace or remove it.") from error
    width, height = image.size
    shorter = min(width, height)
    if shorter != size:
        image = image.resize((round(width * size / shorter), round(height * size / shorter)), Image.Resampling.BILINEAR)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError(
            "data.name: 'image_folder' reads images with Pillow, which is absent: pip install pillow."
        ) from error


def _by_class(split: Path) -> Iterator[tuple[Path, str]]:
    """Every image file with its class, in the order of their names."""
    for folder in sorted(path for path in split.iterdir() if path.is_dir()):
        inner = folder / "images"
        for path in sorted((inner if inner.is_dir() else folder).iterdir()):
            if path.suffix.lower() in _SUFFIXES:
                yield path, folder.name


def _by_annotation(split: Path) -> Iterator[tuple[Path, str]]:
    for line in (split / _ANNOTATIONS).read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        yield split / "images" / name, rest.partition("\t")[0]


def _samples(split: Path, found: Iterator[tuple[Path, str]], numbers: Mapping[str, int], size: int) -> ImageFiles:
    files = list(found)
    if not files:
        raise DataError(
            f"{split}: holds no image. Looked for {', '.join(sorted(_SUFFIXES))} in the folder of each class."
        )
    for path, name in files:
        if name not in numbers:
            raise DataError(f"{path}: is of class '{name}', of which {split.with_name('train')} has no folder.")
        if not path.exists():
            raise DataError(f"{path}: named in {_ANNOTATIONS} but missing. Unpack the archive again.")
    return ImageFiles([path for path, _ in files], np.array([numbers[name] for _, name in files], np.int64), size)
