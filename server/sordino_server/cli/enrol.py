"""`sordino enroll-token`: what a device needs to ask to become a member."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from sordino_common.errors import ConfigError
from sordino_server.cli.output import HERE, FleetOption, JsonOption, date, note, print_json, print_table, say, table_of
from sordino_server.enrolment import tokens
from sordino_server.enrolment.broker_config import broker_place
from sordino_server.enrolment.store import EnrolmentStore
from sordino_server.home import Home


def enroll_token(
    name: Annotated[str | None, typer.Option("--name", help="For this device only; else it says its name.")] = None,
    roles: Annotated[str, typer.Option("--roles", help="Comma-separated: data, compute, helper, dealer.")] = "data",
    zone: Annotated[str, typer.Option("--zone", help="Where the device stands.")] = "default",
    hours: Annotated[float, typer.Option("--hours", help="How long it holds.")] = 24.0,
    listing: Annotated[bool, typer.Option("--list", help="Show the tokens, and make none.")] = False,
    withdraw: Annotated[
        str, typer.Option("--withdraw", metavar="ID", help="Let this token's id be used no more.")
    ] = "",
    fleet: FleetOption = HERE,
    as_json: JsonOption = False,
) -> None:
    """Make a one-time token: one device may ask with it to become a member. You approve it with `sordino roster`."""
    home = Home(fleet)
    with EnrolmentStore(home.folder) as store:
        if withdraw:
            tokens.withdraw(store, withdraw)
            say(f"token {withdraw} is withdrawn")
            return
        if listing:
            _list(store, as_json=as_json)
            return
        place = broker_place(home)
        if place is None:
            raise ConfigError(
                f"{home.folder}: this fleet has no broker of its own, and tokens need one; make it with: "
                "sordino broker-config DIR. Without: sordino-agent init, sordino roster add"
            )
        wanted = [role.strip() for role in roles.split(",") if role.strip()]
        made = tokens.make_token(
            home,
            store,
            name=name,
            roles=wanted,
            zone=zone,
            hours=hours,
            enrol_port=place.enrol_port,
            now_s=time.time(),
        )
    if as_json:
        print_json({"id": made.id.hex(), "token": made.text(), "expires_s": made.expires_s, "name": name})
        return
    say(f"sordino-agent enroll '{made.text()}'")
    if name is not None and any(entry.name == name for entry in home.draft().entries):
        note(
            f"{name} is in the roster: this token helps that very device, with the keys that it has, to a new "
            f"certificate. For another device under its name, first: sordino roster revoke {name}"
        )
    whose = f"for {name}" if name else "add --name NAME"
    note(
        f"token {made.id.hex()} ({whose}), once, until {date(made.expires_s)}. Run the line above on the device; then "
        f"here: sordino roster pending --fleet {fleet}"
    )


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
