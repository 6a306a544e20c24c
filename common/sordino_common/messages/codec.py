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
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from typing import Any, Final

import cbor2

from sordino_common.errors import CodecError, LocalError
from sordino_common.messages.array import DTYPE_OF_TAG, DTYPES, MAX_RANK, Array
from sordino_common.messages.heads import BYTES, LIST, MAP, NUMBER, TAG, TEXT, WIDE, head

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
    parts: list[bytes] = []
    _write(value, parts)
    return parts[0] if len(parts) == 1 else b"".join(parts)


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


# Exact types: a subclass (an enum, say) goes the slower way.
_PLAIN: Final = frozenset({bool, int, float, str, bytes, type(None)})
_TEXT: Final = frozenset({str})
_NO_KEYS: Final = repeat(b"")


def _write(value: object, parts: list[bytes]) -> None:
    """Append the encoding of `value`. `cbor2` writes lists of plain items and whatever is rare; what messages are made
    of is put together here, from heads that are known, so that nothing large is copied but once."""
    entries: Iterable[tuple[bytes, Any]]
    if isinstance(value, list | tuple):
        if _PLAIN.issuperset(map(type, value)):
            parts.append(cbor2.dumps(list(value), canonical=True))
            return
        parts.append(head(LIST, len(value)))
        entries = zip(_NO_KEYS, value, strict=False)
    elif isinstance(value, dict):
        if not _TEXT.issuperset(map(type, value)) and not all(isinstance(key, str) for key in value):
            raise LocalError("codec: map keys must be text")
        parts.append(head(MAP, len(value)))
        keys, written = _in_order(tuple(value))
        entries = zip(written, map(value.__getitem__, keys), strict=True)
    else:
        parts.append(_alone(value))
        return
    for key, item in entries:
        kind = type(item)
        if kind is bytes:
            parts += (key, head(BYTES, len(item)), item)
        elif kind is str:
            text = item.encode()
            parts += (key, head(TEXT, len(text)), text)
        elif kind is Array:
            parts += (key, _array_head(item.dtype, item.shape), item.data)
        elif kind in _PLAIN:
            parts += (key, cbor2.dumps(item, canonical=True))
        else:
            parts.append(key)
            _write(item, parts)


def _alone(value: object) -> bytes:
    """The encoding of what is no container."""
    if isinstance(value, Array):
        return _array_head(value.dtype, value.shape) + value.data
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return cbor2.dumps(value, canonical=True)
    raise LocalError(f"codec: {type(value).__name__} has no place on the wire")


@lru_cache(maxsize=128)  # the fields of a message, the tensors of a model: the same again and again
def _in_order(keys: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[bytes, ...]]:
    """The keys in canonical order, and their encodings. cbor2's sorts by (length, bytes) of the encoded key: RFC 7049
    section 3.9, kept by RFC 8949 section 4.2.3. For text keys shorter than 24 bytes both orders agree."""
    written = {key: head(TEXT, len(text := key.encode())) + text for key in keys}
    ordered = sorted(written.items(), key=lambda pair: (len(pair[1]), pair[1]))
    return tuple(key for key, _ in ordered), tuple(encoded for _, encoded in ordered)


@lru_cache(maxsize=1024)
def _array_head(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What stands before the data of an array: tag 40, [dimensions, the typed array's tag and length."""
    nbytes, tag = DTYPES[dtype]
    dims = b"".join(head(NUMBER, dim) for dim in shape)
    front = head(TAG, TAG_SHAPED) + head(LIST, 2) + head(LIST, len(shape)) + dims
    return front + head(TAG, tag) + head(BYTES, nbytes * math.prod(shape))


def _array_of_tag(tag: cbor2.CBORTag, _immutable: bool) -> object:
    if tag.tag == TAG_SHAPED:
        dims, typed = tag.value
        return Array.from_wire(DTYPE_OF_TAG[typed.tag], tuple(dims), typed.value)
    return tag  # an inner typed array; the enclosing tag 40, which `scan` has made sure of, takes it


# --- the scanner -------------------------------------------------------------------------------------------------


def scan(data: bytes, limits: Limits = DEFAULT_LIMITS) -> None:
    """Refuse anything but one canonical, bounded item. Raises `CodecError`; builds nothing but a stack of at most
    `limits.depth` entries."""
    size = len(data)
    if size > limits.payload_bytes:
        raise CodecError(f"CBOR: {size} bytes, at most {limits.payload_bytes} are taken")
    at, depth, items_left = 0, limits.depth, limits.items
    left, in_map, previous = 1, False, b""  # of the container that we are in: items to come, the key before
    around: list[tuple[int, bool, bytes]] = []  # the same of those around it
    while True:
        while left == 0:
            if not around:
                if at != size:
                    raise CodecError(f"CBOR: {size - at} bytes after the end of the item at byte {at}")
                return
            left, in_map, previous = around.pop()
            depth += 1
        is_key = in_map and not left & 1
        left -= 1
        if at >= size:
            raise CodecError(f"CBOR: ends at byte {at} where an item is expected")
        begin, first = at, data[at]
        if is_key and not 0x60 <= first < 0x80:
            raise CodecError(f"CBOR: map key at byte {at} is not text")
        items_left -= 1
        if items_left < 0:
            raise CodecError(f"CBOR: more than {limits.items} items")
        argument, at = (first & 31, at + 1) if first & 31 < 24 else _wide(data, at)
        if first < 0x40:  # an integer
            continue
        if first < 0x80:  # a string
            at += argument
            if at > size:
                raise CodecError(f"CBOR: truncated string of {argument} bytes at byte {begin}")
            if first >= 0x60:
                if argument > limits.text_bytes:
                    raise CodecError(f"CBOR: text of {argument} bytes at byte {begin}, at most {limits.text_bytes}")
                if not data[at - argument : at].isascii():
                    _check_utf8(data[at - argument : at], begin)
                if is_key:
                    key = data[begin:at]
                    if (len(previous), previous) >= (len(key), key):  # in the order of `_in_order`
                        raise CodecError(f"CBOR: map key at byte {begin} is a duplicate or out of order")
                    previous = key
            continue
        if first >= 0xE0:
            if not 0xF4 <= first <= 0xF6:  # false, true, null
                _check_float(data, begin, argument, at)
            continue
        if depth == 0:
            raise CodecError(f"CBOR: nested deeper than {limits.depth} at byte {begin}")
        if first >= TAG:
            at, items_left = _shaped_array(data, begin, argument, at, items_left, limits)
            continue
        count = 2 * argument if first >= MAP else argument
        if count > size - at:  # every item takes a byte at least
            raise CodecError(f"CBOR: a container of {count} items at byte {begin}, but {size - at} bytes are left")
        around.append((left, in_map, previous))
        left, in_map, previous, depth = count, first >= MAP, b"", depth - 1


def _wide(data: bytes, at: int) -> tuple[int, int]:
    """(argument, offset behind it) of a head of more than one byte. A float's bits may be any."""
    info = data[at] & 31
    if info not in WIDE:
        raise CodecError(f"CBOR: indefinite or reserved length at byte {at}")
    width, least = WIDE[info]
    after = at + 1 + width
    if after > len(data):
        raise CodecError(f"CBOR: truncated head at byte {at}")
    argument = int.from_bytes(data[at + 1 : after], "big")
    if argument < least and data[at] < 0xE0:
        raise CodecError(f"CBOR: not the shortest form of {argument} at byte {at}")
    return argument, after


def _check_utf8(text: bytes, begin: int) -> None:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        raise CodecError(f"CBOR: text at byte {begin} is not UTF-8") from None


def _check_float(data: bytes, begin: int, argument: int, after: int) -> None:
    info = data[begin] & 31
    if info < 25:
        raise CodecError(f"CBOR: simple value {argument} at byte {begin} is not false, true or null")
    raw = data[begin + 1 : after]
    (number,) = struct.unpack({25: ">e", 26: ">f", 27: ">d"}[info], raw)
    if _shortest_float(number) != (info, raw):
        raise CodecError(f"CBOR: not the shortest form of a float at byte {begin}")


def _shaped_array(data: bytes, begin: int, tag: int, at: int, items_left: int, limits: Limits) -> tuple[int, int]:
    """(offset behind, items left after) a tag 40 at `begin`: an array of two, the list of dimensions and a tagged byte
    string of just the right size. `at`: behind the tag."""
    if tag != TAG_SHAPED:
        raise CodecError(f"CBOR: tag {tag} at byte {begin} is not taken")
    rank, elements, expected = 0, 1, 0
    place = 0  # of the head: the pair, the list of dimensions, each of them, the typed array's tag, its bytes
    while place < rank + 4:
        if at >= len(data):
            raise CodecError(f"CBOR: ends at byte {at} where an item is expected")
        items_left -= 1
        if items_left < 0:
            raise CodecError(f"CBOR: more than {limits.items} items")
        major = data[at] & 0xE0
        argument, at = (data[at] & 31, at + 1) if data[at] & 31 < 24 else _wide(data, at)
        if place == 0:
            if (major, argument) != (LIST, 2):
                raise CodecError(f"CBOR: tag 40 at byte {begin} needs an array of two")
        elif place == 1:
            if major != LIST or argument > MAX_RANK:
                raise CodecError(f"CBOR: shape at byte {begin} is not a list of at most {MAX_RANK} dimensions")
            rank = argument
        elif place < rank + 2:
            if major != NUMBER:
                raise CodecError(f"CBOR: a dimension of the array at byte {begin} is not a natural number")
            elements *= argument
        elif place == rank + 2:
            if major != TAG or argument not in DTYPE_OF_TAG:
                raise CodecError(f"CBOR: the array at byte {begin} is of no known element type")
            expected = elements * DTYPES[DTYPE_OF_TAG[argument]][0]
        else:
            if major != BYTES or argument != expected:
                raise CodecError(f"CBOR: the array at byte {begin} needs {expected} bytes of data, got {argument}")
            at += expected
        place += 1
    if at > len(data):
        raise CodecError(f"CBOR: truncated string of {expected} bytes at byte {begin}")
    return at, items_left


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
