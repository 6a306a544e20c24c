"""What `sordino doctor` finds at the broker, on one short visit under the server's own rights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sordino_common.channel.credentials import located
from sordino_common.channel.packets import roster_packet
from sordino_common.channel.roster import Roster
from sordino_common.diagnosis import broker, certificates, files, standing
from sordino_common.diagnosis.finding import Finding, error, untried
from sordino_common.errors import ConfigError
from sordino_common.transport.probe import visit_broker
from sordino_common.transport.settings import LinkSettings
from sordino_common.transport.topics import roster_topic, subscriptions
from sordino_server.fleet import mqtt_settings
from sordino_server.home import Home

_RENEW: Final = "sordino broker-config DIR --again, where the fleet's authority is"


def file_findings(home: Home, *, now_s: float) -> Iterator[Finding]:
    """Certificates and keys that fleet.yaml names for the broker: without the network."""
    try:
        yield from _files(home, now_s=now_s)
    except ConfigError as problem:  # a credential, which only the unit is given
        yield untried("certificates", str(problem), "run the doctor as the unit does")


def _files(home: Home, *, now_s: float) -> Iterator[Finding]:
    tls = home.spec.broker.tls
    password = home.spec.broker.password_file
    if password is not None:
        yield from files.private_file(located(password, home.folder), "password")
    if tls is None:
        return

    def resolved(text: str) -> Path:
        return located(text, home.folder)

    if tls.certificate is not None:
        path = resolved(tls.certificate)
        yield from certificates.certificate_files(path, "the server's", now_s=now_s, renew=_RENEW)
    if tls.ca is not None:
        yield from certificates.certificate_files(resolved(tls.ca), "the broker's authority", now_s=now_s, renew=_RENEW)
    key = tls.key or tls.certificate
    if key is not None:
        yield from files.private_file(resolved(key), "tls key")


def reach_findings(home: Home, roster: Roster | None, *, now_s: float) -> Iterator[Finding]:
    """What comes behind a step that fails is said to be untried."""
    fleet, server = home.spec.fleet, home.spec.server
    rules = broker.server_rules(fleet, server)
    try:
        settings = mqtt_settings(home)
        visit = visit_broker(settings, subscribe=rules.subscribe, publish=rules.publish)
    except ConfigError as problem:
        yield error("broker", str(problem), "mend the entry under `broker` in fleet.yaml")
        return
    yield from broker.reach_findings(settings, visit)
    if visit.certificate is not None:
        yield certificates.broker_certificate(visit.certificate, now_s=now_s)
    if visit.granted is not None:
        path = home.folder / "roster.cbor"
        roster_bytes = len(roster_packet(path.read_bytes())) if roster is not None else 0
        yield from broker.limit_findings(visit.granted, settings, LinkSettings(), roster_bytes=roster_bytes)
    if visit.failed != "done":
        text = "limits, " if visit.granted is None else ""
        yield untried("broker", f"{text}access rules, the roster that the broker keeps", "settle that first")
        return
    yield from broker.access_findings(rules, visit, own=subscriptions(fleet, server, server))
    if visit.subscribed.get(roster_topic(fleet, server)):
        return
    try:
        key = home.operator_public()
    except ConfigError:
        return  # told already
    kept = visit.retained.get(roster_topic(fleet, server))
    yield from standing.retained_roster(kept, roster, operator_key=key, owner="server")
