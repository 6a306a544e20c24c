"""`sordino support-bundle`: for whoever is asked for help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sordino_server.cli.output import HERE, DatabaseOption, FleetOption, JsonOption, installed_version, print_json, say


def support_bundle(
    fleet: FleetOption = HERE,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A new .tar.gz file.")] = None,
    logs: Annotated[
        list[Path] | None, typer.Option("--log", metavar="FILE", help="A log file; our lines of it.")
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Say what would be in it; write nothing.")] = False,
    as_json: JsonOption = False,
    database: DatabaseOption = None,
) -> None:
    """Versions, configuration, roster, runs and logs in one file, without secrets. It is written, not sent."""
    from sordino_server.support import make_bundle

    bundle = make_bundle(fleet, version=installed_version(), logs=logs or (), database=database)
    path = output or Path(f"{bundle.title}.tar.gz")
    if not list_only:
        bundle.write(path)
    if as_json:
        parts = [{"name": part.name, "bytes": len(part.data), "about": part.about} for part in bundle.parts]
        print_json({"file": None if list_only else str(path), "parts": parts})
        return
    for line in bundle.listing():
        say(line)
    if not list_only:
        say(f"\n{path}: written, and not sent to anybody. Look before you send it:\n  tar -xzOf {path} | less")
