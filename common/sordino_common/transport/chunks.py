"""A message's bytes in numbered chunks: the `Cutter` on the sending side, the `Reassembler` on the receiving one.

A parcel is `size` bytes cut every `chunk_bytes`; the last chunk is shorter or equal; the SHA-256 of the whole goes
with every chunk, unless there is only one. What a receiver holds is told as a `Holding`: all chunks below `upto`, none
from `end` on, and between the two everything but the `holes`. Pure bookkeeping: no clock, no I/O.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

import msgspec

from sordino_common.errors import CodecError, LocalError

MAX_CHUNKS: Final = 1 << 16  # 64 MiB in chunks of 1 KiB; a byte of bookkeeping each
MAX_HOLES: Final = 16  # as many as an acknowledgement tells at a time: it must fit a packet of 1 KiB

_DIGEST_BYTES: Final = hashlib.sha256().digest_size
_UNSENT, _IN_FLIGHT, _ACKNOWLEDGED = 0, 1, 2


class Shape(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How a parcel is cut. `digest` is the SHA-256 of its `size` bytes; a parcel of one chunk may lack it."""

    size: int
    chunk_bytes: int
    digest: bytes

    def __post_init__(self) -> None:
        size, chunk_bytes, digest = self.size, self.chunk_bytes, self.digest
        if size < 1 or chunk_bytes < 1 or (len(digest) != _DIGEST_BYTES and (digest or size > chunk_bytes)):
            raise CodecError(f"parcel: {size} bytes in chunks of {chunk_bytes} is no parcel")
        if size > MAX_CHUNKS * chunk_bytes:
            raise CodecError(f"parcel: {self.count} chunks of {chunk_bytes} bytes, at most {MAX_CHUNKS} are taken")

    @property
    def count(self) -> int:
        return -(-self.size // self.chunk_bytes)

    def length(self, index: int) -> int:
        """Bytes of chunk `index`."""
        return min(self.chunk_bytes, self.size - index * self.chunk_bytes)


class Holding(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The chunks that a receiver has: [0, upto) and [upto, end) less `holes` (half-open ranges, ascending)."""

    upto: int
    end: int
    holes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        at = self.upto
        for first, behind in self.holes:
            if not at <= first < behind <= self.end:
                raise CodecError(f"holding: the holes {self.holes} are not ascending ranges in {self.upto}..{self.end}")
            at = behind
        if not 0 <= self.upto <= self.end:
            raise CodecError(f"holding: all below {self.upto}, none from {self.end} on")


class Cutter:
    """Which chunks of a parcel are still to be sent, in flight, or acknowledged. O(1) amortised per chunk."""

    __slots__ = ("_acknowledged", "_cursor", "_state", "shape")

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._state = bytearray(1 if shape.size <= shape.chunk_bytes else shape.count)
        self._cursor = 0  # nothing below it is unsent
        self._acknowledged = 0

    @property
    def complete(self) -> bool:
        """Every chunk is acknowledged (which is less than the parcel being delivered: that is said on its own)."""
        return self._acknowledged == len(self._state)

    @property
    def unsent(self) -> bool:
        """Whether some chunk is to be sent."""
        return _UNSENT in self._state if len(self._state) == 1 else self.next_index is not None

    @property
    def next_index(self) -> int | None:
        """The lowest chunk that is to be sent, or None."""
        self._cursor = self._state.find(_UNSENT, self._cursor)
        if self._cursor < 0:
            self._cursor = len(self._state)
            return None
        return self._cursor

    def chunk(self, data: memoryview, index: int) -> memoryview:
        """Chunk `index` of the parcel's bytes, without a copy."""
        if len(data) != self.shape.size:
            raise LocalError(f"Cutter: {len(data)} bytes for a parcel of {self.shape.size}")
        start = index * self.shape.chunk_bytes
        return data[start : start + self.shape.chunk_bytes]

    def sent(self, index: int) -> None:
        if self._state[index] == _UNSENT:
            self._state[index] = _IN_FLIGHT

    def lost(self, index: int) -> bool:
        """Chunk `index` must be sent again, if it was in flight. Returns whether it was."""
        if self._state[index] != _IN_FLIGHT:
            return False
        self._state[index] = _UNSENT
        self._cursor = min(self._cursor, index)
        return True

    def is_acknowledged(self, index: int) -> bool:
        return self._state[index] == _ACKNOWLEDGED

    def acknowledge(self, holding: Holding) -> int:
        """Take note of what the receiver has; returns how many chunks were news. Raises `CodecError` out of range."""
        if holding.end > len(self._state):
            raise CodecError(f"acknowledgement of chunk {holding.end - 1} of a parcel of {len(self._state)} chunks")
        before = self._acknowledged
        at = 0
        for first, behind in (*holding.holes, (holding.end, holding.end)):
            self._mark(at, first)
            at = behind
        return self._acknowledged - before

    def forget(self) -> None:
        """The receiver holds nothing of it any more: all chunks that are not in flight are to be sent again."""
        self._state = bytearray(1 if state == _IN_FLIGHT else 0 for state in self._state)
        self._cursor = self._acknowledged = 0

    def _mark(self, first: int, behind: int) -> None:
        # The prefix is reported with every acknowledgement: step over what is known by C code, not chunk by chunk.
        new = (behind - first) - self._state.count(_ACKNOWLEDGED, first, behind)
        if new:
            self._state[first:behind] = bytes([_ACKNOWLEDGED]) * (behind - first)
            self._acknowledged += new


class Reassembler:
    """The chunks of one parcel as they come in, in any order. Holds at most `shape.size` bytes."""

    __slots__ = ("_chunks", "_end", "_have", "_missing", "_upto", "shape")

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._chunks: list[bytes | memoryview] = [b""] * shape.count
        self._have = bytearray(shape.count)
        self._missing = shape.count
        self._upto = 0
        self._end = 0

    @property
    def complete(self) -> bool:
        return self._missing == 0

    def put(self, index: int, data: bytes | memoryview) -> bool:
        """Keep chunk `index`; False if it was there. Raises `CodecError` if the index or the length is wrong."""
        if not 0 <= index < len(self._have):
            raise CodecError(f"parcel: chunk {index} of {len(self._have)}")
        if len(data) != self.shape.length(index):
            raise CodecError(
                f"parcel: chunk {index} of {len(self._have)} has {len(data)} bytes, expected {self.shape.length(index)}"
            )
        if self._have[index]:
            return False
        self._chunks[index] = data
        self._have[index] = 1
        self._missing -= 1
        self._end = max(self._end, index + 1)
        return True

    def holding(self) -> Holding:
        """What is here, with at most `MAX_HOLES` holes: what lies behind more of them is left untold."""
        upto = self._have.find(0, self._upto)
        self._upto = upto = len(self._have) if upto < 0 else upto
        end = max(self._end, upto)
        holes: list[tuple[int, int]] = []
        first = upto
        while first < end:
            behind = self._have.find(1, first, end)
            if len(holes) == MAX_HOLES:
                end = first
                break
            holes.append((first, behind))
            first = self._have.find(0, behind, end)
            if first < 0:
                break
        return Holding(upto=upto, end=end, holes=tuple(holes))

    def assemble(self) -> bytes:
        """All the bytes, once complete; empties the reassembler. Raises `CodecError` if their SHA-256 is wrong."""
        if not self.complete:
            raise LocalError(f"Reassembler: {self._missing} chunks are missing")
        data = b"".join(self._chunks)
        self._chunks = []
        digest = self.shape.digest
        if digest and not hmac.compare_digest(hashlib.sha256(data).digest(), digest):
            raise CodecError(f"parcel: the SHA-256 of the {len(data)} bytes is not the one announced")
        return data
