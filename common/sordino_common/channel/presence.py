"""Who is there: signed Births and Deaths, and the order in which to believe them.

A party publishes a Birth, retained, on every connection, and leaves a Death with the broker as its will. Each names the
party's boot and the number of the connection within it. (boot, connection) only grows, so that a will which the broker
delivers late, or anybody replays, can't kill a newer connection, and an old Birth can't raise the dead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from sordino_common.channel.identity import DeviceKey, verify
from sordino_common.channel.packets import Body, read_body, read_packet, signed_packet, verify_body
from sordino_common.channel.roster import Roster
from sordino_common.errors import CodecError, ProtocolMismatch, RosterError
from sordino_common.messages.base import Count, Label, Name
from sordino_common.messages.protocol import PROTOCOL, ProtocolVersion


class Birth(Body, frozen=True, kw_only=True):
    """`name` is connected, runs software `version` and holds the roster of `epoch`."""

    kind: ClassVar[str] = "birth"
    protocol: ProtocolVersion = PROTOCOL
    fleet: Name
    name: Name
    boot: Count
    connection: Count
    version: Label
    epoch: Count


class Death(Body, frozen=True, kw_only=True):
    """The connection of that number is gone."""

    kind: ClassVar[str] = "death"
    protocol: ProtocolVersion = PROTOCOL
    fleet: Name
    name: Name
    boot: Count
    connection: Count


def make_birth(
    identity: DeviceKey,
    *,
    fleet: str,
    name: str,
    boot: int,
    connection: int,
    version: str,
    epoch: int,
    protocol: ProtocolVersion = PROTOCOL,
) -> bytes:
    """The signed packet. Raises `LocalError` if a field breaks its bound."""
    birth = Birth(
        protocol=protocol, fleet=fleet, name=name, boot=boot, connection=connection, version=version, epoch=epoch
    )
    return signed_packet(identity, birth)[0]


def make_death(
    identity: DeviceKey, *, fleet: str, name: str, boot: int, connection: int, protocol: ProtocolVersion = PROTOCOL
) -> bytes:
    """The signed packet. Raises `LocalError` if a field breaks its bound."""
    death = Death(protocol=protocol, fleet=fleet, name=name, boot=boot, connection=connection)
    return signed_packet(identity, death)[0]


def read_presence(packet: bytes, roster: Roster, *, protocol: ProtocolVersion = PROTOCOL) -> Birth | Death:
    """The verified content of `packet`, signed by the very party that it names.

    Raises `CodecError`, `RosterError` (another fleet, a party that the roster lacks), `SignatureError`, or, signed as
    well, `ProtocolMismatch`."""
    kind, parts = read_packet(packet)
    if kind not in ("birth", "death"):
        raise CodecError(f"presence: expected a birth or a death, got a packet of kind {kind}")
    raw, signature = parts
    try:
        body: Birth | Death = (
            read_body(Birth, raw, protocol=protocol) if kind == "birth" else read_body(Death, raw, protocol=protocol)
        )
    except ProtocolMismatch as error:
        verify(roster.entry(error.peer).sign_key, kind, raw, signature)
        raise
    if body.fleet != roster.fleet:
        raise RosterError(f"{kind} of {body.name}: is for fleet {body.fleet}, this is fleet {roster.fleet}")
    verify_body(body, raw, signature, roster.entry(body.name).sign_key)
    return body


@dataclass(slots=True)
class PresenceBook:
    """The newest Birth or Death of each party. Holds one small value per name that `read_presence` let through."""

    _newest: dict[str, Birth | Death] = field(default_factory=dict)

    def accept(self, presence: Birth | Death) -> bool:
        """Take a verified presence. True if it is news, False if something newer, or the same, is known."""
        known = self._newest.get(presence.name)
        if known is not None and _age(presence) <= _age(known):
            return False
        self._newest[presence.name] = presence
        return True

    def online(self, name: str) -> bool:
        return isinstance(self._newest.get(name), Birth)

    def birth(self, name: str) -> Birth | None:
        """The Birth of `name` if it is online."""
        newest = self._newest.get(name)
        return newest if isinstance(newest, Birth) else None

    def names(self) -> tuple[str, ...]:
        """All that are online, sorted."""
        return tuple(sorted(name for name in self._newest if self.online(name)))

    def keep_only(self, roster: Roster) -> tuple[str, ...]:
        """Forget those whom a new roster leaves out; returns the names of them that were online."""
        members = {entry.name for entry in roster.entries}
        gone = tuple(name for name in self.names() if name not in members)
        self._newest = {name: newest for name, newest in self._newest.items() if name in members}
        return gone


def _age(presence: Birth | Death) -> tuple[int, int, int, int]:
    """Order of presences of one party. A connection dies once; while it lives, a Birth of a later epoch is news."""
    if isinstance(presence, Death):
        return presence.boot, presence.connection, 1, 0
    return presence.boot, presence.connection, 0, presence.epoch
