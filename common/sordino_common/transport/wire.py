"""One connected socket between us and paho, and the packet that goes round paho.

paho reads a packet byte by byte and builds a dozen objects for it. Nearly all packets of a fleet are PUBLISH packets of
quality of service 0 without properties (MQTT v5, section 3.3): a head, the topic, a zero, the payload. These are cut
out of the stream here (`next_plain`) and written here (`plain_head`, `offer`); everything else passes to paho as it
came, and paho's own packets leave in order with ours.

    0x30 | remaining length (1..4 bytes, 7 bits each, low ones first) | topic length (2) | topic | 0 | payload
"""

from __future__ import annotations

import math
import os
import socket
import ssl
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from sordino_common.transport.reactor import READ, WRITE, Reactor

ALERT: Final = "ALERT"  # stands in the reason of every `ssl.SSLError` that the peer has sent us
_READ_BYTES: Final = 1 << 16  # below the size from which malloc asks the system for every single buffer
_PLAIN: Final = 0x30  # PUBLISH: not retained, not a repetition, quality of service 0
_SHIFTS: Final = (7, 14, 21, 28)  # of the digits of the remaining length behind the first; 28: of one too many
_KNOWN_HEADS: Final = 512  # of packets: topics are few, and so are their lengths


class Wire:
    """A connected, non-blocking socket that the reactor watches, and that remembers what broke it.

    It has the methods that paho asks of a socket. `close` ends the watching first. A plain packet of more than
    `most_bytes` is left to paho: no more than that is ever held back here."""

    def __init__(self, sock: socket.socket, reactor: Reactor, *, most_bytes: int) -> None:
        self._sock = sock
        self._reactor = reactor
        self._most_bytes = most_bytes
        self._watched = False
        self._writes = False  # the reactor tells us when there is room
        self._others_want = False
        self._buffer: bytes | bytearray = b""  # what was read; from `_at` on, nobody has taken it yet
        self._at = 0
        self._missing = 0  # so many bytes at its end are still to come: there is room for a large packet
        self._passing: float = 0  # so many bytes from there on are paho's
        self._full = False  # the last read gave as much as it was asked for: there may be more
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._unsent = b""
        # Plain attributes, for every packet asks.
        self.drained = False  # nothing waits here; never said over TLS, which may hold more than was read
        self.busy = False  # something of ours or paho's waits for room
        self.ended = False
        self.error: OSError | None = None

    def watch(self, callback: Callable[[int], None]) -> None:
        """Call `callback(ready)` when there is something to read, or, if anything waits for it, room to write."""
        self._reactor.register(self._sock, READ, callback)
        self._watched = True

    def want_write(self, wanted: bool) -> None:
        """Whether paho has something to write."""
        self._others_want = wanted
        self._watch_room()

    # --- reading ---------------------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Read once what the socket has. How it ended, if it did, comes out of `recv`."""
        self._full = False
        if self.ended:
            return
        try:
            if self._missing:
                self._fill_in()
                return
            data = self._sock.recv(_READ_BYTES)
        except OSError as error:
            if _broken(self._remember(error)):
                self._end()
            return
        self._full = len(data) == _READ_BYTES
        if not data:
            self._end()
        elif not self._buffer:
            self._buffer, self.drained = data, False
        else:  # a packet of which not all had come
            if self._at or isinstance(self._buffer, bytes):
                self._buffer, self._at = bytearray(memoryview(self._buffer)[self._at :]), 0
            self._buffer += data

    def _fill_in(self) -> None:
        """`fill` for the rest of something large, straight to where it belongs. Raises `OSError`."""
        with memoryview(self._buffer) as view:
            got = self._sock.recv_into(view[-self._missing :])
        self._missing -= got
        self._full = self._missing == 0
        if not got:
            self._end()

    def next_plain(self) -> tuple[bytes, bytes] | None:
        """Topic and payload of the next packet, if that is a plain one and whole. Afterwards `drained` may say that it
        was the last, and `waits_for_paho` whether what comes next is for paho."""
        buffer, begin = self._buffer, self._at
        here = len(buffer)
        if self._passing or self._missing or here - begin < 2:
            return None
        length, at = buffer[begin + 1], begin + 2
        for shift in _SHIFTS if length > 0x7F else ():
            if shift > 21:
                self._passing = math.inf  # no length at all: paho will say so
                return None
            if at == here:
                return None  # not all of it is there yet
            digit, at = buffer[at], at + 1
            length = length & (1 << shift) - 1 | digit << shift
            if digit < 0x80:
                break
        end = at + length
        if buffer[begin] != _PLAIN or end - begin > self._most_bytes:
            self._passing = end - begin
            return None
        if here < end:
            if end - begin > _READ_BYTES and not self.ended:  # it comes in many pieces
                whole = bytearray(end - begin)
                with memoryview(whole) as view:
                    view[: here - begin] = memoryview(buffer)[begin:]
                self._buffer, self._at, self._missing = whole, 0, end - here
            return None
        payload_at = at + 2 + (buffer[at] << 8 | buffer[at + 1] if length >= 3 else length)
        if payload_at >= end or buffer[payload_at]:
            self._passing = end - begin  # it has properties, or is malformed
            return None
        if isinstance(buffer, bytes):
            plain = buffer[at + 2 : payload_at], buffer[payload_at + 1 : end]
        else:
            with memoryview(buffer) as view:
                plain = bytes(view[at + 2 : payload_at]), bytes(view[payload_at + 1 : end])
        if end == here:
            self._buffer, self._at = b"", 0
            self.drained = not (self._tls or self.ended)
        else:
            self._at = end
        return plain

    @property
    def waits_for_paho(self) -> bool:
        """Something is there that `recv` would give: bytes of a packet that is not plain, or the end."""
        return self.ended or bool(self._passing and self._buffer)

    def recv(self, buffer_size: int) -> bytes:
        """paho's bytes; b"" at the end of the connection. Raises what broke it, or `BlockingIOError`."""
        begin = self._at
        here = len(self._buffer) - begin
        taken = int(min(buffer_size, here, math.inf if self.ended else self._passing))
        if taken:
            with memoryview(self._buffer) as view:
                data = bytes(view[begin : begin + taken])
            self._buffer, self._at = (self._buffer, begin + taken) if taken < here else (b"", 0)
            self._passing = max(0, self._passing - taken)
            return data
        if not self.ended:
            raise BlockingIOError
        if self.error is not None:
            raise self.error
        return b""

    def pending(self) -> bool:
        """Whether `fill` would find more at once: what TLS has decrypted and nobody has read, which no selector
        reports; or the rest of something large."""
        if isinstance(self._sock, ssl.SSLSocket):
            return self._sock.fileno() >= 0 and self._sock.pending() > 0
        return self._full

    # --- writing ---------------------------------------------------------------------------------------------------

    @property
    def blocked(self) -> bool:
        """The system has no room for what was offered last."""
        return bool(self._unsent)

    def offer(self, packet: bytes) -> None:
        """Write a whole packet, now or as soon as there is room. Not while `blocked`, nor before paho's own have left.

        If the connection is broken, the packet is lost; the next `recv` says so."""
        if self.ended:
            return
        try:
            sent = self._sock.send(packet)
        except OSError as error:
            sent = 0
            if _broken(self._remember(self._last_words(error))):
                self._end()
                return
        if sent < len(packet) or self._unsent:
            self._unsent = packet[sent:]
            self._watch_room()

    def flush(self) -> None:
        """Write what was offered, as far as there is room."""
        if self._unsent:
            self.offer(self._unsent)

    def send(self, buffer: bytes | bytearray) -> int:
        """For paho: how many of the bytes were written. Raises `BlockingIOError` if there is no room."""
        if self._unsent:
            self.flush()
            if self._unsent:
                raise BlockingIOError
        try:
            return self._sock.send(buffer)
        except OSError as error:
            raise self._remember(self._last_words(error)) from None

    def _end(self) -> None:
        """Nothing comes any more, and nothing leaves: what waits for room would wait for ever."""
        self.ended, self.drained, self._unsent = True, False, b""
        if self._missing:
            self._buffer, self._missing = bytes(memoryview(self._buffer)[: -self._missing]), 0
        self._watch_room()

    def _watch_room(self) -> None:
        self.busy = self._others_want or bool(self._unsent)
        if self._watched and self.busy != self._writes:
            self._writes = self.busy
            self._reactor.modify(self._sock, READ | WRITE if self.busy else READ)

    # --- the socket ------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        return self._sock.fileno()

    def setblocking(self, flag: bool) -> None:
        self._sock.setblocking(flag)

    def twin(self) -> socket.socket:
        """The bare TCP socket once more: it keeps the connection open when this one is closed."""
        return socket.socket(fileno=os.dup(self._sock.fileno()))

    def close(self) -> None:
        if self._watched:
            self._watched = False
            self._reactor.unregister(self._sock)
        self._sock.close()

    def _last_words(self, error: OSError) -> OSError:
        """The TLS alert that the peer sent before it closed, if there is one: it says why, and `error` does not.

        A broker that refuses our certificate sends its alert, closes, and answers what we write then with a reset. If
        our write is sooner than our read, the write fails while the alert still lies unread (Linux keeps it)."""
        if isinstance(self._sock, ssl.SSLSocket) and _broken(error):
            try:
                self._sock.recv(1)
            except ssl.SSLError as words:
                if ALERT in (words.reason or ""):
                    return words
            except OSError:
                pass
        return error

    def _remember(self, error: OSError) -> OSError:
        if _broken(error):
            self.error = error
        return error


@lru_cache(maxsize=_KNOWN_HEADS)
def plain_head(name: bytes, payload_bytes: int) -> bytes:
    """What stands before the payload in a PUBLISH packet of quality of service 0, not retained, without properties, on
    the topic whose `topic_name` is `name`."""
    left = 3 + len(name) + payload_bytes
    head = bytearray((_PLAIN,))
    while left > 0x7F:
        head.append(left & 0x7F | 0x80)
        left >>= 7
    head.append(left)
    return b"".join((head, len(name).to_bytes(2, "big"), name, b"\0"))


def _broken(error: OSError) -> bool:
    """False for what only says that the socket has nothing, or no room, yet."""
    return not isinstance(error, BlockingIOError | ssl.SSLWantReadError | ssl.SSLWantWriteError)
