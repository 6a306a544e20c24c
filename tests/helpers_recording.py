"""Conversations of whole fleets, recorded from the simulator, for replays against later code: see vectors/record.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from helpers_sim import boston, boston_secure, boston_shares
from sordino_common.messages import encode_message
from sordino_common.messages.protocol import PROTOCOL
from sordino_common.transport import endpoint as endpoint_module
from sordino_server.job import Job
from sordino_sim import harness
from sordino_sim.runner import simulate

_TINY = ("model.args.hidden=[2]", "train.rounds=1")
CONVERSATIONS: dict[str, Callable[[], Job]] = {
    "train": lambda: boston(*_TINY, "simulation.agents=2", "train.local_epochs=null", "train.local_steps=2"),
    "sums": lambda: boston_secure(*_TINY, "simulation.agents=6"),
    "shares": lambda: boston_shares(*_TINY, "train.local_steps=2", "simulation.agents=3"),
}


class Packet(msgspec.Struct, frozen=True, kw_only=True):
    """Of the channel, in the clear: a birth, a death, a roster, a Hello, Accept or Reject."""

    topic: str
    payload: str


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """A message as it left its session: who to whom, and its bytes in hex."""

    sender: str
    receiver: str
    kind: str
    correlation: str
    context: str
    data: str


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """One conversation. `operator`: public key; `roster`: signed."""

    software: str
    protocol: tuple[int, int]
    fleet: str
    server: str
    operator: str
    roster: str
    packets: tuple[Packet, ...]
    messages: tuple[Said, ...]


@dataclass
class Tap:
    """What an endpoint's handler hears goes into `said`, and on to it."""

    handler: Any
    name: str
    said: list[Said]

    def on_message(self, incoming: Any) -> None:
        self.said.append(
            Said(
                sender=incoming.sender,
                receiver=self.name,
                kind=incoming.message.kind,
                correlation=incoming.correlation.hex(),
                context=incoming.context.hex(),
                data=encode_message(incoming.message).hex(),
            )
        )
        self.handler.on_message(incoming)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handler, name)


@contextmanager
def tapped(said: list[Said], packets: dict[str, Packet]) -> Iterator[None]:
    """While this holds, endpoints of the simulator are listened to."""

    class Tapped(endpoint_module.Endpoint):
        def __init__(self, **fields: Any) -> None:
            fields["handler"] = Tap(fields["handler"], fields["name"], said)
            super().__init__(**fields)

        def on_packet(self, topic: str, payload: bytes, retained: bool) -> None:
            if payload[1:2] != b"\x66" or payload[2:8] != b"sealed":
                packets.setdefault(payload.hex(), Packet(topic=topic, payload=payload.hex()))
            super().on_packet(topic, payload, retained)

    before = harness.Endpoint
    harness.Endpoint = Tapped  # type: ignore[misc]
    try:
        yield
    finally:
        harness.Endpoint = before  # type: ignore[misc]


def record(name: str, *, software: str) -> Recording:
    """Play the conversation `name` and write down what is said."""
    said: list[Said] = []
    packets: dict[str, Packet] = {}
    with tapped(said, packets):
        simulate(CONVERSATIONS[name](), with_baseline=False)
    roster = next(packet for packet in packets.values() if packet.topic.endswith("/roster"))
    from sordino_common.channel.packets import read_packet
    from sordino_sim.keys import simulation_operator_key

    return Recording(
        software=software,
        protocol=(PROTOCOL.major, PROTOCOL.minor),
        fleet=harness.FLEET,
        server=harness.SERVER,
        operator=simulation_operator_key(seed_of(name)).public.hex(),
        roster=read_packet(bytes.fromhex(roster.payload))[1][0].hex(),
        packets=tuple(packets.values()),
        messages=tuple(said),
    )


def seed_of(name: str) -> int:
    from sordino_sim.scenario import scenario_of

    return scenario_of(CONVERSATIONS[name]()).seed
