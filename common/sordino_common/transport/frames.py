"""What travels inside a sealed packet: a canonical CBOR list of one to four frames.

    ["part", stamp, floor, parcel, index, size, chunk_bytes, digest, correlation, data]
    ["probe", stamp, floor, [parcel, ...]]
    ["ack", stamp, [delivered parcel, ...], [parcel on hold, ...], [state, ...]]
         state: [parcel, incarnation, chunk_bytes, upto, end, [first, behind, first, behind, ...]]
    ["refuse", parcel, code, reason]

Every part describes its whole parcel, so any of them can come first, and a message of one chunk is one packet.
`stamp` numbers the transmissions of a sender to one peer; an ack echoes the highest one seen, which tells the sender
without ambiguity what a round trip takes and what was overtaken. `floor` is the sender's oldest unfinished parcel:
the receiver forgets all below. `incarnation` grows when a receiver drops what it held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sordino_common.errors import CodecError
from sordino_common.messages.codec import Limits, decode, encode
from sordino_common.transport.chunks import MAX_HOLES, Holding, Shape

MAX_DONE: Final = 32
MAX_STATES: Final = 4
MAX_PROBED: Final = 32
MAX_FRAMES: Final = 4
CORRELATION_BYTES: Final = 16
REASON_CHARS: Final = 300
# Header of a part: 6 numbers of at most 9 bytes, a digest, a correlation, the data's head, names and list heads.
PART_OVERHEAD: Final = 6 * 9 + 34 + 17 + 5 + 8
_MAX_NUMBER: Final = (1 << 63) - 1
_ITEMS: Final = 16 + MAX_FRAMES * (10 + MAX_DONE + MAX_PROBED + MAX_STATES * (8 + 2 * MAX_HOLES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    stamp: int
    floor: int
    parcel: int
    index: int
    shape: Shape
    correlation: bytes
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What do you have of these parcels? Answered at once by an ack."""

    stamp: int
    floor: int
    parcels: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What the receiver holds of a parcel cut every `chunk_bytes`; `chunk_bytes` 0 is nothing at all."""

    parcel: int
    incarnation: int
    chunk_bytes: int
    holding: Holding


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """`done`: delivered. `held`: no room now, wait to be asked. `states`: what is there of the others."""

    stamp: int
    done: tuple[int, ...]
    held: tuple[int, ...]
    states: tuple[State, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """The parcel will never be taken: `code` is an error's stable name."""

    parcel: int
    code: str
    reason: str


Frame = Part | Probe | Ack | Refuse


def encode_frames(frames: list[Frame]) -> bytes:
    return encode([_plain(frame) for frame in frames])


def decode_frames(data: bytes) -> list[Frame]:
    """The frames of a packet. Raises `CodecError`; builds at most a few hundred small objects, whatever comes."""
    outer = decode(data, Limits(payload_bytes=1 << 26, depth=6, items=_ITEMS, text_bytes=4 * REASON_CHARS))
    if not isinstance(outer, list) or not 1 <= len(outer) <= MAX_FRAMES:
        raise CodecError(f"packet: expected a list of 1 to {MAX_FRAMES} frames")
    return [_frame(item) for item in outer]


def _plain(frame: Frame) -> list[object]:
    match frame:
        case Part(shape=shape):
            described = [shape.size, shape.chunk_bytes, shape.digest, frame.correlation, frame.data]
            return ["part", frame.stamp, frame.floor, frame.parcel, frame.index, *described]
        case Probe():
            return ["probe", frame.stamp, frame.floor, list(frame.parcels)]
        case Ack():
            return ["ack", frame.stamp, list(frame.done), list(frame.held), [_plain_state(s) for s in frame.states]]
        case Refuse():
            return ["refuse", frame.parcel, frame.code, frame.reason]


def _plain_state(state: State) -> list[object]:
    holding = state.holding
    flat = [bound for hole in holding.holes for bound in hole]
    return [state.parcel, state.incarnation, state.chunk_bytes, holding.upto, holding.end, flat]


def _frame(item: Any) -> Frame:
    match item:
        case ["part", stamp, floor, parcel, index, size, chunk_bytes, bytes(digest), bytes(correlation), bytes(data)]:
            if len(correlation) != CORRELATION_BYTES:
                raise CodecError(f"part: a correlation of {len(correlation)} bytes, expected {CORRELATION_BYTES}")
            shape = Shape(size=_number(size), chunk_bytes=_number(chunk_bytes), digest=digest)
            numbers = {"stamp": _number(stamp), "floor": _number(floor), "parcel": _number(parcel)}
            return Part(**numbers, index=_number(index), shape=shape, correlation=correlation, data=data)
        case ["probe", stamp, floor, list(parcels)]:
            return Probe(stamp=_number(stamp), floor=_number(floor), parcels=_numbers(parcels, MAX_PROBED))
        case ["ack", stamp, list(done), list(held), list(states)]:
            if len(states) > MAX_STATES:
                raise CodecError(f"ack: {len(states)} states, at most {MAX_STATES} are taken")
            told = tuple(_state(state) for state in states)
            return Ack(stamp=_number(stamp), done=_numbers(done, MAX_DONE), held=_numbers(held, MAX_DONE), states=told)
        case ["refuse", parcel, str(code), str(reason)]:
            return Refuse(parcel=_number(parcel), code=code[:40], reason=reason[:REASON_CHARS])
        case _:
            raise CodecError("packet: a frame is none of part, probe, ack, refuse, or its fields are wrong")


def _state(item: Any) -> State:
    match item:
        case [parcel, incarnation, chunk_bytes, upto, end, list(flat)] if len(flat) % 2 == 0:
            bounds = _numbers(flat, 2 * MAX_HOLES)
            holes = tuple(zip(bounds[::2], bounds[1::2], strict=True))
            holding = Holding(upto=_number(upto), end=_number(end), holes=holes)
            return State(
                parcel=_number(parcel),
                incarnation=_number(incarnation),
                chunk_bytes=_number(chunk_bytes),
                holding=holding,
            )
        case _:
            raise CodecError("ack: a state is not [parcel, incarnation, chunk_bytes, upto, end, bounds of holes]")


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
        raise CodecError("packet: a field is not a natural number below 2^63")
    return value


def _numbers(values: list[Any], most: int) -> tuple[int, ...]:
    if len(values) > most:
        raise CodecError(f"packet: a list of {len(values)} numbers, at most {most} are taken")
    return tuple(_number(value) for value in values)
