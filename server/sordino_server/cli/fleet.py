"""`sordino init`, `sordino agents`: a new fleet, and who of it is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sordino_server.cli.output import (
    HERE,
    FleetOption,
    JsonOption,
    installed_version,
    print_json,
    print_table,
    say,
    table_of,
)
from sordino_server.home import Home, create_home


def init(
    folder: Annotated[Path, typer.Argument(help="A new fleet directory.")],
    fleet: Annotated[str, typer.Option("--fleet", help="The fleet's name: lower-case letters, digits and -.")],
    broker: Annotated[str, typer.Option("--broker", help="HOST:PORT of the MQTT broker.")],
    server: Annotated[str, typer.Option("--server", help="The server's name in the fleet.")] = "server",
) -> None:
    """Make a fleet: operator key, server key, a roster draft with the server, fleet.yaml."""
    home = create_home(folder, fleet=fleet, server=server, broker=broker)
    operator = home.operator_public().hex()
    say(
        f"fleet {fleet} in {folder}\n"
        f"operator key  {operator}\n"
        f"server        {server}  {home.server_key().fingerprint}\n\n"
        "With a broker for this fleet alone: sordino broker-config, then sordino enroll-token for each device.\n\n"
        "By hand, with a broker that you run already. On each device:\n"
        f"  sordino-agent init DIR --name NAME --fleet {fleet} --operator-key {operator} --broker {broker}\n"
        "Then here, for each enrolment.json it makes, comparing the fingerprints:\n"
        f"  sordino roster add enrolment.json --fleet {folder}\n"
        f"  sordino roster sign --fleet {folder}\n\n"
        f"{folder / 'operator.key'} decides who belongs to the fleet: once the roster is signed, keep it elsewhere."
    )


def agents(
    fleet: FleetOption = HERE,
    as_json: JsonOption = False,
    wait_s: Annotated[float, typer.Option("--wait", help="Seconds to wait for agents.")] = 3.0,
) -> None:
    """Who is online, and which data they offer."""
    from sordino_server.fleet import open_fleet, roll_call

    home = Home(fleet)
    with open_fleet(home, version=installed_version()) as connection:
        found, missing = roll_call(connection, wait_s=wait_s)
        entries = {entry.name: entry for entry in connection.roster.entries}
    rows: list[dict[str, Any]] = []
    for name in sorted(found.keys() | missing.keys()):
        described = found.get(name)
        rows.append(
            {
                "name": name,
                "online": described is not None,
                "zone": entries[name].zone if name in entries else "",
                "version": described.version if described else None,
                "executor": described.executor if described else None,
                "note": missing.get(name, ""),
                "datasets": [
                    {
                        "name": info.name,
                        "train_rows": info.train_rows,
                        "test_rows": info.test_rows,
                        "columns": [column.name for column in info.columns],
                        "tags": list(info.tags),
                    }
                    for info in (described.datasets if described else ())
                ],
            }
        )
    if as_json:
        print_json({"fleet": home.spec.fleet, "agents": rows})
        return
    table = table_of("agent", "state", "zone", "version", "datasets (train + test rows)")
    for row in rows:
        data = ", ".join(f"{d['name']} ({d['train_rows']} + {d['test_rows']})" for d in row["datasets"])
        state = "[green]online[/]" if row["online"] else f"[yellow]{row['note'] or 'offline'}[/]"
        table.add_row(row["name"], state, row["zone"], row["version"] or "", data)
    print_table(table)
    say(f"{sum(row['online'] for row in rows)} of {len(rows)} agents online")
