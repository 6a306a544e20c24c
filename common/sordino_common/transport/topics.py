"""The topic tree of a fleet: who publishes where, and who a packet on a topic claims to be from.

    sordino/<fleet>/<agent>/cmd          server -> agent
    sordino/<fleet>/<agent>/reply        agent -> server
    sordino/<fleet>/<agent>/peer/<from>  agent -> agent
    sordino/<fleet>/<name>/status        birth or death of <name>, retained
    sordino/<fleet>/<server>/roster      the signed roster, retained

A topic says who may be expected to have sent a packet; who *has* sent it is said by its signature or session alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

from sordino_common.errors import CodecError, LocalError
from sordino_common.messages.base import NAME_PATTERN

ROOT: Final = "sordino"
_NAME: Final = re.compile(NAME_PATTERN)
_KNOWN: Final = 4096  # topics that are remembered; what raises is not

Channel = Literal["packet", "status", "roster"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a topic tells of a packet on it: whom it claims to come from, and what sort of packet may stand there."""

    sender: str
    channel: Channel


@lru_cache(maxsize=_KNOWN)  # every packet asks, and names are few
def packet_topic(fleet: str, sender: str, receiver: str, server: str) -> str:
    """The topic for a packet (handshake or sealed) from `sender` to `receiver`."""
    for name in (fleet, sender, receiver, server):
        _check(name)
    if sender == receiver:
        raise LocalError(f"topics: {sender} can't send to itself")
    if sender == server:
        return f"{ROOT}/{fleet}/{receiver}/cmd"
    if receiver == server:
        return f"{ROOT}/{fleet}/{sender}/reply"
    return f"{ROOT}/{fleet}/{receiver}/peer/{sender}"


def status_topic(fleet: str, name: str) -> str:
    """The topic of the retained birth or death of `name`."""
    return f"{ROOT}/{_check(fleet)}/{_check(name)}/status"


def roster_topic(fleet: str, server: str) -> str:
    """The topic of the retained signed roster."""
    return f"{ROOT}/{_check(fleet)}/{_check(server)}/roster"


def subscriptions(fleet: str, name: str, server: str) -> tuple[str, ...]:
    """What `name` listens on: the server to all agents, an agent to its own topics and the server's."""
    base = f"{ROOT}/{_check(fleet)}"
    if name == server:
        return f"{base}/+/reply", f"{base}/+/status"
    _check(name)
    _check(server)
    return f"{base}/{name}/cmd", f"{base}/{name}/peer/+", f"{base}/{server}/status", f"{base}/{server}/roster"


@lru_cache(maxsize=_KNOWN)
def read_topic(topic: str, *, fleet: str, server: str) -> Origin:
    """Whom a packet on `topic` claims to come from. Raises `CodecError` for a topic that is none of the fleet's."""
    match topic.split("/"):
        case [root, in_fleet, name, "cmd"] if (root, in_fleet) == (ROOT, fleet) and _NAME.match(name):
            return Origin(sender=server, channel="packet")
        case [root, in_fleet, name, "reply"] if (root, in_fleet) == (ROOT, fleet) and _NAME.match(name):
            return Origin(sender=name, channel="packet")
        case [root, in_fleet, name, "status"] if (root, in_fleet) == (ROOT, fleet) and _NAME.match(name):
            return Origin(sender=name, channel="status")
        case [root, in_fleet, name, "roster"] if (root, in_fleet, name) == (ROOT, fleet, server):
            return Origin(sender=server, channel="roster")
        case [root, in_fleet, _, "peer", sender] if (root, in_fleet) == (ROOT, fleet) and _NAME.match(sender):
            return Origin(sender=sender, channel="packet")
        case _:
            raise CodecError(f"topic {topic[:200]!r} is none of fleet {fleet}'s")


def _check(name: str) -> str:
    if not _NAME.match(name):
        raise LocalError(f"topics: {name[:80]!r} is not a name (lower-case letters, digits and '-', at most 63)")
    return name
