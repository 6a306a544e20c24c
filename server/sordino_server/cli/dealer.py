"""`sordino dealer`: the dealer as a process on a host of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sordino_common.daemon.logs import set_up_logging
from sordino_common.daemon.notify import Notifier
from sordino_common.errors import ConfigError, SordinoError
from sordino_server.cli.output import LogFormat, LogFormatOption, installed_version, say

dealer_app = typer.Typer(
    help="The dealer of sessions on shares as a process on a host of its own: the server then sees no masks.",
    no_args_is_help=True,
)


@dealer_app.command("init")
def dealer_init(
    folder: Annotated[Path, typer.Argument(help="A new folder, on the dealer's host.")],
    member: Annotated[
        Path | None,
        typer.Option("--member", help="Where `sordino-agent enroll` made it a member; then nothing else is needed."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The dealer's name in the fleet.")] = None,
    fleet: Annotated[str | None, typer.Option("--fleet", help="The fleet's name.")] = None,
    operator_key: Annotated[
        str | None, typer.Option("--operator-key", help="64 hex digits, as `sordino init` printed them.")
    ] = None,
    broker: Annotated[str | None, typer.Option("--broker", help="HOST:PORT of the MQTT broker.")] = None,
    server: Annotated[str | None, typer.Option("--server", help="The server's name in the fleet: server.")] = None,
) -> None:
    """Make a dealer: its keys, dealer.yaml, and the request to be enrolled.

    On a broker that asks for certificates (`sordino broker-config`) enrol it as a device first, and give it the role:
    `sordino-agent enroll TOKEN --dir DIR`, at the server's `sordino roster approve NAME --roles dealer`, and then
    `sordino dealer init FOLDER --member DIR`.
    """
    from sordino_server.dealer.process import REQUEST_FILE, enrol_dealer, enrol_member

    if member is not None:
        if {name, fleet, operator_key, broker, server} != {None}:
            raise ConfigError(
                "sordino dealer init: --member says name, fleet, operator's key, broker and server already"
            )
        known = enrol_member(folder, member)
        say(f"dealer {known}\n\nNext:\n  sordino dealer run {folder}\nand in the job:\n  spdz: {{dealer: {known}}}")
        return
    if name is None or fleet is None or operator_key is None or broker is None:
        raise ConfigError("sordino dealer init: give --name, --fleet, --operator-key and --broker, or --member")
    key = enrol_dealer(
        folder, name=name, fleet=fleet, operator_key=operator_key, broker=broker, server=server or "server"
    )
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
