"""Who is online, by somebody who only listens: verified births and deaths from the broker, nothing is ever published.

It connects under a client id of its own, so it is nobody's rival: a training goes on, and a second viewer too. It needs
the server's rights on the broker, to read `sordino/<fleet>/+/status`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from secrets import token_hex
from typing import Final

from msgspec.structs import replace

from sordino_common.channel.presence import PresenceBook, read_presence
from sordino_common.channel.roster import Roster
from sordino_common.clock import Loop
from sordino_common.errors import RemoteError, RosterError, SordinoError
from sordino_common.transport.base import Transport
from sordino_common.transport.mqtt import MqttTransport
from sordino_common.transport.mqtt_settings import MqttSettings
from sordino_common.transport.reactor import Reactor
from sordino_common.transport.topics import read_topic, status_filter
from sordino_server.home import Home

_UNVERIFIED: Final = 1024  # statuses of names that the roster lacks, kept for the next roster
_STATUS_BYTES: Final = 4096
_FOLLOW_S: Final = 10.0


class Births:
    """A `TransportHandler`. `roster`: the newest signed one, asked now and then."""

    def __init__(
        self, transport: Transport, loop: Loop, *, fleet: str, server: str, roster: Callable[[], Roster | None]
    ) -> None:
        self.refused = 0
        self.heard = False  # connected: the broker sends retained births at once
        self.state = "not connected yet"
        self._transport = transport
        self._loop = loop
        self._fleet = fleet
        self._server = server
        self._newest = roster
        self._roster: Roster | None = None
        self._presence = PresenceBook()
        self._online: Mapping[str, str] = {}
        self._unverified: dict[str, bytes] = {}
        transport.subscribe(status_filter(fleet))

    def open(self) -> None:
        self._follow()
        self._transport.open(self)

    def close(self) -> None:
        self._transport.close()

    @property
    def online(self) -> Mapping[str, str]:
        """Software versions of those who are online, by name. Replaced whole: another thread may look at it."""
        return self._online

    # --- TransportHandler ------------------------------------------------------------------------------------------

    def on_connected(self) -> None:
        self.state, self.heard = "connected", True

    def on_disconnected(self, reason: str) -> None:
        self.state, self.heard = f"the broker is away: {reason}", False

    def on_packet(self, topic: str, payload: bytes, retained: bool) -> None:
        try:
            self._take(read_topic(topic, fleet=self._fleet, server=self._server).sender, payload)
        except RemoteError:
            self.refused += 1  # anybody who reaches the broker can cause these

    def on_writable(self) -> None:
        pass

    # --- what comes in ---------------------------------------------------------------------------------------------

    def _take(self, sender: str, payload: bytes) -> None:
        try:
            if self._roster is None:
                raise RosterError("births can't be verified without a roster")
            self._roster.entry(sender)
        except RosterError:
            if len(payload) <= _STATUS_BYTES and (sender in self._unverified or len(self._unverified) < _UNVERIFIED):
                self._unverified[sender] = payload
            raise
        presence = read_presence(payload, self._roster)
        if presence.name != sender:
            raise RosterError(f"status of {sender}: it is of {presence.name}")
        if self._presence.accept(presence):
            self._publish()

    def _publish(self) -> None:
        births = ((name, self._presence.birth(name)) for name in self._presence.names())
        self._online = {name: birth.version for name, birth in births if birth is not None}

    def _follow(self) -> None:
        """A newer roster, if there is one: who was unknown may be known now, and who was left out is gone."""
        self._loop.call_at(self._loop.now_s() + _FOLLOW_S, self._follow)
        try:
            roster = self._newest()
        except SordinoError:
            return  # whoever shows the view names it
        if roster is None or (self._roster is not None and roster.epoch <= self._roster.epoch):
            return
        self._roster = roster
        self._presence.keep_only(roster)
        waiting, self._unverified = self._unverified, {}
        for sender, payload in waiting.items():
            try:
                self._take(sender, payload)
            except RemoteError:
                self.refused += 1
        self._publish()


@contextmanager
def listening(home: Home, settings: MqttSettings) -> Iterator[tuple[Births, Reactor]]:
    """A listener on a reactor, which the caller runs. `settings`: the server's own way to the broker."""
    with Reactor() as reactor:
        mine = replace(settings, client_id=f"{settings.client_id}-view-{token_hex(4)}")
        births = Births(
            MqttTransport(mine, reactor),
            reactor,
            fleet=home.spec.fleet,
            server=home.spec.server,
            roster=lambda: home.roster_book(wall_s=time.time).current,
        )
        births.open()
        try:
            yield births, reactor
        finally:
            births.close()
