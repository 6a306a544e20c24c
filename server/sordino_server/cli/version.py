"""--version, for every program of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import typer

from sordino_server.cli.output import installed_version

VERSION_HELP: Final = "Print the version."


def add_version(application: typer.Typer, program: str) -> None:
    """Let `application` take --version before a command."""

    def show(wanted: bool) -> None:
        if wanted:
            typer.echo(f"{program} {installed_version()}")
            raise typer.Exit

    option: Any = typer.Option(False, "--version", help=VERSION_HELP, is_eager=True, callback=show)
    application.callback()(_options(option))


def _options(option: Any) -> Callable[..., None]:
    # The option as a default: as an annotation it could not name what is local here.
    def options(version: bool = option) -> None:
        """What the option does is done before a command is looked for."""

    return options
