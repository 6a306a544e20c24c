"""The version of the protocol, and who understands whom.

    PROTOCOL = major.minor      same major, minors at most one apart: they work together; else refused by name

Every signed packet (`channel/packets`) begins with its sender's version; what stands behind it has one layout
throughout a major version, and so have frames, topics and sealed boxes. Two parties of a session speak the smaller of
their minors: both know it from the signed Hello and Accept, which the session's keys depend on, so nobody in between
can talk them down. What a minor version adds to messages:

    @register("new-command", since=1)           a kind: never sent to a peer of an earlier minor, nor taken from one
    added: ClassVar = {"field": 1}              a field (with a default) of a message, or of a struct inside one: left
                                                out for a peer of an earlier minor, and refused when it comes from one

A sender that has to say something which an older peer can't read is told so (`LocalError`, naming kind, field and
version): a value is never silently dropped. So in a session of one minor a message has one encoding still.

To raise the minor: count PROTOCOL up, mark what is new as above, and record (tests/vectors/record.py). Recordings of
earlier versions stay in the tests. To raise the major: whatever you like; peers refuse one another by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, NamedTuple

import msgspec

from sordino_common.errors import ProtocolMismatch

_Number = Annotated[int, msgspec.Meta(ge=0, le=65_535)]


class ProtocolVersion(NamedTuple):
    """major.minor"""

    major: _Number
    minor: _Number

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    def works_with(self, other: ProtocolVersion) -> bool:
        return self.major == other.major and abs(self.minor - other.minor) <= 1


PROTOCOL: Final = ProtocolVersion(1, 0)


def agreed(ours: ProtocolVersion, theirs: ProtocolVersion, *, peer: str) -> ProtocolVersion:
    """What a session with `peer` speaks: the smaller. Raises `ProtocolMismatch`."""
    if not ours.works_with(theirs):
        raise mismatch(ours, theirs, peer=peer)
    return min(ours, theirs)


def mismatch(ours: ProtocolVersion, theirs: ProtocolVersion, *, peer: str) -> ProtocolMismatch:
    """The refusal, with what to upgrade."""
    here = f"this side {ours}"
    remedy = f"upgrade sordino on {peer}" if theirs < ours else "upgrade sordino here"
    error = ProtocolMismatch(
        f"{peer} speaks protocol {theirs}, {here}; only neighbouring minors of one major work together: {remedy}"
    )
    error.peer = peer
    return error


def protocol_of(fields: Any) -> ProtocolVersion | None:
    """The version at the head of a signed body, whatever follows; None if there is none."""
    head = fields[0] if isinstance(fields, list) and fields else None
    try:
        return msgspec.convert(head, ProtocolVersion) if isinstance(head, list) else None
    except msgspec.ValidationError:
        return None
