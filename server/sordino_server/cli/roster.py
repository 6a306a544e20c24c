"""`sordino roster`: who belongs to the fleet."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sordino_server.cli import members
from sordino_server.cli.output import HERE, FleetOption, JsonOption, date, note, print_json, print_table, say, table_of
from sordino_server.home import Home, read_request

roster_app = typer.Typer(help="Who belongs to the fleet: the draft, and signing it.", no_args_is_help=True)


@roster_app.command("add")
def roster_add(
    requests: Annotated[list[Path], typer.Argument(help="enrolment.json files of `sordino-agent init`.")],
    roles: Annotated[str, typer.Option("--roles", help="Comma-separated; by default what the request says.")] = "",
    zone: Annotated[str | None, typer.Option("--zone", help="Where the device stands.")] = None,
    fleet: FleetOption = HERE,
) -> None:
    """Put devices into the draft. It counts once it is signed."""
    home = Home(fleet)
    for path in requests:
        wanted = [role.strip() for role in roles.split(",") if role.strip()]
        entry = home.add(read_request(path), roles=wanted, zone=zone)
        say(f"{entry.name}  {entry.fingerprint}  {','.join(entry.roles)}  {entry.zone}")
    note(f"the draft has changed; make it count with: sordino roster sign --fleet {fleet}")


@roster_app.command("remove")
def roster_remove(name: Annotated[str, typer.Argument(help="The device's name.")], fleet: FleetOption = HERE) -> None:
    """Take a device out of the draft. It counts once it is signed."""
    Home(fleet).remove(name)
    note(f"{name} is out of the draft; make it count with: sordino roster sign --fleet {fleet}")


@roster_app.command("list")
def roster_list(fleet: FleetOption = HERE, as_json: JsonOption = False) -> None:
    """The draft beside the signed roster."""
    home = Home(fleet)
    draft, signed = home.draft(), home.roster_book(wall_s=time.time).current
    in_force = {} if signed is None else {entry.name: entry for entry in signed.entries}
    rows: list[dict[str, Any]] = []
    for entry in draft.entries:
        other = in_force.pop(entry.name, None)
        same = other is not None and (
            (other.sign_key.hex(), other.box_key.hex(), tuple(other.roles), other.zone)
            == (entry.sign_key, entry.box_key, tuple(sorted(entry.roles)), entry.zone)
        )
        state = "signed" if same else "not signed yet" if other is None else "changed, not signed yet"
        rows.append(
            {
                "name": entry.name,
                "roles": sorted(entry.roles),
                "zone": entry.zone,
                "fingerprint": entry.fingerprint,
                "state": state,
            }
        )
    rows += [
        {"name": name, "roles": list(e.roles), "zone": e.zone, "fingerprint": "", "state": "removed, not signed yet"}
        for name, e in in_force.items()
    ]
    epoch = 0 if signed is None else signed.epoch
    if as_json:
        print_json({"fleet": home.spec.fleet, "epoch": epoch, "entries": rows})
        return
    table = table_of("name", "roles", "zone", "fingerprint", "state")
    for row in rows:
        table.add_row(row["name"], ",".join(row["roles"]), row["zone"], row["fingerprint"], row["state"])
    print_table(table)
    until = "" if signed is None else f", valid until {date(signed.expires_s)}"
    say(f"fleet {home.spec.fleet}, signed epoch {epoch}{until}")


@roster_app.command("sign")
def roster_sign(
    order: Annotated[
        Path | None, typer.Option("--order", help="Sign this order of `sordino roster export` instead, elsewhere.")
    ] = None,
    keys: Annotated[
        Path, typer.Option("--keys", help="With --order: the folder of operator.key, ca.key, ca.pem.")
    ] = HERE,
    output: Annotated[Path, typer.Option("-o", "--output", help="With --order: what was signed.")] = Path("signed.txt"),
    yes: members.YesOption = False,
    fleet: FleetOption = HERE,
) -> None:
    """Sign the draft with operator.key under the next epoch, and certify what was approved."""
    if order is not None:
        members.sign_order(order, keys, output, yes=yes)
        return
    home = Home(fleet)
    roster = home.sign(now_s=time.time())
    say(f"epoch {roster.epoch} signed: {len(roster.entries)} parties, valid until {date(roster.expires_s)}")
    for name in members.certify_here(home):
        say(f"certificate for {name}")


roster_app.command("pending")(members.pending)
roster_app.command("approve")(members.approve)
roster_app.command("refuse")(members.refuse)
roster_app.command("renew")(members.renew)
roster_app.command("revoke")(members.revoke)
roster_app.command("deliver")(members.deliver_all)
roster_app.command("fetch")(members.fetch)
roster_app.command("receive")(members.receive)
roster_app.command("grant")(members.grant)
roster_app.command("export")(members.export)
roster_app.command("import")(members.import_signed)
