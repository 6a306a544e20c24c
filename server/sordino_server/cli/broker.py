"""`sordino broker-config`: the folder of a mosquitto that serves this fleet and nobody else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Final

import typer

from sordino_server.cli.output import HERE, FleetOption, note, say
from sordino_server.home import Home

_PLAIN_PORT: Final = 1883  # MQTT's, without TLS; what `sordino init` takes if no port is named
_TLS_PORT: Final = 8883


def broker_config(
    folder: Annotated[Path, typer.Argument(help="The broker's folder, new.")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            metavar="HOST",
            help="Under which agents find it: names, addresses; repeat it. Default: fleet.yaml's.",
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="For members. Default: fleet.yaml's, or 8883.")
    ] = None,
    enrol_port: Annotated[
        int | None, typer.Option("--enrol-port", min=1, max=65535, help="For holders of a token; PORT + 1 by default.")
    ] = None,
    bind: Annotated[str | None, typer.Option("--bind", help="Listen on this address only.")] = None,
    tie_client_ids: Annotated[
        bool,
        typer.Option(
            "--tie-client-ids",
            help="One connection per certificate: no member throws off another, but `sordino` commands do one another.",
        ),
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Write everything again, with a new certificate.")] = False,
    fleet: FleetOption = HERE,
) -> None:
    """Write configuration, access rules and certificates of a mosquitto for this fleet; make the fleet's authority."""
    from sordino_server.enrolment.broker_config import (
        CONFIG_FILE,
        DROP_IN_FILE,
        SERVER_IDENTITY,
        BrokerPlan,
        write_broker,
    )
    from sordino_server.enrolment.fleet_file import point_at_broker

    home = Home(fleet)
    at = home.spec.broker
    if port is None:
        port = _TLS_PORT if at.port == _PLAIN_PORT else at.port
    plan = BrokerPlan(
        hosts=tuple(host or (at.host,)),
        port=port,
        enrol_port=enrol_port or port + 1,
        bind=bind,
        tie_client_ids=tie_client_ids,
    )
    write_broker(home, folder, plan, now_s=time.time(), again=again)
    drop_in = "/etc/systemd/system/mosquitto.service.d/sordino.conf"
    say(
        f"broker      {folder / CONFIG_FILE}\n"
        f"members     {', '.join(plan.hosts)}, port {plan.port}\n"
        f"tokens      port {plan.enrol_port}\n"
        f"authority   {home.folder / 'ca'}\n\n"
        f"Start it:   mosquitto -c {folder / CONFIG_FILE}\n"
        f"As a service: chown -R mosquitto: {folder}\n"
        f"              install -D -m 644 {folder / DROP_IN_FILE} {drop_in}\n"
        "              systemctl daemon-reload && systemctl restart mosquitto\n"
        f"{home.folder / 'ca' / 'ca.key'} can make up members at the broker: keep it where operator.key is kept."
    )
    left = point_at_broker(home, host=plan.hosts[0], port=plan.port, identity=SERVER_IDENTITY)
    if left:
        note(f"{home.folder / 'fleet.yaml'} was edited, so it stays as it is; put this into it:\n{left}")
