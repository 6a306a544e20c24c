"""`sordino dealer`: the dealer as a process on a host of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sordino_common.daemon.logs import set_up_logging
from sordino_common.daemon.notify import Notifier
from sordino_common.errors import SordinoError
from sordino_server.cli.output import LogFormat, LogFormatOption, installed_version, say

dealer_app = typer.Typer(
    help="The dealer of sessions on shares as a process on a host of its own: the server then sees no masks.",
    no_args_is_help=True,
)


@dealer_app.command("init")
def dealer_init(
    folder: Annotated[Path, typer.Argument(help="A new folder, on the dealer's host.")],
    name: Annotated[str, typer.Option("--name", help="The dealer's name in the fleet.")],
    fleet: Annotated[str, typer.Option("--fleet", help="The fleet's name.")],
    operator_key: Annotated[str, typer.Option("--operator-key", help="64 hex digits, as `sordino init` printed them.")],
    broker: Annotated[str, typer.Option("--broker", help="HOST:PORT of the MQTT broker.")],
    server: Annotated[str, typer.Option("--server", help="The server's name in the fleet.")] = "server",
) -> None:
    """Make a dealer: its keys, dealer.yaml, and the request to be enrolled."""
    from sordino_server.dealer.process import REQUEST_FILE, enrol_dealer

    key = enrol_dealer(folder, name=name, fleet=fleet, operator_key=operator_key, broker=broker, server=server)
    say(
        f"dealer {name}  {key.fingerprint}\n\n"
        "At the server's, comparing the fingerprint:\n"
        f"  sordino roster add {folder / REQUEST_FILE} --roles dealer\n  sordino roster sign\n"
        f"Then here:\n  sordino dealer run {folder}\n"
        f"and in the job:\n  spdz: {{dealer: {name}}}"
    )


@dealer_app.command("run")
def dealer_run(
    folder: Annotated[Path, typer.Argument(help="The folder that `sordino dealer init` made.")],
    log_format: LogFormatOption = LogFormat.auto,
) -> None:
    """Deal preprocessing until stopped."""
    from sordino_server.dealer.process import run_dealer

    set_up_logging("sordino-dealer", form=log_format.value)
    notifier = Notifier.from_environment(os.environ)
    try:
        run_dealer(folder, version=installed_version(), notifier=notifier)
    except SordinoError as error:
        notifier.status(str(error))  # it stays in `systemctl status` when the process is gone
        raise
