"""Who of the roster is there, as their births and deaths tell; and whom a new roster lets in or leaves out."""

from __future__ import annotations

from dataclasses import dataclass

from sordino_common.channel.presence import Birth, Death, PresenceBook, read_presence
from sordino_common.channel.roster import Roster, RosterBook
from sordino_common.errors import RosterError
from sordino_common.messages.protocol import PROTOCOL, ProtocolVersion

_UNVERIFIED = 1024  # statuses of names that the roster lacks, kept for the next roster
_UNVERIFIED_BYTES = 2048  # a birth has about 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """`name` is (again) there, on a new connection, or is gone. `boot` is that of the status."""

    name: str
    online: bool
    boot: int
    was_online: bool


class Membership:
    """Statuses in, changes out."""

    def __init__(self, book: RosterBook, *, protocol: ProtocolVersion = PROTOCOL) -> None:
        self._book = book
        self._protocol = protocol
        self.unlike: dict[str, str] = {}  # members whose version of the protocol is none of ours: why
        self._presence = PresenceBook()
        self._unverified: dict[str, bytes] = {}

    def online(self, name: str) -> bool:
        return self._presence.online(name)

    def names(self) -> tuple[str, ...]:
        """All that are online, sorted."""
        return self._presence.names()

    def status(self, sender: str, payload: bytes) -> Change | None:
        """What a status on the topic of `sender` changes; None if it is old, or news of the same connection. Raises
        `RemoteError`s; one of a name that the roster lacks is kept until `follow`."""
        roster = self._book.current
        try:
            if roster is None:
                raise RosterError(f"status of {sender}: can't be verified before a roster was received")
            roster.entry(sender)
        except RosterError:
            room = sender in self._unverified or len(self._unverified) < _UNVERIFIED
            if room and len(payload) <= _UNVERIFIED_BYTES:
                self._unverified[sender] = payload
            raise
        presence = read_presence(payload, roster, protocol=self._protocol)
        if presence.name != sender:
            raise RosterError(f"status of {sender}: it is a {presence.kind} of {presence.name}")
        before = self._presence.birth(sender)
        if not self._presence.accept(presence) or _same_connection(presence, before):
            return None
        self.unlike.pop(sender, None)
        online = isinstance(presence, Birth)
        return Change(name=sender, online=online, boot=presence.boot, was_online=before is not None)

    def follow(self, roster: Roster) -> tuple[list[Change], dict[str, bytes]]:
        """A new roster: (those online whom it leaves out, statuses to be tried again)."""
        boots = {name: birth.boot for name in self.names() if (birth := self._presence.birth(name))}
        gone = [
            Change(name=name, online=False, boot=boots[name], was_online=True)
            for name in self._presence.keep_only(roster)
        ]
        members = {entry.name for entry in roster.entries}
        self.unlike = {name: why for name, why in self.unlike.items() if name in members}
        waiting, self._unverified = self._unverified, {}
        return gone, waiting


def _same_connection(presence: Birth | Death, before: Birth | None) -> bool:
    """A birth that tells of a newer roster only."""
    if before is None or isinstance(presence, Death):
        return False
    return (before.boot, before.connection) == (presence.boot, presence.connection)
