"""What commands share: their common options, and how they print."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from sordino_server.home import Home
from sordino_server.store import RUNS_FILE, RunStore

FleetOption = Annotated[Path, typer.Option("--fleet", help="The fleet directory.", envvar="SORDINO_FLEET")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Instead of what the file says; any number of times."),
]
DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--database",
        help="Run records in PostgreSQL (postgresql://...); else fleet.yaml's `database`, else runs.sqlite.",
        envvar="SORDINO_DATABASE",
    ),
]
JobArgument = Annotated[Path, typer.Argument(help="The job file.")]
RunArgument = Annotated[str, typer.Argument(help="The run, as `sordino runs` lists it.")]
HERE: Final = Path()


class LogFormat(StrEnum):
    """How a process logs (`sordino_common.daemon.logs`)."""

    auto = "auto"
    text = "text"
    json = "json"
    journal = "journal"


LogFormatOption = Annotated[
    LogFormat, typer.Option("--log-format", help="auto: the journal with its fields under systemd, else text.")
]


def open_store(folder: Path, database: str | None = None) -> RunStore:
    """The run records of the fleet in `folder`, or those that `sordino-sim run --store` has left there; `database`
    counts before fleet.yaml's."""
    if (folder / "fleet.yaml").exists() or not (folder / RUNS_FILE).exists():
        home = Home(folder)
        folder, database = home.folder, database or home.spec.database
    return RunStore(folder, wall_s=time.time, database=database)


def table_of(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


@contextmanager
def printing(width: int) -> Iterator[Console]:
    """A console on stdout. If that is no terminal, lines of up to `width`, so that a row is a line, and no blanks at
    their ends."""
    console = Console(highlight=False)
    if console.is_terminal:
        yield console
        return
    console.width = max(console.width, width)
    with console.capture() as captured:
        yield console
    say("\n".join(line.rstrip() for line in captured.get().splitlines()))


def print_table(table: Table) -> None:
    with printing(240) as console:
        console.print(table)


def print_json(value: object) -> None:
    say(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    sys.stderr.write(text + "\n")


def date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def installed_version() -> str:
    return metadata.version("sordino")
