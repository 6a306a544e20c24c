"""The one CBOR codec (RFC 8949): strict in what it takes, canonical in what it writes.

Two steps. `scan` walks the bytes without building anything and refuses: more than one item or trailing bytes,
indefinite lengths, nesting deeper than `Limits.depth`, more than `Limits.items` items, any tag but 40 (an array with
its shape) around one of RFC 8746's little-endian typed arrays, half and single floats that are not the shortest form,
integers, lengths and map orders that are not canonical (section 4.2.1), simple values but false, true and null. Only
then `cbor2` builds the objects. So what decodes has exactly one encoding, and a hash over bytes identifies the value.

Cost: O(number of items), and typed arrays are one item whatever their size.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, Final

import cbor2

from sordino_common.errors import CodecError, LocalError
from sordino_common.messages.array import DTYPE_OF_TAG, DTYPES, MAX_RANK, Array

TAG_SHAPED: Final = 40  # RFC 8746 section 3.1.1: [dimensions, typed array], row-major


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds that hold before anything is built. The defaults fit every command that is not a bulk payload."""

    payload_bytes: int = 64 * 1024 * 1024
    depth: int = 12
    items: int = 200_000
    text_bytes: int = 65_536


DEFAULT_LIMITS: Final = Limits()


def encode(value: object) -> bytes:
    """Canonical CBOR of None, bool, int, float, str, bytes, `Array`, and lists, tuples and str-keyed dicts of them."""
    return cbor2.dumps(_to_wire(value), canonical=True)


def decode(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Any:
    """The value that `data` encodes: maps as dict, arrays as list, typed arrays as `Array`.

    Raises `CodecError`, naming the byte offset, on anything that `encode` would not have written."""
    scan(data, limits)
    try:
        return cbor2.loads(
            data,
            tag_hook=_array_of_tag,
            max_depth=limits.depth + 2,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
        )
    except CodecError:
        raise
    except Exception as error:  # noqa: BLE001  cbor2 wraps what a hook raises; whatever it is, the bytes are at fault
        cause = error.__cause__ if isinstance(error.__cause__, CodecError) else error
        raise CodecError(f"CBOR: {cause}") from None


# Exact types: a subclass (an enum, say) is left to the slower way. Rounds of a session pass here several times each.
_PLAIN: Final = frozenset({bool, int, float, str, bytes, type(None)})


def _to_wire(value: object) -> object:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Array):
        return cbor2.CBORTag(TAG_SHAPED, [list(value.shape), cbor2.CBORTag(DTYPES[value.dtype][1], value.data)])
    if isinstance(value, (list, tuple)):
        return [item if type(item) in _PLAIN else _to_wire(item) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise LocalError("codec: map keys must be text")
        return {key: item if type(item) in _PLAIN else _to_wire(item) for key, item in value.items()}
    if isinstance(value, bool | int | float | str | bytes):
        return value
    raise LocalError(f"codec: {type(value).__name__} has no place on the wire")


def _array_of_tag(tag: cbor2.CBORTag, _immutable: bool) -> object:
    if tag.tag == TAG_SHAPED:
        dims, typed = tag.value
        return Array.from_wire(DTYPE_OF_TAG[typed.tag], tuple(dims), typed.value)
    return tag  # an inner typed array; the enclosing tag 40, which `scan` has made sure of, takes it


# --- the scanner -------------------------------------------------------------------------------------------------


def scan(data: bytes, limits: Limits = DEFAULT_LIMITS) -> None:
    """Refuse anything but one canonical, bounded item. Raises `CodecError`; builds nothing."""
    if len(data) > limits.payload_bytes:
        raise CodecError(f"CBOR: {len(data)} bytes, at most {limits.payload_bytes} are taken")
    scanner = _Scanner(data, limits)
    end = scanner.item(0, limits.depth)
    if end != len(data):
        raise CodecError(f"CBOR: {len(data) - end} bytes after the end of the item at byte {end}")


# Whole items of one byte: numbers from -24 to 23, false, true and null. Most items are one of these.
_ONE_BYTE: Final = frozenset((*range(0x18), *range(0x20, 0x38), 0xF4, 0xF5, 0xF6))

_SHORT: Final = frozenset((*range(0x40, 0x58), *range(0x60, 0x78)))  # strings of fewer than 24 bytes


class _Scanner:
    __slots__ = ("data", "items_left", "limits")

    def __init__(self, data: bytes, limits: Limits) -> None:
        self.data = data
        self.limits = limits
        self.items_left = limits.items

    def head(self, at: int) -> tuple[int, int, int, int]:
        """(major type, additional information, argument, offset behind the head) of the item at byte `at`."""
        data = self.data
        if at >= len(data):
            raise CodecError(f"CBOR: ends at byte {at} where an item is expected")
        self.items_left -= 1
        if self.items_left < 0:
            raise CodecError(f"CBOR: more than {self.limits.items} items")
        major, info = data[at] >> 5, data[at] & 31
        if info < 24:
            return major, info, info, at + 1
        if info > 27:
            raise CodecError(f"CBOR: indefinite or reserved length at byte {at}")
        width = 1 << (info - 24)
        raw = data[at + 1 : at + 1 + width]
        if len(raw) != width:
            raise CodecError(f"CBOR: truncated head at byte {at}")
        argument = int.from_bytes(raw, "big")
        if major != 7 and argument < (24, 1 << 8, 1 << 16, 1 << 32)[info - 24]:
            raise CodecError(f"CBOR: not the shortest form of {argument} at byte {at}")
        return major, info, argument, at + 1 + width

    def item(self, at: int, depth: int) -> int:
        """Check the item at byte `at`; returns the offset behind it."""
        data = self.data
        if at < len(data) and self.items_left > 0:
            first = data[at]
            if first in _ONE_BYTE:
                self.items_left -= 1
                return at + 1
            if first in _SHORT:
                end = at + 1 + (first & 31)
                text_bytes = self.limits.text_bytes
                if end <= len(data) and (first < 0x60 or (first - 0x60 <= text_bytes and data[at + 1 : end].isascii())):
                    self.items_left -= 1
                    return end
        major, info, argument, after = self.head(at)
        if major <= 1:
            return after
        if major <= 3:
            return self._string(at, after, argument, is_text=major == 3)
        if depth == 0 and major != 7:
            raise CodecError(f"CBOR: nested deeper than {self.limits.depth} at byte {at}")
        if major == 4:
            self._room(at, argument, len(self.data) - after)
            for _ in range(argument):
                after = self.item(after, depth - 1)
            return after
        if major == 5:
            return self._map(at, after, argument, depth - 1)
        if major == 6:
            return self._shaped_array(at, after, argument)
        return self._simple(at, info, argument, after)

    def _room(self, at: int, count: int, bytes_left: int) -> None:
        if count > bytes_left:  # every item takes a byte at least
            raise CodecError(f"CBOR: a container of {count} items at byte {at}, but {bytes_left} bytes are left")

    def _string(self, at: int, after: int, length: int, *, is_text: bool) -> int:
        end = after + length
        if end > len(self.data):
            raise CodecError(f"CBOR: truncated string of {length} bytes at byte {at}")
        if is_text:
            if length > self.limits.text_bytes:
                raise CodecError(f"CBOR: text of {length} bytes at byte {at}, at most {self.limits.text_bytes}")
            text = self.data[after:end]
            if text.isascii():
                return end
            try:
                text.decode("utf-8")
            except UnicodeDecodeError:
                raise CodecError(f"CBOR: text at byte {at} is not UTF-8") from None
        return end

    def _map(self, at: int, after: int, pairs: int, depth: int) -> int:
        self._room(at, 2 * pairs, len(self.data) - after)
        previous: bytes | None = None
        for _ in range(pairs):
            if after < len(self.data) and self.data[after] >> 5 != 3:
                raise CodecError(f"CBOR: map key at byte {after} is not text")
            end = self.item(after, depth)
            key = self.data[after:end]
            # cbor2's canonical mode sorts by (length, bytes) of the encoded key: RFC 7049 section 3.9, kept by
            # RFC 8949 section 4.2.3. For text keys shorter than 24 bytes both orders agree.
            if previous is not None and (len(previous), previous) >= (len(key), key):
                raise CodecError(f"CBOR: map key at byte {after} is a duplicate or out of order")
            previous = key
            after = self.item(end, depth)
        return after

    def _simple(self, at: int, info: int, argument: int, after: int) -> int:
        if info in (20, 21, 22):  # false, true, null
            return after
        if info < 25:
            raise CodecError(f"CBOR: simple value {argument} at byte {at} is not false, true or null")
        raw = self.data[at + 1 : after]
        if info == 25:
            (number,) = struct.unpack(">e", raw)
        elif info == 26:
            (number,) = struct.unpack(">f", raw)
        else:
            (number,) = struct.unpack(">d", raw)
        if _shortest_float(number) != (info, raw):
            raise CodecError(f"CBOR: not the shortest form of a float at byte {at}")
        return after

    def _shaped_array(self, at: int, after: int, tag: int) -> int:
        """Tag 40: an array of two, the list of dimensions and a tagged byte string of just the right size."""
        if tag != TAG_SHAPED:
            raise CodecError(f"CBOR: tag {tag} at byte {at} is not taken")
        major, _, count, after = self.head(after)
        if (major, count) != (4, 2):
            raise CodecError(f"CBOR: tag 40 at byte {at} needs an array of two")
        major, _, rank, after = self.head(after)
        if major != 4 or rank > MAX_RANK:
            raise CodecError(f"CBOR: shape at byte {at} is not a list of at most {MAX_RANK} dimensions")
        elements = 1
        for _ in range(rank):
            major, _, dim, after = self.head(after)
            if major != 0:
                raise CodecError(f"CBOR: a dimension of the array at byte {at} is not a natural number")
            elements *= dim
        major, _, tag, after = self.head(after)
        if major != 6 or tag not in DTYPE_OF_TAG:
            raise CodecError(f"CBOR: the array at byte {at} is of no known element type")
        major, _, length, after = self.head(after)
        expected = elements * DTYPES[DTYPE_OF_TAG[tag]][0]
        if major != 2 or length != expected:
            raise CodecError(f"CBOR: the array at byte {at} needs {expected} bytes of data, got {length}")
        return self._string(at, after, length, is_text=False)


def _shortest_float(number: float) -> tuple[int, bytes]:
    """(additional information, bytes) of the canonical encoding of `number` (RFC 8949 section 4.2.1)."""
    if math.isnan(number):
        return 25, b"\x7e\x00"
    for info, code in ((25, ">e"), (26, ">f")):
        try:
            raw = struct.pack(code, number)
        except OverflowError:
            continue
        (back,) = struct.unpack(code, raw)
        if back == number:
            return info, raw
    return 27, struct.pack(">d", number)
