"""The dashboard over HTTP: who may look, what a client may send instead of a request, and that text stays text."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers_notify import Manager
from helpers_view import HOSTILE, hostile, run_view, view
from sordino_common.daemon.notify import Notifier
from sordino_common.errors import ConfigError, FleetUnavailable
from sordino_server.cli import app, run_cli
from sordino_server.dashboard import web
from sordino_server.dashboard.collector import Collector
from sordino_server.dashboard.pages import page_html, parts_html
from sordino_server.dashboard.source import Source
from sordino_server.dashboard.view import View
from sordino_server.dashboard.watch import Watch
from sordino_server.dashboard.web import Dashboard, is_loopback, require_allowed
from sordino_server.store import RunStore

TOKEN = "0123456789abcdef" * 4
Serve = Callable[..., Dashboard]


@pytest.fixture
def serve() -> Iterator[Serve]:
    running: list[Dashboard] = []

    def start(look: Callable[[], View] = view, **options: object) -> Dashboard:
        dashboard = Dashboard("127.0.0.1", 0, look=look, **options)  # type: ignore[arg-type]
        threading.Thread(target=lambda: dashboard.serve_forever(poll_interval=0.05), daemon=True).start()
        running.append(dashboard)
        return dashboard

    yield start
    for dashboard in running:
        dashboard.shutdown()
        dashboard.server_close()


def get(
    dashboard: Dashboard, path: str, *, method: str = "GET", **headers: str
) -> tuple[int, http.client.HTTPMessage, str]:
    connection = http.client.HTTPConnection("127.0.0.1", dashboard.server_address[1], timeout=10)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()
    finally:
        connection.close()


def raw(dashboard: Dashboard, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", dashboard.server_address[1]), timeout=10) as client:
        answer = b""
        try:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while piece := client.recv(65536):
                answer += piece
        except OSError:  # it did not read all that we sent
            pass
        return answer


class Page(HTMLParser):
    """Which elements a browser would make, and whether they close in order."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_pages_and_parts(serve: Serve) -> None:
    dashboard = serve()
    status, headers, body = get(dashboard, "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    for words in ("<h1>lab</h1>", "round 13: training", "agent-003", "0.9300", "ward-model", "agent-004 is offline"):
        assert words in body, words
    assert get(dashboard, "/parts")[2] in body
    assert json.loads(get(dashboard, "/view.json")[2])["fleet"] == "lab"
    assert get(dashboard, "/healthz")[2] == "ok\n"
    for path in ("/style.css", "/refresh.js"):
        assert get(dashboard, path)[0] == 200
    for path in ("/favicon.ico", "/../fleet.yaml", "/%2e%2e/server.key", "//etc/passwd", "/style.css/x", "/metrics"):
        assert get(dashboard, path)[0] == 404
    head = get(dashboard, "/", method="HEAD")
    assert (head[0], head[2]) == (200, "") and int(head[1]["Content-Length"]) > 1000


def test_every_answer_has_the_headers_that_keep_others_out(serve: Serve) -> None:
    dashboard = serve()
    for path in ("/", "/parts", "/nothing", "/view.json", "/healthz"):
        headers = get(dashboard, path)[1]
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "*" not in policy
        assert "frame-ancestors 'none'" in policy and headers["X-Frame-Options"] == "DENY"
        assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "no-store")
        assert "Python" not in headers["Server"]
        assert "Access-Control-Allow-Origin" not in headers


def test_only_this_host_is_answered_by_that_name(serve: Serve) -> None:
    """DNS rebinding: a page of evil.example, whose name now means 127.0.0.1, asks through a browser of this host."""
    dashboard = serve()
    for host in ("evil.example", "127.0.0.1.evil.example:80", "", "[::1", "localhost.evil", "10.0.0.1"):
        assert get(dashboard, "/", Host=host)[0] == 421, host
        assert "lab" not in get(dashboard, "/view.json", Host=host)[2]
    for host in ("localhost", "localhost:9999", "127.0.0.1:1", "[::1]:8642"):  # an ssh tunnel has a port of its own
        assert get(dashboard, "/", Host=host)[0] == 200, host


def test_with_a_token_only_its_holder_looks(serve: Serve) -> None:
    dashboard = serve(token=TOKEN)

    def basic(text: str) -> str:
        return "Basic " + base64.b64encode(text.encode()).decode()

    refused = (
        None,
        "",
        "Basic",
        "Basic !!!",
        "Basic " + "A" * 9999,
        basic("x:wrong"),
        basic(TOKEN),
        "Bearer wrong",
        "Bearer ",
        f"Digest {TOKEN}",
        "Basic \xff\xfe",
        basic(f"x:{TOKEN}y"),
        "Bearer " + TOKEN[:-1],
    )
    for value in refused:
        headers = {} if value is None else {"Authorization": value}
        for path in ("/", "/parts", "/view.json", "/metrics", "/style.css"):
            status, answer, body = get(dashboard, path, **headers)
            assert status == 401, (value, path)
            assert answer["WWW-Authenticate"].startswith("Basic ") and "lab" not in body
    assert get(dashboard, "/healthz")[0] == 200
    for value in (basic(f"anybody:{TOKEN}"), basic(f":{TOKEN}"), f"Bearer {TOKEN}", f"bearer {TOKEN}"):
        assert get(dashboard, "/", Authorization=value)[0] == 200


GARBAGE = {
    "nothing": b"",
    "noise": bytes(range(256)) * 40,
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 300,
    "no version": b"GET /\r\n\r\n",
    "old": b"GET / HTTP/0.9\r\nHost: localhost\r\n\r\n",
    "bad version": b"GET / HTTP/x.y\r\n\r\n",
    "long line": b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    "long header": b"GET / HTTP/1.1\r\nX: " + b"b" * 70_000 + b"\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 300 + b"\r\n",
    "post": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n<script>x",
    "put": b"PUT /x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "method": b"<SCRIPT> / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "half": b"GET / HTTP/1.1\r\nHost: local",
    "bad port": b"GET http://[x/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "surrogates": b"GET /\xed\xa0\x80?run=\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "lf": b"\n" * 5000,
    "two hosts": b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
    "nul": b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


def test_garbage_costs_one_connection_and_is_never_echoed(serve: Serve) -> None:
    dashboard = serve()
    for name, data in GARBAGE.items():
        answer = raw(dashboard, data)
        assert b"<script" not in answer.split(b"\r\n\r\n")[-1].lower() or b"refresh.js" in answer, name
        assert b"Traceback" not in answer and b"<SCRIPT>" not in answer, name
        assert not answer or answer.startswith((b"HTTP/1.0 ", b"HTTP/1.1 ")), (name, answer[:80])
    assert raw(dashboard, GARBAGE["post"]).split()[1] == b"405"
    assert get(dashboard, "/")[0] == 200


def test_who_says_nothing_is_cut_off_and_too_many_are_not_served(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "MOST", 3)
    monkeypatch.setattr(web, "PATIENCE_S", 0.3)
    dashboard = serve()
    silent = [socket.create_connection(("127.0.0.1", dashboard.server_address[1]), timeout=10) for _ in range(6)]
    for client in silent:
        client.sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
    assert [client.recv(100) for client in silent] == [b""] * 6  # three at once, three when their time was over
    for client in silent:
        client.close()
    monkeypatch.setattr(web, "PATIENCE_S", 20.0)
    deadline_s = time.monotonic() + 20.0
    while True:  # the places are free as soon as their threads have noticed
        try:
            assert get(dashboard, "/healthz")[0] == 200
            break
        except (http.client.RemoteDisconnected, ConnectionResetError):
            assert time.monotonic() < deadline_s


def test_what_keeps_a_view_from_being_made_is_said(serve: Serve) -> None:
    def fail() -> View:
        raise FleetUnavailable("/x/runs.sqlite: <b>gone</b>")

    dashboard = serve(fail)
    status, _, body = get(dashboard, "/")
    assert status == 503 and "&lt;b&gt;gone" in body and "<b>" not in body
    Page(body)
    assert get(dashboard, "/parts")[0::2] == (503, "/x/runs.sqlite: <b>gone</b>\n")


# --- pages ---------------------------------------------------------------------------------------------------------

VIEWS = {
    "quiet": lambda: view(0, runs=(), datasets=(), notices=(), roster_epoch=None, roster_expires_s=None),
    "one": lambda: view(1), "ten": lambda: view(10), "many": lambda: view(300),
    "failed": lambda: view(runs=(run_view("failed", error="quorum missed"), run_view("running", silent_s=99.0))),
    "no rounds": lambda: view(runs=(run_view("running", rounds=0, spent=()),)),
    "one round": lambda: view(runs=(run_view("done", rounds=1),)),
    "long": lambda: view(runs=(run_view("done", rounds=3000),)),
    "hostile": hostile,
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_a_page_is_well_formed_and_has_nothing_inline(name: str) -> None:
    page = Page(page_html(VIEWS[name]()))
    for tag, attributes in page.seen:
        assert not {key for key in attributes if key.startswith("on") or key == "style"}
        if tag == "script":
            assert attributes == {"src": "/refresh.js", "defer": None}
        assert tag not in {"img", "iframe", "object", "style", "base", "form"}
        if "href" in attributes:
            assert (attributes["href"] or "").startswith(("/", "data:,"))
    ids = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.seen:
        if tag == "svg":
            assert attributes.get("aria-label"), "a picture without a name"
        if tag == "th":
            assert attributes.get("scope") == "col"
    assert len(page_html(VIEWS[name]())) < 600_000


def test_text_from_outside_stays_text() -> None:
    html = page_html(hostile())
    assert "<script>alert" not in html and "<img" not in html and html.count("&lt;script&gt;") > 20
    assert HOSTILE not in html


def test_no_state_is_told_by_colour_alone() -> None:
    html = parts_html(view(10))
    for words in (
        "agent-003: refused",
        "</span> refused</td>",
        "3 awaited",
        "1 offline",
        'aria-label="rounds"',
        ">: awaited<",
    ):
        assert words in html, words


def test_a_run_is_chosen_by_its_name() -> None:
    runs = (run_view("done", run="new-1"), run_view("failed", run="old-1", error="it broke"))
    assert "Run new-1" in parts_html(view(runs=runs))
    assert "Run old-1" in parts_html(view(runs=runs), chosen="old-1")
    assert "Run new-1" in parts_html(view(runs=runs), chosen="gone-1")
    assert web._chosen("run=" + "x" * 500) == web._chosen("run=<b>") == web._chosen("\xff&run=A") == ""
    assert web._chosen("a=b&run=old-1") == "old-1"


# --- where it listens ----------------------------------------------------------------------------------------------


def test_addresses() -> None:
    for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost"):
        assert is_loopback(host)
        require_allowed(host, remote=False, token=None)
    for host in ("0.0.0.0", "::", "10.1.2.3", "gateway.example", ""):
        for remote, token in ((False, None), (True, None), (False, TOKEN)):
            with pytest.raises(ConfigError, match=r"others could reach this address.*--allow-remote --token-file"):
                require_allowed(host, remote=remote, token=token)
        require_allowed(host, remote=True, token=TOKEN)
        with pytest.raises(ConfigError, match="the token has 5 characters, at least 24 are needed"):
            require_allowed(host, remote=True, token="short")


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunStore(tmp_path, wall_s=lambda: 1.0).close()

    def call(*arguments: str) -> str:
        assert run_cli(app, ["web", "--fleet", str(tmp_path), *arguments], program="sordino") == 2
        return capsys.readouterr().err

    assert "others could reach this address" in call("--host", "0.0.0.0")
    token = tmp_path / "token"
    assert "can't be read: No such file" in call("--token-file", str(token))
    token.write_text("x\n")
    token.chmod(0o644)
    assert f"readable by others; run chmod 600 {token}" in call("--token-file", str(token))
    token.chmod(0o600)
    assert "the token has 1 characters" in call("--token-file", str(token), "--host", "0.0.0.0", "--allow-remote")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "can't be listened on: Address already in use" in call("--port", str(taken.getsockname()[1]))
    assert "no fleet.yaml" in call("--fleet", str(tmp_path / "nowhere"))


def test_the_other_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda name="": pytest.fail("nobody needs the resolver"))
    try:
        dashboard = Dashboard("::1", 0, look=view)
    except ConfigError:
        pytest.skip("no IPv6 here")
    with dashboard:
        assert dashboard.url == f"http://[::1]:{dashboard.server_address[1]}/"


def test_a_process_serves_a_real_store_and_ends_in_order(tmp_path: Path) -> None:
    RunStore(tmp_path, wall_s=lambda: 1.0).close()
    command = [sys.executable, "-m", "sordino_server.cli", "web", "--fleet", str(tmp_path), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stderr is not None
    url = process.stderr.readline().split()[0]
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert b"No run yet" in answer.read()
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=30)
    assert (process.returncode, rest) == (0, "")


class Thread:
    """As much of a `Collector` as the watch asks."""

    def __init__(self) -> None:
        self.knocks = 0
        self.heard = True

    def knock(self) -> None:
        self.knocks += 1
        self.heard = False


def test_a_thread_that_does_not_answer_starves_the_watchdog(tmp_path: Path) -> None:
    manager = Manager(tmp_path / "notify")
    thread, now_s = Thread(), [0.0]
    watch = Watch(
        Notifier.from_environment(manager.environment(watchdog_s=10.0)), thread, url="http://x/", now_s=lambda: now_s[0]
    )
    for _ in range(3):
        watch.turn()
    manager.read()
    assert (thread.knocks, manager.messages) == (1, [])  # not ready before the thread has turned
    thread.heard = True
    watch.turn()
    manager.read()
    assert (manager.steps, manager.status, manager.count("WATCHDOG=1")) == (["READY=1"], "http://x/", 1)
    now_s[0] = 4.9
    watch.turn()
    assert thread.knocks == 1  # not due yet
    now_s[0] = 5.0
    for _ in range(3):
        watch.turn()
    manager.read()
    assert (thread.knocks, manager.count("WATCHDOG=1")) == (2, 1)
    thread.heard = True
    watch.turn()
    manager.read()
    assert (manager.steps, manager.count("WATCHDOG=1")) == (["READY=1"], 2)
    manager.close()


def test_a_collector_that_hangs_is_not_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunStore(tmp_path, wall_s=lambda: 1.0).close()
    hangs, goes_on = threading.Event(), threading.Event()
    look = Source.view

    def slow(source: Source) -> View:
        hangs.set()
        goes_on.wait(30)
        return look(source)

    monkeypatch.setattr(Source, "view", slow)
    with Collector(tmp_path, version="1") as collector:
        asker = threading.Thread(target=collector.view)
        asker.start()
        assert hangs.wait(30)
        collector.knock()
        assert not collector.heard  # a disk that does not answer
        goes_on.set()
        asker.join(30)
        while not collector.heard:
            asker.join(0.01)


def test_a_collector_looks_once_for_many_and_recovers(tmp_path: Path) -> None:
    RunStore(tmp_path, wall_s=lambda: 1.0).close()
    with Collector(tmp_path, version="1") as collector:
        found: list[View] = []
        askers = [threading.Thread(target=lambda: found.append(collector.view())) for _ in range(8)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join(30)
        assert len(found) == 8 and len({one.at_s for one in found}) <= 2
