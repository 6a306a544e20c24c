"""What travels inside a sealed packet: one to four frames, one behind the other. Big-endian, of fixed widths.

    W  stamp 8, floor 8, parcel 8, correlation 16, length 4, data                        a whole parcel, in one part
    P  stamp 8, floor 8, parcel 8, index 8, size 8, chunk_bytes 8, digest 32, correlation 16, length 4, data
    Q  stamp 8, floor 8, count 1, parcels 8 each                                         a probe
    A  stamp 8, counts 1 1 1, delivered parcels 8 each, parcels on hold 8 each, states   an ack
           state: parcel 8, incarnation 8, chunk_bytes 8, upto 4, end 4, count of holes 1, first 4 and behind 4 each
    R  parcel 8, length 1, code, length 2, reason                                        a refusal

A header is not a value: with fields of fixed width there is one encoding of each, and nothing to be scanned, which
is why this is no CBOR; every message pays for it, however short.

Every part describes its whole parcel, so any of them can come first. A message of one chunk, as nearly all are, is one
packet and one frame; it needs no digest, as the packet is authentic. `stamp` numbers the transmissions of a sender to
one peer; an ack echoes the highest one seen, which tells the sender without ambiguity what a round trip takes and what
was overtaken. `floor` is the sender's oldest unfinished parcel: the receiver forgets all below. `incarnation` grows
when a receiver drops what it held.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from sordino_common.errors import CodecError
from sordino_common.transport.chunks import MAX_HOLES, Holding, Shape

MAX_DONE: Final = 32
MAX_STATES: Final = 4
MAX_PROBED: Final = 32
MAX_FRAMES: Final = 4
CORRELATION_BYTES: Final = 16
REASON_CHARS: Final = 300
_REASON_BYTES: Final = 4 * REASON_CHARS
_CODE_CHARS: Final = 40
_MAX_NUMBER: Final = (1 << 63) - 1

_WHOLE: Final = struct.Struct(">cQQQ16sI")
_PART: Final = struct.Struct(">cQQQQQQ32s16sI")
_PROBE: Final = struct.Struct(">cQQB")
_ACK: Final = struct.Struct(">cQBBB")
_STATE: Final = struct.Struct(">QQQIIB")
_REFUSE: Final = struct.Struct(">cQB")
_SHORT: Final = struct.Struct(">H")
PART_OVERHEAD: Final = _PART.size


class Whole(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A parcel of one chunk."""

    stamp: int
    floor: int
    parcel: int
    correlation: bytes
    data: bytes | memoryview


class Part(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One of several chunks."""

    stamp: int
    floor: int
    parcel: int
    index: int
    shape: Shape
    correlation: bytes
    data: bytes | memoryview


class Probe(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What do you have of these parcels? Answered at once by an ack."""

    stamp: int
    floor: int
    parcels: tuple[int, ...]


class State(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the receiver holds of a parcel cut every `chunk_bytes`; `chunk_bytes` 0 is nothing at all."""

    parcel: int
    incarnation: int
    chunk_bytes: int
    holding: Holding


class Ack(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """`done`: delivered. `held`: no room now, wait to be asked. `states`: what is there of the others."""

    stamp: int
    done: tuple[int, ...]
    held: tuple[int, ...]
    states: tuple[State, ...]


class Refuse(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The parcel will never be taken: `code` is an error's stable name."""

    parcel: int
    code: str
    reason: str


Frame = Whole | Part | Probe | Ack | Refuse


def encode_frames(frames: list[Frame], tail: bytes = b"") -> bytes:
    """The frames' bytes, and behind them `tail`: the bytes of others."""
    parts: list[bytes | memoryview] = []
    for frame in frames:
        match frame:
            case Whole(data=data):
                head = _WHOLE.pack(b"W", frame.stamp, frame.floor, frame.parcel, frame.correlation, len(data))
                parts += (head, data)
            case Ack(done=done, held=held, states=states):
                parts.append(_ACK.pack(b"A", frame.stamp, len(done), len(held), len(states)))
                parts.append(_pack((*done, *held), "Q"))
                for state in states:
                    holding = state.holding
                    told = (state.parcel, state.incarnation, state.chunk_bytes, holding.upto, holding.end)
                    parts.append(_STATE.pack(*told, len(holding.holes)))
                    parts += (_pack(hole, "I") for hole in holding.holes)
            case Part(shape=shape, data=data):
                place = (frame.stamp, frame.floor, frame.parcel, frame.index)
                described = (shape.size, shape.chunk_bytes, shape.digest, frame.correlation, len(data))
                parts += (_PART.pack(b"P", *place, *described), data)
            case Probe(parcels=parcels):
                parts += (_PROBE.pack(b"Q", frame.stamp, frame.floor, len(parcels)), _pack(parcels, "Q"))
            case Refuse():
                code, reason = frame.code.encode()[:255], frame.reason.encode()
                parts += (_REFUSE.pack(b"R", frame.parcel, len(code)), code, _SHORT.pack(len(reason)), reason)
    parts.append(tail)
    return b"".join(parts)


def decode_frames(data: bytes) -> list[Frame]:
    """The frames of a packet. Raises `CodecError`; builds at most a few hundred small objects, whatever comes."""
    frames: list[Frame] = []
    at = 0
    try:
        while at < len(data):
            if len(frames) == MAX_FRAMES:
                raise CodecError(f"packet: more than {MAX_FRAMES} frames")
            frame, at = _READ[data[at]](data, at)
            frames.append(frame)
    except KeyError:
        raise CodecError(f"packet: byte {at} begins no frame: it is none of part, probe, ack, refuse") from None
    except struct.error:
        raise CodecError(f"packet: the frame at byte {at} is cut short") from None
    if not frames:
        raise CodecError("packet: no frame in it")
    return frames


def _whole(data: bytes, at: int) -> tuple[Frame, int]:
    _, stamp, floor, parcel, correlation, length = _WHOLE.unpack_from(data, at)
    if (stamp | floor | parcel) > _MAX_NUMBER:
        _require_numbers(stamp, floor, parcel)
    if not length:
        raise CodecError(f"packet: parcel {parcel} at byte {at} is empty")
    at += _WHOLE.size
    content = data[at : at + length]
    if len(content) != length:
        _take(data, at, length)
    return Whole(stamp=stamp, floor=floor, parcel=parcel, correlation=correlation, data=content), at + length


def _part(data: bytes, at: int) -> tuple[Frame, int]:
    _, stamp, floor, parcel, index, size, chunk_bytes, digest, correlation, length = _PART.unpack_from(data, at)
    _require_numbers(stamp, floor, parcel, index, size, chunk_bytes)
    content, at = _take(data, at + _PART.size, length)
    shape = Shape(size=size, chunk_bytes=chunk_bytes, digest=digest)
    numbers = {"stamp": stamp, "floor": floor, "parcel": parcel, "index": index}
    return Part(**numbers, shape=shape, correlation=correlation, data=content), at


def _probe(data: bytes, at: int) -> tuple[Frame, int]:
    _, stamp, floor, count = _PROBE.unpack_from(data, at)
    if count > MAX_PROBED:
        raise CodecError(f"packet: a probe of {count} parcels, at most {MAX_PROBED} are taken")
    parcels, at = _numbers(data, at + _PROBE.size, count)
    _require_numbers(stamp, floor)
    return Probe(stamp=stamp, floor=floor, parcels=parcels), at


def _ack(data: bytes, at: int) -> tuple[Frame, int]:
    _, stamp, done, held, states = _ACK.unpack_from(data, at)
    if max(done, held) > MAX_DONE or states > MAX_STATES:
        raise CodecError(f"packet: an ack of {done}, {held} and {states}; at most {MAX_DONE}, {MAX_DONE}, {MAX_STATES}")
    numbers, at = _numbers(data, at + _ACK.size, done + held)
    if stamp > _MAX_NUMBER:
        _require_numbers(stamp)
    told = []
    for _ in range(states):
        state, at = _state(data, at)
        told.append(state)
    return Ack(stamp=stamp, done=numbers[:done], held=numbers[done:], states=tuple(told)), at


def _state(data: bytes, at: int) -> tuple[State, int]:
    parcel, incarnation, chunk_bytes, upto, end, count = _STATE.unpack_from(data, at)
    _require_numbers(parcel, incarnation, chunk_bytes)
    if count > MAX_HOLES:
        raise CodecError(f"packet: a state with {count} holes, at most {MAX_HOLES} are taken")
    bounds = struct.unpack_from(f">{2 * count}I", data, at + _STATE.size)
    holding = Holding(upto=upto, end=end, holes=tuple(zip(bounds[::2], bounds[1::2], strict=True)))
    state = State(parcel=parcel, incarnation=incarnation, chunk_bytes=chunk_bytes, holding=holding)
    return state, at + _STATE.size + 8 * count


def _refuse(data: bytes, at: int) -> tuple[Frame, int]:
    _, parcel, length = _REFUSE.unpack_from(data, at)
    _require_numbers(parcel)
    code, at = _take(data, at + _REFUSE.size, length)
    (length,) = _SHORT.unpack_from(data, at)
    if length > _REASON_BYTES:
        raise CodecError(f"packet: a reason of {length} bytes, at most {_REASON_BYTES} are taken")
    reason, at = _take(data, at + _SHORT.size, length)
    try:
        return Refuse(parcel=parcel, code=code.decode()[:_CODE_CHARS], reason=reason.decode()[:REASON_CHARS]), at
    except UnicodeDecodeError:
        raise CodecError("packet: a refusal whose text is not UTF-8") from None


_READ: Final = {ord("W"): _whole, ord("P"): _part, ord("Q"): _probe, ord("A"): _ack, ord("R"): _refuse}


def _pack(numbers: tuple[int, ...], width: str) -> bytes:
    return struct.pack(f">{len(numbers)}{width}", *numbers)


def _take(data: bytes, at: int, length: int) -> tuple[bytes, int]:
    end = at + length
    if end > len(data):
        raise CodecError(f"packet: {length} bytes are announced at byte {at}, but {len(data) - at} follow")
    return data[at:end], end


def _numbers(data: bytes, at: int, count: int) -> tuple[tuple[int, ...], int]:
    numbers = struct.unpack_from(f">{count}Q", data, at)
    if numbers and max(numbers) > _MAX_NUMBER:
        _require_numbers(*numbers)
    return numbers, at + 8 * count


def _require_numbers(*numbers: int) -> None:
    if max(numbers) > _MAX_NUMBER:
        raise CodecError("packet: a field is not a natural number below 2^63")
