"""Frames on the pipe between daemon and worker: eight bytes of length (big-endian), then the payload."""

from __future__ import annotations

import contextlib
import fcntl
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import msgspec

from sordino_agent.datasets import DatasetSpec
from sordino_agent.models import ModelFile
from sordino_common.errors import CodecError
from sordino_common.messages import decode, encode
from sordino_common.messages.base import from_plain, to_plain

HEADER: Final = struct.Struct(">Q")
_PIPE_BYTES: Final = 1 << 20


class WorkerSetup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker must know before its first task: the first frame it reads."""

    datasets: tuple[DatasetSpec, ...]
    executor: str
    memory_bytes: int
    models: tuple[ModelFile, ...] = ()


def encode_setup(setup: WorkerSetup) -> bytes:
    return encode(to_plain(setup))


def decode_setup(data: bytes) -> WorkerSetup:
    """Raises `CodecError`."""
    try:
        return from_plain(decode(data), WorkerSetup)
    except msgspec.ValidationError as error:
        raise CodecError(f"worker set-up: {error}") from None


def header(payload: bytes | bytearray) -> bytes:
    """What goes before `payload` on the pipe."""
    return HEADER.pack(len(payload))


class FrameReader:
    """Bytes as they come, frames when they are whole. A frame over `max_bytes` raises `CodecError` at its header."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterable[bytes | memoryview]:
        if not self._buffer and len(data) >= HEADER.size:  # nearly always: one frame, whole
            (length,) = HEADER.unpack_from(data)
            if length == len(data) - HEADER.size and length <= self._max_bytes:
                return (memoryview(data)[HEADER.size :],)
        return self._feed(data)

    def _feed(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer)
            if length > self._max_bytes:
                raise CodecError(f"pipe: a frame of {length} bytes, at most {self._max_bytes} are taken")
            if len(self._buffer) < HEADER.size + length:
                return
            frame = bytes(memoryview(self._buffer)[HEADER.size : HEADER.size + length])
            del self._buffer[: HEADER.size + length]
            yield frame


def widen(pipe: int) -> None:
    """Let a pipe hold as much as the system grants: a frame that fits wakes its reader once."""
    with contextlib.suppress(OSError):  # above the user's share, or not Linux
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def read_frame(read: Callable[[int], bytes]) -> bytes | None:
    """The next frame of a blocking pipe; None at its end (also in the middle of a frame: the daemon is gone)."""
    head = read(HEADER.size)
    if len(head) < HEADER.size:
        return None
    (length,) = HEADER.unpack(head)
    payload = read(length)
    return payload if len(payload) == length else None
