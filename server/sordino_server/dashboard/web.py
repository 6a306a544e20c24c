"""The dashboard over HTTP: GET only, a handful of paths, text that is escaped, headers that let nothing else in.

Who may look. On a loopback address: whoever is on this host; the Host header has to name this host, or a page on the
net could rebind its own name to 127.0.0.1 and read on in a browser here. On other addresses: whoever has the token, as
the password of HTTP Basic (browsers ask for it, any user name) or as a Bearer.

What a client could send instead of a request: garbage, half a request and then nothing, a request of gigabytes, a
thousand connections. Each connection has `PATIENCE_S` in all, `MOST` are served at a time, bodies are not read.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import logging
import re
import socket
import threading
import time
from collections.abc import Callable
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from socketserver import TCPServer
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import msgspec

from sordino_common.errors import ConfigError, SordinoError
from sordino_server.dashboard.pages import page_html, parts_html
from sordino_server.dashboard.view import View
from sordino_server.page import STYLE, document

log = logging.getLogger("sordino.web")

PATIENCE_S: Final = 20.0
MOST: Final = 32
_POLL_S: Final = 0.5
_RUN: Final = re.compile(r"[a-z0-9-]{1,80}")
_HOSTS: Final = frozenset({"localhost", "127.0.0.1", "::1"})
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}
TOKEN_CHARS: Final = 24
Look = Callable[[], View]
Metrics = Callable[[View], bytes]


def require_allowed(host: str, *, remote: bool, token: str | None) -> None:
    """Raises `ConfigError` for an address that others can reach, unless that is meant and a token keeps the door."""
    if token is not None and len(token) < TOKEN_CHARS:
        raise ConfigError(
            f"the token has {len(token)} characters, at least {TOKEN_CHARS} are needed: it is all that keeps others "
            "out. Make one: (umask 077; openssl rand -hex 32 > web.token)"
        )
    if is_loopback(host):
        return
    if not remote or token is None:
        raise ConfigError(
            f"--host {host}: others could reach this address, and the dashboard shows who takes part, when, and how "
            "well. From another machine, better: ssh -L 8642:localhost:8642 HOST. If it is meant: --allow-remote "
            "--token-file FILE, behind something that speaks TLS, since the token travels as it is"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it. Names other than localhost are taken for reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Dashboard(ThreadingHTTPServer):
    """Listens when made; `serve_forever` in some thread, `shutdown` from another. Raises `ConfigError` if it can't."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        host: str,
        port: int,
        *,
        look: Look,
        metrics: Metrics | None = None,
        token: str | None = None,
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_turn`: called between connections, twice a second."""
        self.on_turn = on_turn
        self.look = look
        self.metrics = metrics
        self.token = token
        self.check_host = is_loopback(host)
        self._places = threading.BoundedSemaphore(MOST)
        self._since: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            self.address_family = found[0][0]
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"sordino web: {host}:{port} can't be listened on: {why}; another --port?") from None

    def server_bind(self) -> None:
        """As TCPServer does it: HTTPServer would ask the resolver for a name that nobody needs."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        name = f"[{host!s}]" if ":" in str(host) else str(host)
        return f"http://{name}:{port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        with self._lock:
            self._since[request] = time.monotonic()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._since.pop(request, None)
            self._places.release()

    def service_actions(self) -> None:
        """Between connections: those whose time is over are cut, however slowly they go on sending."""
        self.on_turn()
        now_s = time.monotonic()
        with self._lock:
            late = [request for request, since_s in self._since.items() if now_s > since_s + PATIENCE_S]
            for request in late:
                try:
                    request.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # it has ended by itself

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("event=client-lost", exc_info=True)  # reset, timed out, went away in mid-answer


class _Handler(BaseHTTPRequestHandler):
    server_version = "sordino"
    sys_version = ""
    timeout = PATIENCE_S

    @property
    def _dashboard(self) -> Dashboard:
        assert isinstance(self.server, Dashboard)
        return self.server

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if self.request_version == "HTTP/0.9":
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        if self._dashboard.check_host and not self._host_is_ours():
            self._text(HTTPStatus.MISDIRECTED_REQUEST, "this dashboard answers to localhost only")
            return
        try:
            url = urlsplit(self.path)
        except ValueError:
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        if url.path == "/healthz":
            self._text(HTTPStatus.OK, "ok")
            return
        if not self._has_token():
            self._text(
                HTTPStatus.UNAUTHORIZED, "the token, please",
                {"WWW-Authenticate": 'Basic realm="sordino", charset="UTF-8"'},
            )  # fmt: skip
            return
        try:
            self._route(url.path, url.query)
        except SordinoError as error:
            self._trouble(url.path, str(error))

    def _route(self, path: str, query: str) -> None:
        look = self._dashboard.look
        match path:
            case "/":
                self._send(HTTPStatus.OK, "text/html", page_html(look(), chosen=_chosen(query)))
            case "/parts":
                self._send(HTTPStatus.OK, "text/html", parts_html(look(), chosen=_chosen(query)))
            case "/view.json":
                self._send(HTTPStatus.OK, "application/json", msgspec.json.encode(look()))
            case "/metrics" if self._dashboard.metrics is not None:
                self._send(HTTPStatus.OK, "text/plain; version=0.0.4", self._dashboard.metrics(look()))
            case "/style.css":
                self._send(HTTPStatus.OK, "text/css", STYLE + _asset("style.css"))
            case "/refresh.js":
                self._send(HTTPStatus.OK, "text/javascript", _asset("refresh.js"))
            case _:
                self._text(HTTPStatus.NOT_FOUND, "there is nothing here; the dashboard is at /")

    # --- who asks --------------------------------------------------------------------------------------------------

    def _host_is_ours(self) -> bool:
        try:
            return urlsplit(f"//{self.headers.get('Host', '')}").hostname in _HOSTS
        except ValueError:
            return False

    def _has_token(self) -> bool:
        if self._dashboard.token is None:
            return True
        scheme, _, value = (self.headers.get("Authorization") or "").partition(" ")
        given = value.strip()
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode("utf-8").partition(":")[2]
            except (binascii.Error, UnicodeDecodeError, ValueError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._dashboard.token.encode())

    # --- what is answered ------------------------------------------------------------------------------------------

    def _send(self, status: HTTPStatus, kind: str, body: str | bytes, headers: dict[str, str] | None = None) -> None:
        data = body.encode("utf-8", "replace") if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        for name, value in {**HEADERS, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _text(self, status: HTTPStatus, text: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, "text/plain", f"{text}\n", headers)

    def _trouble(self, path: str, text: str) -> None:
        if path != "/":
            self._text(HTTPStatus.SERVICE_UNAVAILABLE, text)
            return
        alarm = f'<section class="alarm" role="alert"><h2>No view</h2><p>{escape(text)}</p></section>'
        head = '<link rel="stylesheet" href="/style.css"><meta http-equiv="refresh" content="10">'
        self._send(HTTPStatus.SERVICE_UNAVAILABLE, "text/html", document("Sordino", [alarm], head=head, footer=""))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Requests that the parser refuses, and methods that there are not."""
        status = HTTPStatus(code)
        if status == HTTPStatus.NOT_IMPLEMENTED:
            status = HTTPStatus.METHOD_NOT_ALLOWED
        self.close_connection = True
        if not hasattr(self, "request_version") or self.request_version == "HTTP/0.9":
            self.request_version = "HTTP/1.0"
        self._text(status, f"{status.value} {status.phrase}", {"Allow": "GET, HEAD"})

    def version_string(self) -> str:
        return self.server_version

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class's name
        log.debug("event=request from=%s what=%r", self.client_address[0], format % args)


def _chosen(query: str) -> str:
    values = parse_qs(query[:400]).get("run", [""])
    return values[0] if _RUN.fullmatch(values[0]) else ""


def _asset(name: str) -> str:
    return files("sordino_server.dashboard").joinpath(name).read_text("utf-8")
