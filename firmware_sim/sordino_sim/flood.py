"""A device that floods the server: with messages that nobody asked for, with garbage, with packets of its own again.

It has all that a stolen device has: its keys, its session, its topics. Where its window is full it waits like others;
the broker and the server have to bear what gets through.
"""

from __future__ import annotations

import random
from itertools import cycle
from typing import Final

from sordino_common.clock import Loop
from sordino_common.errors import SordinoError
from sordino_common.messages import HealthReport, Message, Refused
from sordino_common.transport.base import Transport
from sordino_common.transport.endpoint import Endpoint
from sordino_common.transport.topics import packet_topic, status_topic

_GARBAGE_BYTES: Final = (0, 1, 60, 1200, 60_000)


class Flood:
    """`begin` once; it ends by itself. `sent` counts packets and messages that were taken from it."""

    def __init__(self, name: str, *, endpoint: Endpoint, transport: Transport, fleet: str, server: str) -> None:
        self._endpoint = endpoint
        self._transport = transport
        self._server = server
        self._topic = packet_topic(fleet, name, server, server)
        self._status = status_topic(fleet, name)
        self._draw = random.Random(f"sordino-flood|{name}")
        self._kinds = cycle(("message", "garbage", "message", "status", "answer"))
        self.sent = 0

    def begin(self, loop: Loop, *, per_s: float, for_s: float) -> None:
        until_s = loop.now_s() + for_s

        def again() -> None:
            self._one()
            if loop.now_s() + 1.0 / per_s <= until_s:
                loop.call_at(loop.now_s() + 1.0 / per_s, again)

        again()

    def _one(self) -> None:
        kind = next(self._kinds)
        garbage = self._draw.randbytes(self._draw.choice(_GARBAGE_BYTES))
        try:
            match kind:
                case "garbage":
                    self.sent += self._transport.publish(self._topic, garbage, fleeting=True)
                case "status":
                    self.sent += self._transport.publish(self._status, garbage, fleeting=True)
                case _:
                    self._endpoint.send(self._server, self._message(kind), expires_s=5.0)
                    self.sent += 1
        except SordinoError:  # its own queue is full
            pass

    def _message(self, kind: str) -> Message:
        if kind == "answer":
            return Refused(command="train", code="policy", reason="x" * 1000)
        return HealthReport(
            uptime_s=1.0,
            wall_s=0.0,
            resident_bytes=1,
            store_used_bytes=0,
            store_tensors=0,
            plans=0,
            tasks_done=0,
            tasks_failed=0,
            refusals=0,
            running=("x" * 60,) * 64,
        )
