"""What `SessionTable` asks its driver to do, or tells it: plain values, performed by the endpoint."""

from __future__ import annotations

import msgspec

from sordino_common.channel.session import Session
from sordino_common.errors import ProtocolMismatch


class Reply(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Send `packet` to `to`."""

    to: str
    packet: bytes


class Established(msgspec.Struct, frozen=True, kw_only=True):
    """`session` is now the one to seal with for (peer, context); it replaces an earlier one, if there was any."""

    peer: str
    context: bytes
    session: Session


class Opened(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A sealed packet arrived, verified and for the first time. `plaintext` is never empty."""

    peer: str
    context: bytes
    session_id: bytes
    plaintext: bytes


class Lost(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The session for (peer, context) is gone; what was sealed in it and not answered must go again in a new one."""

    peer: str
    context: bytes
    reason: str


class Rejected(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The peer refused our Hello, for good: initiating again at once would end the same way."""

    peer: str
    context: bytes
    code: str
    reason: str


class Unlike(msgspec.Struct, frozen=True, kw_only=True):
    """A signed packet of `peer`, whose version of the protocol is not one that works with ours."""

    peer: str
    error: ProtocolMismatch


class RosterOffered(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A newer roster came from a peer, and the roster book has accepted it."""

    signed: bytes


Effect = Reply | Established | Opened | Lost | Rejected | Unlike | RosterOffered
