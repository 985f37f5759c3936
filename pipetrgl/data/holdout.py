"""Which training images are held out for validation, class by class."""

from __future__ import annotations

import numpy as np

from pipetrgl.data.dataset import Indices
from pipetrgl.errors import DataError


def hold_out(labels: Indices, fraction: float, stream: np.random.Generator) -> tuple[Indices, Indices]:
    """Parts the indices of `labels` into train and validation, stratified by class.

    Class c gives fraction * count_c images, rounded down; the images that rounding leaves over go to the classes with
    the largest remainders, so that the validation split has round(fraction * N) of them in all.

    Returns:
        Train and validation indices, each ascending: both splits keep the stored order.
    Raises:
        DataError: a class would have no training image left.
    """
    classes, counts = np.unique(labels, return_counts=True)
    shares = counts * fraction
    taken = np.floor(shares).astype(np.int64)
    num_left_over = round(len(labels) * fraction) - int(taken.sum())
    taken[np.argsort(taken - shares, kind="stable")[:num_left_over]] += 1
    emptied = classes[taken == counts]
    if len(emptied):
        raise DataError(
            f"data.valid_fraction: {fraction} leaves no training image of class {emptied[0]}, which has "
            f"{counts[taken == counts][0]}. Use a smaller fraction, or 0 for no validation split."
        )
    order = stream.permutation(len(labels))
    rank = _rank_within_class(labels, order)
    held = rank < taken[np.searchsorted(classes, labels)]
    return np.flatnonzero(~held).astype(np.int64), np.flatnonzero(held).astype(np.int64)


def keep_balanced(labels: Indices, num_kept: int, stream: np.random.Generator) -> Indices:
    """`num_kept` ascending indices, taken from the classes in turn; a class that runs out is passed over.

    Raises:
        DataError: more images asked for than there are, or fewer than one a class.
    """
    num_classes = len(np.unique(labels))
    if not num_classes <= num_kept <= len(labels):
        raise DataError(
            f"data.num_train: {num_kept} is not allowed. The training split without validation has {len(labels)} "
            f"images of {num_classes} classes; allowed: {num_classes} to {len(labels)}."
        )
    rank = _rank_within_class(labels, stream.permutation(len(labels)))
    return np.sort(np.lexsort((labels, rank))[:num_kept]).astype(np.int64)


def _rank_within_class(labels: Indices, order: Indices) -> Indices:
    """Place of every image among those of its class, when they are visited in `order`."""
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.arange(len(labels)) - np.repeat(starts, counts)
    return rank
