"""What a `Link` has to tell: plain values, taken by the endpoint with `Link.take_events`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sordino_common.errors import RemoteError
from sordino_common.messages import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """A message arrived, whole and for the first time."""

    peer: str
    context: bytes
    message: Message
    correlation: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of a message that was sent: call `report(delivered, reason)`."""

    report: Callable[[bool, str], None] | None
    peer: str
    delivered: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck:
    """Several timeouts in a row: the session with the peer may have died on its side."""

    peer: str
    context: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A lane has messages to send and no session."""

    peer: str
    context: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A whole message arrived and was refused, to its sender too."""

    peer: str
    error: RemoteError


Event = Delivered | Outcome | Stuck | Wanted | Unreadable
