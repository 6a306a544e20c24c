"""A short visit to the broker: leave packets there, retained, and read what lies there or comes.

For requests to be enrolled and their answers: neither side has to be there when the other is. No sessions, no births;
what is read proves itself by its signatures.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from sordino_common.errors import FleetUnavailable
from sordino_common.transport.mqtt import MqttSettings, MqttTransport
from sordino_common.transport.reactor import Reactor

_CLEAR_S = 5.0  # what could not be taken away stays, and does no harm

Take = Callable[[str, bytes], bool]  # (topic, payload) -> whether that was all


class _Visitor:
    def __init__(self, transport: MqttTransport, leave: Sequence[tuple[str, bytes, bool]], take: Take) -> None:
        self._transport = transport
        self._left = deque(leave)
        self._take = take
        self.seen = False  # the broker has let us in
        self.satisfied = False
        self.reason = "no answer"
        self.failed = False  # at the first attempt: a person is waiting, who can try again

    def on_connected(self) -> None:
        self.seen = True
        self.on_writable()

    def on_disconnected(self, reason: str) -> None:
        self.reason = reason
        self.failed = not self.seen

    def on_packet(self, topic: str, payload: bytes, retained: bool) -> None:
        if not self.satisfied and self._take(topic, payload):
            self.satisfied = True

    def on_writable(self) -> None:
        while self._left:
            topic, payload, retain = self._left[0]
            if not self._transport.publish(topic, payload, retain=retain):
                return
            self._left.popleft()

    def leave(self, items: Sequence[tuple[str, bytes, bool]]) -> None:
        self._left.extend(items)
        self.on_writable()

    @property
    def done_or_failed(self) -> bool:
        return self.satisfied or self.failed

    @property
    def all_left(self) -> bool:
        return self.seen and not self._left and self._transport.connected and not self._transport.unacknowledged


def visit(
    settings: MqttSettings,
    *,
    leave: Sequence[tuple[str, bytes]] = (),
    filters: Sequence[str] = (),
    take: Take | None = None,
    wait_s: float = 0.0,
    clear: Sequence[str] = (),
) -> bool:
    """Leave (topic, payload) pairs, retained; then hand packets on `filters` to `take` until it says that this was all,
    at most `wait_s`; if it did, what is retained on `clear` is taken away. Returns whether it said so (without `take`:
    True).

    Raises `FleetUnavailable` if the broker does not let us in at the first attempt."""
    with Reactor() as loop:
        transport = MqttTransport(settings, loop)
        for topic_filter in filters:
            transport.subscribe(topic_filter)
        items = [(topic, payload, True) for topic, payload in leave]
        visitor = _Visitor(transport, items, take or (lambda _topic, _payload: True))
        transport.open(visitor)
        try:
            deadline_s = loop.now_s() + settings.connect_timeout_s
            loop.run_until(lambda: visitor.all_left or visitor.done_or_failed, deadline_s=deadline_s)
            if visitor.failed or not (visitor.all_left or visitor.satisfied):
                raise FleetUnavailable(f"the broker {settings.host}:{settings.port}: {visitor.reason}")
            if take is None:
                return True
            loop.run_until(lambda: visitor.satisfied, deadline_s=loop.now_s() + wait_s)
            if visitor.satisfied and clear:
                visitor.leave([(topic, b"", True) for topic in clear])
                loop.run_until(lambda: visitor.all_left, deadline_s=loop.now_s() + _CLEAR_S)
            return visitor.satisfied
        finally:
            transport.close()


def read_all(settings: MqttSettings, filters: Sequence[str], *, marker_topic: str) -> list[tuple[str, bytes]]:
    """(topic, payload) of all retained packets that `filters` find.

    `marker_topic`: found by one of them, and ours to publish on. The broker sends what is retained before what is
    published later, so the reading ends where our own marker comes back. Raises `FleetUnavailable`."""
    marker = b"marker " + os.urandom(16)
    found: list[tuple[str, bytes]] = []

    def take(topic: str, payload: bytes) -> bool:
        if topic == marker_topic:
            return payload == marker
        if payload:
            found.append((topic, payload))
        return False

    with Reactor() as loop:
        transport = MqttTransport(settings, loop)
        for topic_filter in filters:
            transport.subscribe(topic_filter)
        visitor = _Visitor(transport, [(marker_topic, marker, False)], take)
        transport.open(visitor)
        try:
            deadline_s = loop.now_s() + 2 * settings.connect_timeout_s
            loop.run_until(lambda: visitor.done_or_failed, deadline_s=deadline_s)
            if not visitor.satisfied:
                reason = visitor.reason if not visitor.seen else "it did not send what lies there in time"
                raise FleetUnavailable(f"the broker {settings.host}:{settings.port}: {reason}")
        finally:
            transport.close()
    return found


def visitor_settings(settings: MqttSettings, suffix: str) -> MqttSettings:
    """The same broker under a client id of its own: who is connected under ours stays so."""
    return msgspec.structs.replace(settings, client_id=f"{settings.client_id}-{suffix}")
