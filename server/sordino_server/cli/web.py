"""`sordino web`: the dashboard."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Final

import typer

from sordino_common.channel.credentials import located, seen_by_others
from sordino_common.daemon.logs import set_up_logging
from sordino_common.daemon.notify import Notifier
from sordino_common.errors import ConfigError, SordinoError
from sordino_server.cli.output import (
    HERE,
    DatabaseOption,
    FleetOption,
    LogFormat,
    LogFormatOption,
    installed_version,
    note,
)

if TYPE_CHECKING:
    from sordino_server.dashboard.web import Dashboard

_STOP_S: Final = 25.0  # connections that are being answered, and the collector


def web(
    fleet: FleetOption = HERE,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8642,
    database: DatabaseOption = None,
    connect: Annotated[
        bool, typer.Option("--connect", help="Listen to the broker too: who is online while nothing is trained.")
    ] = False,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Listen on an address that others reach. Needs --token-file.")
    ] = False,
    token_file: Annotated[
        str,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="A file of mode 0600, or credential:NAME: who has its first line may look.",
            envvar="SORDINO_WEB_TOKEN_FILE",
        ),
    ] = "",
    log_format: LogFormatOption = LogFormat.auto,
) -> None:
    """The fleet in a browser, and its figures for Prometheus under /metrics. Nothing there changes a run."""
    from sordino_server.dashboard.web import require_allowed

    notifier = Notifier.from_environment(os.environ)
    try:
        token = read_token(located(token_file, Path())) if token_file else None
        require_allowed(host, remote=allow_remote, token=token)
        _serve(
            fleet, host, port, database=database, connect=connect, token=token, notifier=notifier, log_format=log_format
        )
    except SordinoError as error:
        notifier.status(str(error))  # it stays in `systemctl status` when the process is gone
        raise


def _serve(
    fleet: Path,
    host: str,
    port: int,
    *,
    database: str | None,
    connect: bool,
    token: str | None,
    notifier: Notifier,
    log_format: LogFormat,
) -> None:
    from sordino_server.dashboard.collector import Collector
    from sordino_server.dashboard.metrics import exposition
    from sordino_server.dashboard.source import Source
    from sordino_server.dashboard.watch import Watch
    from sordino_server.dashboard.web import Dashboard

    broker = None
    if connect:
        from sordino_server.fleet import mqtt_settings
        from sordino_server.home import Home

        broker = mqtt_settings(Home(fleet))
    with Source(fleet, version=installed_version(), database=database) as source:
        source.view(runs=0)  # what is wrong with the folder is said now, and not to the first visitor
    with (
        Collector(fleet, version=installed_version(), broker=broker, database=database) as collector,
        Dashboard(host, port, look=collector.view, metrics=exposition, token=token) as dashboard,
    ):
        set_up_logging("sordino-web", form=log_format.value, level=logging.WARNING)
        dashboard.on_turn = Watch(notifier, collector, url=dashboard.url).turn
        before = {number: signal.signal(number, _stop(dashboard)) for number in (signal.SIGINT, signal.SIGTERM)}
        note(f"{dashboard.url} (Ctrl-C ends it)")
        try:
            dashboard.serve_forever(poll_interval=0.5)
        finally:
            notifier.stopping(_STOP_S)
            for number, handler in before.items():
                signal.signal(number, handler)


def read_token(path: Path) -> str:
    """The first line of a file that nobody else can read. Raises `ConfigError`."""
    try:
        if seen_by_others(path, path.stat()):
            raise ConfigError(f"{path}: readable by others; run chmod 600 {path}")
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    token = lines[0].strip() if lines else ""
    if not token or not token.isascii():
        raise ConfigError(f"{path}: no token of ASCII letters in its first line; openssl rand -hex 32 makes one")
    return token


def _stop(dashboard: Dashboard) -> Callable[[int, FrameType | None], None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        threading.Thread(target=dashboard.shutdown, daemon=True).start()  # `shutdown` waits for the loop that we are in

    return stop
