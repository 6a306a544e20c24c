"""The dashboard in a real browser: scripts run, hostile text does not, what changes is put in place, pictures are made.

`chromium --headless --dump-dom` gives the page as it stands after its scripts have run for a virtual while.
"""

from __future__ import annotations

import os
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from helpers_mosquitto import find_program
from helpers_view import hostile, run_view, view
from sordino_server.dashboard.view import View
from sordino_server.dashboard.web import Dashboard

CHROMIUM = find_program("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium program (apt install chromium)"),
    pytest.mark.timeout(240),
]


@contextmanager
def served(look: Callable[[], View]) -> Iterator[str]:
    with Dashboard("127.0.0.1", 0, look=look) as dashboard:
        thread = threading.Thread(target=lambda: dashboard.serve_forever(poll_interval=0.05), daemon=True)
        thread.start()
        yield dashboard.url
        dashboard.shutdown()
        thread.join(10)


def chromium(tmp_path: Path, url: str, *arguments: str) -> str:
    """Its stdout. As root it can't make its sandbox; the pages here are our own."""
    assert CHROMIUM is not None
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    command = [
        CHROMIUM, "--headless", *sandbox, "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
        "--hide-scrollbars", *arguments, url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=200, check=True)
    return done.stdout.decode("utf-8", "replace")


def test_hostile_text_runs_nowhere_and_newer_parts_come_in(tmp_path: Path) -> None:
    views = [0]

    def look() -> View:
        """First quiet; then, for the refresh, with all that a device could say."""
        views[0] += 1
        if views[0] == 1:
            return view(10)
        attack = "<img src=x onerror=\"document.title='owned'\"><svg onload=\"document.title='owned'\"></svg>"
        evil = hostile()
        agents = tuple(msgspec.structs.replace(agent, note=attack) for agent in evil.agents)
        notices = tuple(msgspec.structs.replace(notice, text=attack) for notice in evil.notices)
        return msgspec.structs.replace(evil, fleet="lab", agents=agents, notices=notices)

    with served(look) as url:
        dom = chromium(tmp_path, url, "--dump-dom", "--virtual-time-budget=9000")
    assert views[0] >= 3, "the script has not asked again"
    assert "&lt;script&gt;alert" in dom and "&lt;img src=x onerror" in dom  # the newer parts are there, as text
    assert "<title>lab: Sordino</title>" in dom
    body = dom.split("<body>")[1]
    assert "<script" not in body and "<img" not in body and "<svg onload" not in body
    assert 'id="pause" aria-pressed="false"' in dom  # the button that only a script can serve is shown


def test_a_server_that_is_gone_is_said(tmp_path: Path) -> None:
    views = [0]

    def look() -> View:
        views[0] += 1
        if views[0] > 1:
            raise ConnectionError("gone in mid-answer")
        return view(3)

    with served(look) as url:
        dom = chromium(tmp_path, url, "--dump-dom", "--virtual-time-budget=5000")
    assert 'role="status" class="stale">What you see is old: sordino web does not answer' in dom
    assert "agent-002" in dom  # and what was known stays


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1100, True)])
def test_a_picture_is_made(tmp_path: Path, width: int, dark: bool) -> None:
    whole = msgspec.structs.replace(view(200), runs=(run_view(), run_view("failed", run="x" * 80, error="y" * 300)))
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    picture = tmp_path / "page.png"
    with served(lambda: whole) as url:
        chromium(tmp_path, url, f"--screenshot={picture}", f"--window-size={width},1500", *flags)
    data = picture.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (width, 1500)
    assert len(data) > 30_000  # a blank page has 5 kB
