"""Opening a connection without blocking: TCP and, if wanted, TLS, driven by the reactor.

Only the look-up of a host name blocks, for as long as the system's resolver takes; an IP address needs none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from sordino_common.transport.reactor import READ, WRITE, Reactor
from sordino_common.transport.wire import ALERT, Wire

_REMEDY: Final = "see tls.certificate, tls.key, and the broker's list of authorities"

# Alerts by which a broker turns down the certificate that it got: RFC 8446 section 6.2.
_NOT_ACCEPTED: Final = (
    "ALERT_BAD_CERTIFICATE",
    "ALERT_UNSUPPORTED_CERTIFICATE",
    "ALERT_CERTIFICATE_REVOKED",
    "ALERT_CERTIFICATE_EXPIRED",
    "ALERT_CERTIFICATE_UNKNOWN",
    "ALERT_UNKNOWN_CA",
    "ALERT_ACCESS_DENIED",
)

_UNDER_WAY: Final = (0, errno.EINPROGRESS, errno.EALREADY)

# A socket's address: what it holds depends on the family, and only `socket` looks inside.
_Address = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]


class Dial:
    """One attempt. Ends in `on_ready(wire)` or in `on_failed(reason, refused)`, unless `abort` comes first.

    `refused` says that trying again soon is of no use: one of the certificates is not accepted. The addresses of a
    name are tried one after the other, beginning with number `first`; the time limit is the caller's."""

    def __init__(
        self,
        reactor: Reactor,
        host: str,
        port: int,
        *,
        context: ssl.SSLContext | None,
        server_name: str | None,
        first: int,
        most_bytes: int,
        on_ready: Callable[[Wire], None],
        on_failed: Callable[[str, bool], None],
    ) -> None:
        self._reactor = reactor
        self._host = host
        self._port = port
        self._context = context
        self._server_name = server_name or host
        self._first = first
        self._most_bytes = most_bytes
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._left: Iterator[_Address] = iter(())
        self._sock: socket.socket | None = None
        self._trouble = ""

    def start(self) -> None:
        """May call back at once."""
        try:
            found = socket.getaddrinfo(plain(self._host), self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            text = error.strerror if isinstance(error, OSError) else "not a host name"
            self._on_failed(f"{self._host}: the name can't be resolved: {text}", False)
            return
        turn = self._first % len(found)
        self._left = iter(found[turn:] + found[:turn])
        self._next()

    def abort(self) -> None:
        """Stop, and call nobody. Nothing happens if it has ended."""
        self._drop()
        self._left = iter(())

    def _next(self) -> None:
        for family, kind, protocol, _, address in self._left:
            try:
                sock = self._sock = socket.socket(family, kind, protocol)
                sock.setblocking(False)
                # Our packets are small and answer one another: Nagle's delay would cost a round trip each.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                code = sock.connect_ex(address)
            except OSError as error:
                code = error.errno or errno.EIO
            if code in _UNDER_WAY:
                assert self._sock is not None
                self._reactor.register(self._sock, WRITE, self._connected)
                return
            self._trouble = os.strerror(code)
            self._close_unwatched()
        self._on_failed(f"no connection to {self._host}:{self._port}: {self._trouble}", False)

    def _connected(self, _ready: int) -> None:
        sock = self._sock
        assert sock is not None
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self._reactor.unregister(sock)
        if code:
            self._trouble = os.strerror(code)
            self._close_unwatched()
            self._next()
        elif self._context is None:
            self._finish()
        else:
            try:
                wrapped = self._context.wrap_socket(
                    sock, server_hostname=plain(self._server_name), do_handshake_on_connect=False
                )
            except (OSError, ValueError) as error:
                self._close_unwatched()
                self._on_failed(f"TLS with {self._host}:{self._port} can't begin: {error}", True)
                return
            self._sock = wrapped
            self._reactor.register(wrapped, WRITE, self._shake)

    def _shake(self, _ready: int) -> None:
        sock = self._sock
        assert isinstance(sock, ssl.SSLSocket)
        try:
            sock.do_handshake()
        except ssl.SSLWantReadError:
            self._reactor.modify(sock, READ)
        except ssl.SSLWantWriteError:
            self._reactor.modify(sock, WRITE)
        except OSError as error:
            self._drop()
            self._on_failed(
                f"TLS with {self._host}:{self._port} failed: {explain(error)}", isinstance(error, ssl.SSLError)
            )
        else:
            self._reactor.unregister(sock)
            self._finish()

    def _finish(self) -> None:
        sock, self._sock = self._sock, None
        assert sock is not None
        self._on_ready(Wire(sock, self._reactor, most_bytes=self._most_bytes))

    def _drop(self) -> None:
        if self._sock is not None:
            self._reactor.unregister(self._sock)
            self._close_unwatched()

    def _close_unwatched(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def see_off(wire: Wire, *, want_write: Callable[[], bool], write: Callable[[], bool], limit_s: float) -> None:
    """Block until all that is queued is written and the peer has closed, `limit_s` at most. `write` may close `wire`;
    it returns False when that is no use any more, because the connection is gone.

    Closing while unread data lies here would reset the connection, and a broker that meets the reset while it writes
    drops what it has not read: our last packets, and the DISCONNECT that keeps the will from being published."""
    deadline_s = time.monotonic() + limit_s
    poll = select.poll()

    def ready() -> bool:
        left_s = deadline_s - time.monotonic()  # a broken connection is always "ready", so the time decides first
        return left_s > 0.0 and bool(poll.poll(1000 * left_s))

    with contextlib.suppress(OSError), wire.twin() as twin:
        poll.register(twin, select.POLLOUT)
        while want_write():
            if not ready() or not write():
                return
        poll.modify(twin, select.POLLIN)
        twin.shutdown(socket.SHUT_WR)
        while ready() and twin.recv(65_536):
            pass


def plain(host: str) -> str | bytes:
    """A name in ASCII as its bytes: given a `str`, `socket` and `ssl` would load the tables of all scripts."""
    return host.encode("ascii") if host.isascii() else host


def explain(error: OSError) -> str:
    """What went wrong on a socket, in words for a log."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the broker's certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        reason = error.reason or error.strerror or str(error)
        if "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason:
            return f"the broker asks for a client certificate that it accepts ({reason}); {_REMEDY}"
        if any(words in reason for words in _NOT_ACCEPTED):
            return f"the broker does not accept our client certificate ({reason}); {_REMEDY}"
        return reason
    return error.strerror or str(error)


def explain_silence(error: OSError | None) -> str:
    """Why a broker may end a TLS connection before it has answered: `error` if that says it, or what to look at."""
    if error is not None and ALERT in (getattr(error, "reason", None) or ""):
        return explain(error)
    found = f"{explain(error)}; " if error is not None else ""
    return f"{found}if the broker asks for a client certificate, it may not accept ours, {_REMEDY}"
