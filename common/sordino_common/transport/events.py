"""What a `Link` has to tell: plain values, taken by the endpoint with `Link.take_events`."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from sordino_common.errors import RemoteError
from sordino_common.messages import Message


class Delivered(msgspec.Struct, frozen=True, kw_only=True):
    """A message arrived, whole and for the first time."""

    peer: str
    context: bytes
    message: Message
    correlation: bytes


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a message that was sent: call `report(delivered, reason)`."""

    report: Callable[[bool, str], None] | None
    peer: str
    delivered: bool
    reason: str


class Stuck(msgspec.Struct, frozen=True, kw_only=True):
    """Several timeouts in a row: the session with the peer may have died on its side."""

    peer: str
    context: bytes


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A lane has messages to send and no session."""

    peer: str
    context: bytes


class Unreadable(msgspec.Struct, frozen=True, kw_only=True):
    """A whole message arrived and was refused, to its sender too."""

    peer: str
    error: RemoteError


Event = Delivered | Outcome | Stuck | Wanted | Unreadable
