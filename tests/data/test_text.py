"""A text in rows: what is read and what is asked for, three parts of the file, and the real novels."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from pipetrgl.config.schema import DataConfig, EvaluateConfig, TrainConfig
from pipetrgl.data.catalogue import load
from pipetrgl.data.dataset import DataSpec
from pipetrgl.data.itinerary import Itinerary
from pipetrgl.data.janeausten import novels
from pipetrgl.data.loader import Loader
from pipetrgl.errors import DataError


def config(folder: Path, content: bytes, **options: object) -> DataConfig:
    (folder / "text").write_bytes(content)
    return DataConfig.model_validate({"name": "text", "root": str(folder / "text"), "context": 3, **options})


def test_rows_follow_each_other_and_ask_for_the_next_byte(tmp_path: Path) -> None:
    #  20 rows of 4 bytes and a rest of 3: the last 2 rows test, the last 0.5 * 18 of the others validation
    data = load(config(tmp_path, bytes(range(83)), valid_fraction=0.5), seed=0)
    assert data.spec == DataSpec("text", 9, 9, 2, (3,), 256)
    assert data.train.read(np.array([0, 8])).tolist() == [[0, 1, 2], [32, 33, 34]]
    assert data.train.labels[[0, 8]].tolist() == [[1, 2, 3], [33, 34, 35]]
    assert data.valid.read(np.array([0, 8])).tolist() == [[36, 37, 38], [68, 69, 70]]
    assert data.test.labels.tolist() == [[73, 74, 75], [77, 78, 79]]


def test_splits_do_not_depend_on_the_seed_and_num_train_keeps_the_first_rows(tmp_path: Path) -> None:
    whole, part = config(tmp_path, bytes(range(80))), config(tmp_path, bytes(range(80)), num_train=2)
    assert load(whole, seed=0).train.labels.tolist() == load(whole, seed=1).train.labels.tolist()
    assert load(part, seed=0).train.labels.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert load(part, seed=0).valid.labels.tolist() == load(whole, seed=0).valid.labels.tolist()


def test_the_loader_hands_on_integers_as_they_are_and_a_target_for_each(tmp_path: Path) -> None:
    options = config(tmp_path, "Jane Austen wrote é. ".encode() * 9)
    data = load(options, seed=0)
    itinerary = Itinerary(TrainConfig(epochs=1, batch=8), EvaluateConfig(), data.spec, num_stages=1)
    with Loader(data, itinerary, options, seed=0) as loader:
        batches = list(loader)
    for batch in batches:
        assert isinstance(batch.activation, torch.Tensor)
        assert batch.activation.dtype == batch.target.dtype == torch.int64
        assert batch.activation.shape == batch.target.shape == (batch.num_rows, 3)
        assert torch.equal(batch.activation[:, 1:], batch.target[:, :-1])


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"caf\xe9 " * 20, {}, "is no UTF-8 text: invalid continuation byte at byte 3"),
        (b"a" * 39, {}, "a text of 39 bytes has 9 rows of 4; at least 10 are needed"),
        (b"a" * 80, {"num_train": 17}, "data.num_train: 17 is not allowed. The training part has 16 rows of 4 bytes"),
        (b"a" * 80, {"root": "/nowhere"}, "data.root: cannot read the text '/nowhere': No such file"),
        (b"a" * 80, {"root": "/"}, "data.root: cannot read the text '/': Is a directory"),
    ],
)
def test_a_text_that_cannot_be_used_is_an_error(
    tmp_path: Path, content: bytes, options: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(config(tmp_path, content, **options), seed=0)


def test_jane_austens_novels_are_what_r_reads(tmp_path: Path) -> None:
    #  the MD5 of what R 4.2 writes with writeLines(enc2utf8(..)), for r-cran-janeaustenr 1.0.0, a novel after another
    text = novels()
    assert hashlib.md5(text, usedforsecurity=False).hexdigest() == "c696ae8c39618201e961485d42e054f1"
    assert text.startswith(b"EMMA\n\nBy Jane Austen\n") and text.endswith(b"THE END\n")
    spec = load(DataConfig(name="text"), seed=0).spec
    assert (spec.num_train, spec.num_valid, spec.num_test) == (25_273, 2_808, 3_120)  # of 4,025,029 // 129 rows
