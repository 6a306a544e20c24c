"""`sordino enroll-token`: what devices need to ask to become members."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from sordino_common.channel.enrolment import Token
from sordino_common.errors import ConfigError
from sordino_server.cli.output import HERE, FleetOption, JsonOption, date, note, print_json, print_table, say, table_of
from sordino_server.enrolment import tokens
from sordino_server.enrolment.broker_config import broker_place
from sordino_server.enrolment.store import EnrolmentStore
from sordino_server.home import Home

_NAMES_CHARS: Final = 1 << 20


def enroll_token(
    name: Annotated[str | None, typer.Option("--name", help="For this device only; else it says its name.")] = None,
    names: Annotated[
        str, typer.Option("--names", metavar="FILE", help="One for each device named there, a name a line; -: stdin.")
    ] = "",
    count: Annotated[int, typer.Option("--count", min=1, max=tokens.MOST_OPEN, help="So many, for any names.")] = 1,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="A file for each token there, instead of printing it."),
    ] = None,
    roles: Annotated[str, typer.Option("--roles", help="Comma-separated: data, compute, helper, dealer.")] = "data",
    zone: Annotated[str, typer.Option("--zone", help="Where the device stands.")] = "default",
    hours: Annotated[float, typer.Option("--hours", help="How long it holds.")] = 24.0,
    listing: Annotated[bool, typer.Option("--list", help="Show the tokens, and make none.")] = False,
    withdraw: Annotated[
        list[str] | None,
        typer.Option("--withdraw", metavar="ID", help="Let this token's id be used no more; any number of times."),
    ] = None,
    fleet: FleetOption = HERE,
    as_json: JsonOption = False,
) -> None:
    """Make one-time tokens: one device may ask with each to become a member. You approve it with `sordino roster`."""
    home = Home(fleet)
    with EnrolmentStore(home.folder) as store:
        if withdraw:
            with store.transaction():  # all, or none
                for number in withdraw:
                    tokens.withdraw(store, number)
            for number in withdraw:
                say(f"token {number} is withdrawn")
            return
        if listing:
            _list(store, as_json=as_json)
            return
        wanted = _wanted(name, names, count)
        place = broker_place(home)
        if place is None:
            raise ConfigError(
                f"{home.folder}: this fleet has no broker of its own, and tokens need one; make it with: "
                "sordino broker-config DIR. Without: sordino-agent init, sordino roster add"
            )
        if output is not None:
            _make_folder(output)
        made = tokens.make_tokens(
            home,
            store,
            wanted,
            roles=[role.strip() for role in roles.split(",") if role.strip()],
            zone=zone,
            hours=hours,
            enrol_port=place.enrol_port,
            now_s=time.time(),
        )
        if output is not None:
            _write_files(store, output, made)
    one = not names and count == 1
    if as_json:
        rows = [_row(token, output) for token in made]
        print_json(rows[0] if one else {"tokens": rows})
        return
    if output is None:
        for token in made:
            # Behind a #, so that the line can still be pasted whole.
            say(f"sordino-agent enroll '{token.text()}'" + ("" if one or token.name is None else f"  # {token.name}"))
    members = {entry.name for entry in home.draft().entries}
    for token in made:
        if token.name in members:
            note(
                f"{token.name} is in the roster: this token helps that very device, with the keys that it has, to a "
                f"new certificate. For another device under its name, first: sordino roster revoke {token.name}"
            )
    until = date(made[0].expires_s)
    if one:
        whose = f"for {name}" if name else "add --name NAME"
        what = f"token {made[0].id.hex()} ({whose}), once, until {until}."
    else:
        whose = "each for the device that it names" if names else "on each device, add --name NAME"
        what = f"{len(made)} tokens ({whose}), each once, until {until}."
    run = (
        ("Run the line above on the device" if one else "Run a line of its own on each device")
        if output is None
        else f"In {output}; on a device: sordino-agent enroll - <FILE"
    )
    note(f"{what} {run}; then here: sordino roster pending --fleet {fleet}")


def _wanted(name: str | None, names: str, count: int) -> list[str | None]:
    """Whom tokens are made for; None: whoever says its name."""
    if not names:
        if name is not None and count > 1:
            raise ConfigError("--name and --count: a name is one device's. For several: --names FILE")
        return [name] * count
    if name is not None or count > 1:
        raise ConfigError("--names: it says how many and for whom, so neither --name nor --count goes with it")
    if names == "-":
        return [*tokens.read_names(sys.stdin.read(_NAMES_CHARS), source="standard input")]
    try:
        with Path(names).open(encoding="utf-8") as file:
            return [*tokens.read_names(file.read(_NAMES_CHARS), source=names)]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{names}: can't be read: {getattr(error, 'strerror', None) or error}") from None


def _file_of(token: Token, folder: Path) -> Path:
    return folder / f"{token.name or token.id.hex()}.token"


def _make_folder(folder: Path) -> None:
    """Nobody else's. Said before any token is made."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: can't be made: {error.strerror}") from None


def _write_files(store: EnrolmentStore, folder: Path, made: list[Token]) -> None:
    """A file of mode 0600 each. If one can't be written, no token of them is used: all are withdrawn."""
    written: list[Path] = []
    path = folder or Path()
    try:
        for token in made:
            path = _file_of(token, folder)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            written.append(path)
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(token.text() + "\n")
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        for token in made:
            tokens.withdraw(store, token.id.hex())
        there = "; it holds an earlier token: use that, or remove it" if isinstance(error, FileExistsError) else ""
        raise ConfigError(f"{path}: can't be written: {error.strerror}{there}") from None


def _row(token: Token, folder: Path | None) -> dict[str, Any]:
    secret = {"token": token.text()} if folder is None else {"file": str(_file_of(token, folder))}
    return {"id": token.id.hex(), **secret, "expires_s": token.expires_s, "name": token.name}


def _list(store: EnrolmentStore, *, as_json: bool) -> None:
    now_s = time.time()
    rows = [
        {
            "id": record.id.hex(),
            "name": record.name,
            "roles": list(record.roles),
            "zone": record.zone,
            "expires_s": record.expires_s,
            "state": "expired" if record.state == "open" and record.expires_s <= now_s else record.state,
            "refused_requests": record.others,
        }
        for record in store.tokens()
    ]
    if as_json:
        print_json({"tokens": rows})
        return
    table = table_of("token", "name", "roles", "zone", "until", "state")
    for record, row in zip(store.tokens(), rows, strict=True):
        state = str(row["state"]) + (f", {record.others} other requests refused" if record.others else "")
        table.add_row(
            record.id.hex(), record.name or "any", ",".join(record.roles), record.zone, date(record.expires_s), state
        )
    print_table(table)
