"""What `sordino-agent check` finds at the broker, on one short visit under this device's own rights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sordino_agent import __version__
from sordino_agent.config import LoadedConfig
from sordino_agent.service import link_settings
from sordino_common.channel.credentials import PREFIX
from sordino_common.channel.roster import Roster
from sordino_common.diagnosis import broker, certificates, files, standing
from sordino_common.diagnosis.finding import Finding, error, untried
from sordino_common.errors import ConfigError
from sordino_common.transport.mqtt_settings import MqttSettings
from sordino_common.transport.probe import visit_broker
from sordino_common.transport.topics import roster_topic, status_topic, subscriptions

_RENEW: Final = "have the operator issue a new one"


def broker_findings(loaded: LoadedConfig, roster: Roster | None, *, now_s: float) -> Iterator[Finding]:
    """What is in our files, then the visit; what comes behind a step that fails is said to be untried."""
    yield from file_findings(loaded, now_s=now_s)
    try:
        settings = loaded.broker()
    except ConfigError:
        return  # told already
    section = loaded.config.agent
    rules = broker.agent_rules(section.fleet, section.name, section.server)
    try:
        visit = visit_broker(settings, subscribe=rules.subscribe, publish=rules.publish)
    except ConfigError as problem:
        yield error("broker", str(problem), "mend the entry under broker.tls")
        return
    yield from broker.reach_findings(settings, visit)
    if visit.certificate is not None:
        yield certificates.broker_certificate(visit.certificate, now_s=now_s)
    if visit.granted is not None:
        yield from broker.limit_findings(visit.granted, settings, link_settings(loaded.config.limits))
    if visit.failed != "done":
        text = "limits, " if visit.granted is None else ""
        text += "access rules, the roster that the broker keeps, the server's version: the broker was not reached"
        yield untried("broker", text, "settle that first, then: sordino-agent check")
        return
    own = subscriptions(section.fleet, section.name, section.server)
    yield from broker.access_findings(rules, visit, own=own)
    kept = visit.retained.get(roster_topic(section.fleet, section.server))
    try:
        key = loaded.operator_key()
    except ConfigError:
        return  # told already
    yield from standing.retained_roster(kept, roster, operator_key=key, owner="agent")
    birth = visit.retained.get(status_topic(section.fleet, section.server))
    yield from standing.server_birth(birth, roster, ours=__version__)


def file_findings(loaded: LoadedConfig, *, now_s: float) -> Iterator[Finding]:
    """Certificates, keys, password: without the network."""
    try:
        settings = loaded.broker()
    except ConfigError as problem:
        if PREFIX in str(problem):  # which only the unit is given
            yield untried("broker", str(problem), "run the check as the unit does, or look at its log")
        else:
            yield error("broker", str(problem), "mend the file or its mode")
        return
    yield from _certificates(settings, now_s=now_s)


def _certificates(settings: MqttSettings, *, now_s: float) -> Iterator[Finding]:
    """Our certificate, its key's mode, and the authority that we trust."""
    tls = settings.tls
    if tls is None:
        return
    if tls.certificate is not None:
        yield from certificates.certificate_files(Path(tls.certificate), "ours", now_s=now_s, renew=_RENEW)
    if tls.ca is not None:
        yield from certificates.certificate_files(Path(tls.ca), "the authority's", now_s=now_s, renew=_RENEW)
    key = tls.key or tls.certificate
    if key is not None:
        yield from files.private_file(Path(key), "tls key")
