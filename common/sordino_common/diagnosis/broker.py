"""The broker: whether it is reached, what it grants against what we need, and whom its access rules let do what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from sordino_common.channel.session import SEALED_OVERHEAD
from sordino_common.diagnosis.finding import BROKER, Finding, error, ok, warning
from sordino_common.transport.chunks import MAX_CHUNKS
from sordino_common.transport.frames import PART_OVERHEAD
from sordino_common.transport.inbound import LEAST_CHUNK_BYTES
from sordino_common.transport.mqtt_settings import MqttSettings
from sordino_common.transport.probe import Granted, Visit
from sordino_common.transport.settings import LinkSettings
from sordino_common.transport.topics import ROOT, packet_topic, roster_topic, status_topic, subscriptions

NOBODY: Final = "sordino-check"  # a name that no party has: packets to it reach nobody
_HEADER_BYTES: Final = 512  # as in transport.mqtt
_FEW: Final = 4  # unacknowledged packets; with fewer, handshakes of many wait for one another

_STEPS: Final = {
    "resolve": ("the name can't be resolved", "getent hosts {host}; is the name right, is there a resolver?"),
    "connect": ("no connection", "is the broker running, the port right, the firewall open? nc -vz {host} {port}"),
    "tls": ("TLS fails", "openssl s_client -connect {host}:{port}; see broker.tls: ca, server_name"),
    "mqtt": ("it does not let us in", "check user, password or certificate, and the broker's log"),
    "visit": ("it ended the visit", "see the broker's log"),
}


# --- reach ------------------------------------------------------------------------------------------------------------


def reach_findings(settings: MqttSettings, visit: Visit) -> Iterator[Finding]:
    """How far we came."""
    where = f"{settings.host}:{settings.port}"
    if visit.failed != "done":
        what, remedy = _STEPS[visit.failed]
        text = f"{where}: {what}: {visit.reason}"
        yield error("broker", text, remedy.format(host=settings.host, port=settings.port), exit_code=BROKER)
        return
    secured = f", {visit.tls_version}" if visit.tls_version else ""
    yield ok("broker", f"{where} ({', '.join(visit.addresses[:3])}) lets us in{secured}")
    if not visit.tls_version and not _local(settings.host):
        yield warning(
            "broker",
            f"{where} without TLS: passwords, and who talks to whom, are open to the network (messages are not)",
            "set broker.tls; sordino broker-config makes a broker that has it",
        )


def _local(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


# --- limits -----------------------------------------------------------------------------------------------------------


def limit_findings(
    granted: Granted, settings: MqttSettings, link: LinkSettings, *, roster_bytes: int = 0
) -> Iterator[Finding]:
    """What CONNACK grants, against what our settings will ask for."""
    yield from _packet_findings(granted, settings, link, roster_bytes)
    what = "broker limits"
    if granted.maximum_qos < 1:
        yield error(
            what, "the broker takes QoS 0 only; births and rosters go with QoS 1", "raise max_qos", exit_code=BROKER
        )
    if not granted.retain_available:
        text = "the broker retains nothing; births and the roster are retained messages"
        yield error(what, text, "set retain_available true in its configuration", exit_code=BROKER)
    if not granted.wildcards_available:
        text = "the broker takes no subscription with wildcards"
        yield error(what, text, "allow wildcard subscriptions in its configuration", exit_code=BROKER)
    window = min(settings.window, granted.receive_maximum)
    if window < _FEW:
        text = f"{granted.receive_maximum} packets may be unacknowledged, we would use {settings.window}"
        yield warning(what, text, "raise max_inflight_messages (receive maximum) in its configuration")
    yield ok(
        what,
        f"unacknowledged packets {window} (ours {settings.window}, its {granted.receive_maximum}), QoS up to "
        f"{granted.maximum_qos}, retained messages {_yes(granted.retain_available)}, topic aliases "
        f"{granted.topic_alias_maximum} (we use none), shared subscriptions {_yes(granted.shared_available)}, sessions "
        f"kept {granted.session_expiry_s} s (we need none)",
    )


def _packet_findings(
    granted: Granted, settings: MqttSettings, link: LinkSettings, roster_bytes: int
) -> Iterator[Finding]:
    what = "packet size"
    theirs = granted.max_packet_bytes
    room = settings.max_packet_bytes if theirs is None else min(settings.max_packet_bytes, theirs - _HEADER_BYTES)
    chunk = min(link.chunk_bytes, room - SEALED_OVERHEAD - PART_OVERHEAD)
    least = max(LEAST_CHUNK_BYTES, -(-link.max_message_bytes // MAX_CHUNKS))
    says = "any size" if theirs is None else f"{theirs} bytes"
    if chunk < least:
        needed = least + SEALED_OVERHEAD + PART_OVERHEAD + _HEADER_BYTES
        yield error(
            what,
            f"the broker takes packets of {says}; messages of up to {link.max_message_bytes} bytes need {needed}",
            f"set max_packet_size {max(needed, 2_000_000)} in its configuration, and restart it",
            exit_code=BROKER,
        )
    elif roster_bytes > room:
        yield error(
            what,
            f"the broker takes packets of {says}; the signed roster has {roster_bytes}",
            f"set max_packet_size {max(roster_bytes + _HEADER_BYTES, 2_000_000)} in its configuration, and restart it",
            exit_code=BROKER,
        )
    elif chunk < link.chunk_bytes:
        text = (
            f"the broker takes packets of {says}: large messages go in parts of {chunk} bytes, not {link.chunk_bytes}"
        )
        yield warning(what, text, "set max_packet_size 2000000 in its configuration, and restart it")
    else:
        yield ok(what, f"the broker takes packets of {says}; ours have {link.chunk_bytes + _HEADER_BYTES} at most")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


# --- access rules -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a probe does, and what should come of it. `may`, `may_not`: publishes that must be granted and refused, each
    with what it stands for. `echoes`: of those granted, the ones that must come back to us by our own subscriptions.
    `strangers`: topics whose packets must not reach us although we ask for them."""

    subscribe: tuple[str, ...]
    may: dict[str, str]
    may_not: dict[str, str]
    echoes: dict[str, str]
    strangers: dict[str, str]

    @property
    def publish(self) -> tuple[str, ...]:
        return (*self.may, *self.strangers, *self.may_not)


def agent_rules(fleet: str, name: str, server: str) -> Rules:
    """Of an agent. All of it happens under its own name, or under one that nobody has."""
    echo = f"{ROOT}/{fleet}/{name}/peer/{name}"
    stranger = f"{ROOT}/{fleet}/{NOBODY}/peer/{name}"
    return Rules(
        subscribe=(*subscriptions(fleet, name, server), f"{ROOT}/{fleet}/{NOBODY}/peer/+"),
        may={
            packet_topic(fleet, name, server, server): "answer the server",
            status_topic(fleet, name): "tell its birth",
            echo: "write to agents",
        },
        may_not={
            packet_topic(fleet, server, name, server): "command itself in the server's place",
            status_topic(fleet, server): "tell the server's birth",
            roster_topic(fleet, server): "publish a roster",
            status_topic(fleet, NOBODY): "tell another agent's birth",
        },
        echoes={echo: "what agents write to it"},
        strangers={stranger: "read what agents write to others"},
    )


def server_rules(fleet: str, server: str) -> Rules:
    """Of the server."""
    return Rules(
        subscribe=(*subscriptions(fleet, server, server), roster_topic(fleet, server)),
        may={
            packet_topic(fleet, server, NOBODY, server): "command agents",
            status_topic(fleet, server): "tell its birth",
            roster_topic(fleet, server): "publish the roster",
        },
        may_not={
            packet_topic(fleet, NOBODY, server, server): "answer in an agent's place",
            f"{ROOT}/{fleet}/{NOBODY}/peer/{NOBODY}": "write in an agent's place",
            status_topic(fleet, NOBODY): "tell an agent's birth",
        },
        echoes={status_topic(fleet, server): "births"},
        strangers={},
    )


def access_findings(rules: Rules, visit: Visit, *, own: Sequence[str]) -> Iterator[Finding]:
    """`own`: the subscriptions that we live by. Empty packets on a topic of `rules` are ours."""
    what = "access rules"
    denied = [f"subscribe to {topic} ({visit.subscribed[topic]})" for topic in own if visit.subscribed.get(topic)]
    denied += [f"{rules.may[topic]} ({topic}: {word})" for topic in rules.may if (word := visit.published.get(topic))]
    denied += [
        f"read {why} ({topic})"
        for topic, why in rules.echoes.items()
        if not visit.published.get(topic) and visit.delivered.get(topic) != b""
    ]
    if denied:
        yield error(
            what,
            f"the broker does not let this party {'; '.join(denied)}",
            "give it the fleet's rules: sordino broker-config DIR --host HOST writes them",
            exit_code=BROKER,
        )
    loose = [why for topic, why in rules.may_not.items() if visit.published.get(topic) == ""]
    loose += [why for topic, why in rules.strangers.items() if visit.delivered.get(topic) == b""]
    if loose:
        yield warning(
            what,
            f"the broker lets this party {'; '.join(loose)}. Nobody would believe it, but it can disturb the fleet and "
            "see who talks to whom",
            "give the broker the fleet's rules: sordino broker-config DIR --host HOST writes them",
        )
    if not denied and not loose:
        count = len(rules.may) + len(rules.echoes)
        refused = len(rules.may_not) + len(rules.strangers)
        yield ok(what, f"{count} things that this party needs are allowed, {refused} that it must not do are refused")
