"""`sordino top`: the fleet on a terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from sordino_common.errors import ConfigError, FleetUnavailable
from sordino_common.transport.reactor import READ, Reactor
from sordino_server.cli.output import HERE, DatabaseOption, FleetOption, JsonOption, installed_version, print_json
from sordino_server.dashboard.source import Source
from sordino_server.dashboard.terminal import frame

_LINES: Final = 24  # of a frame that goes to a script
_CONNECT_S: Final = 10.0


def top(
    fleet: FleetOption = HERE,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end: for scripts.")] = False,
    as_json: JsonOption = False,
    connect: Annotated[
        bool, typer.Option("--connect", help="Listen to the broker too: who is online while nothing is trained.")
    ] = False,
    database: DatabaseOption = None,
    interval_s: Annotated[float, typer.Option("--interval", min=0.2, help="Seconds between two frames.")] = 1.0,
) -> None:
    """Agents, rounds, bytes, budgets and errors, live. Only looks: a run is neither stopped nor slowed."""
    if not (once or as_json) and not sys.stdout.isatty():
        raise ConfigError("sordino top: stdout is no terminal; one frame for a script: --once, or --json")
    with ExitStack() as stack:
        births, reactor = None, None
        if connect:
            from sordino_server.dashboard.births import listening
            from sordino_server.fleet import mqtt_settings
            from sordino_server.home import Home

            home = Home(fleet)
            births, reactor = stack.enter_context(listening(home, mqtt_settings(home)))
        reactor = reactor or stack.enter_context(Reactor())
        source = stack.enter_context(Source(fleet, version=installed_version(), births=births, database=database))
        if once or as_json:
            if births is not None:
                listener = births
                until_s = reactor.now_s() + _CONNECT_S
                reactor.run_until(lambda: listener.heard or "away" in listener.state, deadline_s=until_s)
                reactor.run_until(lambda: False, deadline_s=reactor.now_s() + 1.0)  # what is retained comes at once
            _print(source, as_json=as_json)
            if births is not None and not births.heard:
                raise FleetUnavailable(f"births were asked for (--connect), but {births.state}")
            return
        _live(source, reactor, interval_s=interval_s)


def _print(source: Source, *, as_json: bool) -> None:
    view = source.view()
    if as_json:
        print_json(msgspec.to_builtins(view))
        return
    console = Console(highlight=False)
    height = console.height if console.is_terminal else max(console.height, _LINES)
    for line in frame(view, width=console.width, height=height):
        console.print(_encodable(line, console), no_wrap=True, overflow="crop", crop=True)


def _live(source: Source, reactor: Reactor, *, interval_s: float) -> None:
    """Until Ctrl-C, SIGTERM or `q`."""
    stopped = False

    def stop(number: int = 0, _frame: FrameType | None = None) -> None:
        nonlocal stopped
        stopped = True
        reactor.wake()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    console = Console(highlight=False)
    try:
        with _keys(reactor, stop), Live(console=console, screen=True, auto_refresh=False) as live:
            while not stopped:
                lines = frame(source.view(), width=console.width, height=console.height)
                live.update(Group(*(_encodable(line, console) for line in lines)), refresh=True)
                reactor.run_until(lambda: stopped, deadline_s=reactor.now_s() + interval_s)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _encodable(line: Text, console: Console) -> Text:
    """With a ? for what the terminal has no letter for (LANG=C)."""
    line.plain = line.plain.encode(console.encoding, "replace").decode(console.encoding)
    return line


@contextmanager
def _keys(reactor: Reactor, stop: Any) -> Iterator[None]:
    """`q` ends it, if stdin is a terminal; no other key is shown."""
    if not sys.stdin.isatty():
        yield
        return
    import os
    import termios
    import tty

    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)

    def read(_events: int) -> None:
        if {b"q", b"Q", b""} & {os.read(handle, 64)[:1]}:
            stop()

    tty.setcbreak(handle)
    reactor.register(handle, READ, read)
    try:
        yield
    finally:
        reactor.unregister(handle)
        termios.tcsetattr(handle, termios.TCSADRAIN, before)
