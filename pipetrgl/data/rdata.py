"""R's serialised values, as far as packages keep plain data in them: numbers, strings, lists, and their names.

a lazy-load database: name.rdx   gzip of a value: where each variable lies in name.rdb
                      name.rdb   a variable after another: 4 bytes, its unpacked length, then zlib of a value
a value: "X\\n", versions, then items: 4 bytes of flags (type in the lowest 8 bits), and what the type asks for

Nothing is executed and nothing is guessed: what is not written here ends in an error.
Source: R Internals, section 1.8, and R's serialize.c.
"""

from __future__ import annotations

import enum
import struct
import zlib
from pathlib import Path
from typing import Any, final

from pipetrgl.errors import DataError

MAX_BYTES = 2**28
"""Of one value, unpacked."""
_MAX_DEEP = 50
_GZIP = 16 + zlib.MAX_WBITS
_HAS_ATTRIBUTES = 0x200
_PAIR = 0x402
"""Flags of a pair with a tag and without attributes."""
_UTF8_OR_ASCII = (0x8 | 0x40) << 12


def read_database(folder: Path, name: str) -> dict[str, Any]:
    """Every variable of a lazy-load database, by name.

    Raises:
        DataError: the files are damaged, or hold what this reader does not know.
    """
    index_file, values_file = folder / f"{name}.rdx", folder / f"{name}.rdb"
    index, values = index_file.read_bytes(), values_file.read_bytes()
    try:
        found = parse(_unpacked(index, _GZIP))
        if found["compressed"] != [1]:
            raise Refused("values that are not compressed by zlib")
        return {variable: parse(_value(values, place)) for variable, place in found["variables"].items()}
    except (Refused, zlib.error, struct.error, LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{values_file}: not read, {error or type(error).__name__}; install its package again"
        ) from error


class _Type(enum.IntEnum):
    SYMBOL = 1
    PAIRS = 2
    STRING = 9
    LOGICALS = 10
    INTEGERS = 13
    STRINGS = 16
    LIST = 19
    NIL = 254
    REFERENCE = 255


_VECTORS = (_Type.LOGICALS, _Type.INTEGERS, _Type.STRINGS, _Type.LIST)


class Refused(Exception):
    """The message ends a sentence about what was met."""


def parse(content: bytes) -> Any:
    """One value: a list of ints or strs, a list of values, a dict where these have names, or None."""
    return _Parser(content).value()


def _value(values: bytes, place: list[int]) -> bytes:
    first, size = place
    if first < 0 or size < 4 or first + size > len(values):
        raise Refused(f"a variable at {first} of {size} bytes in a file of {len(values)}")
    (length,) = struct.unpack_from(">I", values, first)
    content = _unpacked(values[first + 4 : first + size], zlib.MAX_WBITS)
    if len(content) != length:
        raise Refused(f"a variable of {len(content)} bytes, expected {length}")
    return content


def _unpacked(packed: bytes, kind: int) -> bytes:
    reader = zlib.decompressobj(kind)
    content = reader.decompress(packed, MAX_BYTES)
    if not reader.eof:
        raise Refused(f"a value that is cut off, or has more than {MAX_BYTES} bytes")
    return content


@final
class _Parser:
    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0
        self._symbols: list[str] = []
        self._deep = 0

    def value(self) -> Any:
        if self._bytes(2) != b"X\n":
            raise Refused("no value in R's XDR format")
        version, _, _ = self._int(), self._int(), self._int()
        if version not in (2, 3):
            raise Refused(f"version {version} of R's format")
        if version == 3:
            self._bytes(self._length())  # name of the encoding in which R ran; strings say their own
        value = self._item()
        if self._at != len(self._content):
            raise Refused(f"{len(self._content) - self._at} bytes behind the value")
        return value

    def _item(self) -> Any:
        self._deep += 1
        if self._deep > _MAX_DEEP:
            raise Refused(f"lists in lists, more than {_MAX_DEEP} deep")
        flags = self._int()
        kind = flags & 0xFF
        value: Any = None
        match kind:
            case _Type.NIL:
                pass
            case _Type.STRING:
                value = self._string(flags)
            case _Type.LOGICALS | _Type.INTEGERS:
                size = self._length()
                value = list(struct.unpack(f">{size}i", self._bytes(4 * size)))
            case _Type.STRINGS | _Type.LIST:
                value = [self._item() for _ in range(self._length())]
            case _Type.SYMBOL:
                value = self._item()
                self._symbols.append(value)
            case _Type.REFERENCE:
                value = self._symbols[(flags >> 8) - 1]
            case _Type.PAIRS if flags == _PAIR:
                value = self._pairs()
            case _:
                raise Refused(f"a value of R's type {kind} with flags {flags:#x}")
        if kind in _VECTORS and flags & _HAS_ATTRIBUTES:
            value = self._named(kind, value, self._item())
        self._deep -= 1
        return value

    def _pairs(self) -> dict[str, Any]:
        """Tag and value, and then the rest, which is another pair or nil."""
        pairs: dict[str, Any] = {}
        while True:
            tag = self._item()
            pairs[tag] = self._item()
            flags = self._int()
            if flags == _Type.NIL:
                return pairs
            if flags != _PAIR:
                raise Refused(f"a pair with flags {flags:#x}")

    def _named(self, kind: int, value: list[Any], attributes: dict[str, Any]) -> Any:
        if kind != _Type.LIST or set(attributes) != {"names"} or len(attributes["names"]) != len(value):
            raise Refused(f"attributes {sorted(attributes)} of a value of R's type {kind}")
        return dict(zip(attributes["names"], value, strict=True))

    def _string(self, flags: int) -> str:
        size = self._int()
        if size < 0:
            raise Refused("a missing string, NA")
        if not flags & _UTF8_OR_ASCII:
            raise Refused("a string that is neither ASCII nor UTF-8")
        return self._bytes(size).decode()

    def _length(self) -> int:
        size = self._int()
        if not 0 <= size <= len(self._content) - self._at:
            raise Refused(f"a length of {size} with {len(self._content) - self._at} bytes left")
        return size

    def _int(self) -> int:
        (number,) = struct.unpack_from(">i", self._content, self._at)
        self._at += 4
        return int(number)

    def _bytes(self, size: int) -> bytes:
        part = self._content[self._at : self._at + size]
        if len(part) != size:
            raise Refused(f"{len(part)} bytes where {size} are expected")
        self._at += size
        return part
