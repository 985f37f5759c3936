"""R's serialised values, written by hand, whole and damaged; R itself has written the novels of test_text.py."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import pytest

from pipetrgl.data.janeausten import novels
from pipetrgl.data.rdata import Refused, parse, read_database
from pipetrgl.errors import DataError

NIL = b"\0\0\0\xfe"


def ints(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}i", *numbers)


def value(item: bytes, version: int = 3) -> bytes:
    return b"X\n" + ints(version, 0x40201, 0x30500) + (ints(5) + b"UTF-8" if version == 3 else b"") + item


def string(text: str, flags: int = 0x8009) -> bytes:
    return ints(flags, len(text.encode())) + text.encode()


def strings(*texts: str) -> bytes:
    return ints(16, len(texts)) + b"".join(map(string, texts))


def named(**items: bytes) -> bytes:
    """A list whose only attribute is its names; a symbol is written out where it is met first."""
    attribute = ints(0x402, 1) + string("names") + strings(*items) + NIL
    return ints(0x213, len(items)) + b"".join(items.values()) + attribute


def database(folder: Path, compressed: int = 1, **variables: bytes) -> Path:
    """name.rdx and name.rdb as `tools:::makeLazyLoadDB` makes them."""
    folder.mkdir(parents=True)
    content, places = b"", {}
    for name, item in variables.items():
        packed = struct.pack(">I", len(value(item))) + zlib.compress(value(item))
        places[name] = ints(13, 2, len(content), len(packed))
        content += packed
    # the names of the outer list refer back to the symbol that the inner one has met
    outer = ints(0x402, 0x1FF) + strings("variables", "references", "compressed") + NIL
    index = ints(0x213, 3) + named(**places) + ints(19, 0) + ints(10, 1, compressed) + outer
    (folder / "Rdata.rdx").write_bytes(gzip.compress(value(index)))
    (folder / "Rdata.rdb").write_bytes(content)
    return folder


@pytest.mark.parametrize("version", [2, 3])
def test_numbers_strings_and_lists_are_read(version: int) -> None:
    assert parse(value(ints(13, 2, 7, -1), version)) == [7, -1]
    assert parse(value(strings("a", "", "é"), version)) == ["a", "", "é"]
    assert parse(value(named(x=ints(10, 1, 1), y=ints(19, 1) + NIL), version)) == {"x": [1], "y": [None]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"A\n" + value(NIL)[2:], "no value in R's XDR format"),
        (value(NIL, version=4), "version 4"),
        (value(NIL) + b"\0", "1 bytes behind the value"),
        (value(ints(3)), "R's type 3 "),  # a closure: code
        (value(ints(238)), "R's type 238 "),
        (value(ints(0x20D, 1, 5) + ints(0x402, 1) + string("dim") + ints(13, 1, 1) + NIL), r"attributes \['dim'\]"),
        (value(ints(16, 1, 9, -1)), "a missing string"),
        (value(ints(16, 1) + string("a", flags=0x4009)), "neither ASCII nor UTF-8"),
        (value(ints(16, 1_000_000)), "a length of 1000000 with 0 bytes left"),
        (value(ints(13, 2, 7, 7))[:-1], "7 bytes where 8 are expected"),
        (value(ints(19, 1) * 60 + NIL), "more than 50 deep"),
    ],
)
def test_anything_else_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(Refused, match=message):
        parse(content)


def test_a_database_holds_its_variables_by_name(tmp_path: Path) -> None:
    folder = database(tmp_path / "d", emma=strings("EMMA", ""), persuasion=strings("Persuasion"))
    assert read_database(folder, "Rdata") == {"emma": ["EMMA", ""], "persuasion": ["Persuasion"]}


def test_a_damaged_database_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    folder = database(tmp_path / "d", emma=strings("EMMA"))
    whole = (folder / "Rdata.rdb").read_bytes()
    for damaged in (whole[:-1], whole[:-9] + bytes(9), b"\xff" + whole[1:], b""):
        (folder / "Rdata.rdb").write_bytes(damaged)
        with pytest.raises(DataError, match=r"Rdata\.rdb: not read, .*; install its package again"):
            read_database(folder, "Rdata")


def test_other_compressions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not compressed by zlib"):
        read_database(database(tmp_path / "d", compressed=3, emma=strings("EMMA")), "Rdata")


def test_novels_are_their_lines_in_the_order_of_the_package(tmp_path: Path) -> None:
    database(tmp_path / "here" / "janeaustenr" / "data", emma=strings("EMMA", "é"), persuasion=strings("P"))
    assert novels([tmp_path / "nowhere", tmp_path / "here"]) == "EMMA\né\nP\n".encode()
    database(tmp_path / "other" / "janeaustenr" / "data", emma=ints(13, 1, 5))
    with pytest.raises(DataError, match="'emma' is no list of lines"):
        novels([tmp_path / "other"])


def test_a_missing_package_names_it_and_the_option(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"(?s)/janeaustenr\nInstall it: apt-get install r-cran-janeaustenr.*data\.root"
    ):
        novels([tmp_path])
