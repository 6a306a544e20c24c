"""The topic tree of a fleet: who publishes where, and who a packet on a topic claims to be from.

    sordino/<fleet>/<agent>/cmd          server -> agent
    sordino/<fleet>/<agent>/reply        agent -> server
    sordino/<fleet>/<agent>/peer/<from>  agent -> agent
    sordino/<fleet>/<name>/status        birth or death of <name>, retained
    sordino/<fleet>/<server>/roster      the signed roster, retained
    sordino/<fleet>/<who>/request        a request to be enrolled or renewed, retained until it is read
    sordino/<fleet>/<who>/grant          the answer to it, retained

<who> is a name of the roster, or the user of a token (`token_user`), which no name can be: names have no underscore.
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
_TOKEN_USER: Final = re.compile(r"_enrol-[0-9a-f]{16}\Z")
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


def status_filter(fleet: str) -> str:
    """Matches the births and deaths of everybody."""
    return f"{ROOT}/{_check(fleet)}/+/status"


def subscriptions(fleet: str, name: str, server: str) -> tuple[str, ...]:
    """What `name` listens on: the server to all agents, an agent to its own topics and the server's."""
    base = f"{ROOT}/{_check(fleet)}"
    if name == server:
        return f"{base}/+/reply", status_filter(fleet)
    _check(name)
    _check(server)
    return f"{base}/{name}/cmd", f"{base}/{name}/peer/+", f"{base}/{server}/status", f"{base}/{server}/roster"


def shared_filter(group: str, topic_filter: str) -> str:
    """`topic_filter` for several workers: the broker gives each packet to one of `group` (MQTT v5, section 4.8.2).

    For packets that stand alone: births, deaths. Raises `LocalError` for those of sessions. A session is of two
    processes, with counters, windows and half-received messages in their memory: a packet that another worker gets is
    lost to both. Retained packets don't come at the beginning: who needs the whole picture subscribes for itself."""
    if topic_filter.rsplit("/", 1)[-1] not in ("status", "request") or not _NAME.match(group):
        raise LocalError(
            f"topics: {topic_filter[:200]!r} can't be shared by {group[:80]!r}: only births (status) and requests can; "
            "a session's packets belong to one process"
        )
    return f"$share/{group}/{topic_filter}"


def token_user(token: bytes) -> str:
    """The broker's user for who holds the token of this id; the common name of the token's certificate."""
    return f"_enrol-{token.hex()}"


def request_topic(fleet: str, who: str) -> str:
    """Where `who`, a name or a token's user, leaves its request."""
    return f"{ROOT}/{_check(fleet)}/{_check_who(who)}/request"


def grant_topic(fleet: str, who: str) -> str:
    """Where the answer to the request of `who` lies."""
    return f"{ROOT}/{_check(fleet)}/{_check_who(who)}/grant"


def requests_filter(fleet: str) -> str:
    """The requests of everybody: for the server."""
    return f"{ROOT}/{_check(fleet)}/+/request"


def requester_of(topic: str, *, fleet: str) -> str:
    """Who left a request on `topic`. Raises `CodecError` for another topic."""
    match topic.split("/"):
        case [root, in_fleet, who, "request"] if (root, in_fleet) == (ROOT, fleet) and _is_who(who):
            return who
        case _:
            raise CodecError(f"topic {topic[:200]!r} holds no request of fleet {fleet}")


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


def _is_who(who: str) -> bool:
    return bool(_NAME.match(who) or _TOKEN_USER.match(who))


def _check_who(who: str) -> str:
    if not _is_who(who):
        raise LocalError(f"topics: {who[:80]!r} is neither a name nor a token's user")
    return who
