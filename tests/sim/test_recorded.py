"""Conversations recorded from every release of this major version, against today's code: read to the byte, answered by
today's agents, and taken by today's server. `vectors/record.py` makes a recording, and says when again."""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from helpers_recording import CONVERSATIONS, Recording, Said, seed_of
from sordino_common import messages as m
from sordino_common.channel.packets import Accept, Hello, Reject, read_body, read_packet, verify_body
from sordino_common.channel.presence import read_presence
from sordino_common.channel.roster import Roster, read_roster
from sordino_common.clock import VirtualLoop
from sordino_common.messages.protocol import PROTOCOL, ProtocolVersion
from sordino_common.transport.endpoint import Endpoint, Incoming
from sordino_common.transport.topics import read_topic
from sordino_server.run import run_job
from sordino_server.store import RunStore
from sordino_sim.harness import SERVER, SimulatedFleet
from sordino_sim.keys import simulation_device_key
from sordino_sim.scenario import scenario_of
from sordino_sim.wires import MemoryWire

FOLDERS = sorted((Path(__file__).parents[1] / "vectors").glob("recorded-*"))
CASES = [(folder, name) for folder in FOLDERS for name in CONVERSATIONS]
IDS = [f"{folder.name}-{name}" for folder, name in CASES]
LIMIT_S = 600.0


def load(folder: Path, name: str) -> Recording:
    return msgspec.json.decode((folder / f"{name}.json").read_bytes(), type=Recording)


def version_of(recording: Recording) -> ProtocolVersion:
    version = ProtocolVersion(*recording.protocol)
    if version.major != PROTOCOL.major:
        pytest.skip(f"protocol {version}: peers of another major version are refused by name")
    return version


def roster_of(recording: Recording) -> Roster:
    return read_roster(bytes.fromhex(recording.roster), operator_key=bytes.fromhex(recording.operator))


def test_there_is_a_recording() -> None:
    assert [folder.name for folder in FOLDERS][:1] == ["recorded-0.1"]


@pytest.mark.parametrize(("folder", "name"), CASES, ids=IDS)
def test_every_message_is_read_and_written_to_the_byte(folder: Path, name: str) -> None:
    recording = load(folder, name)
    minor = version_of(recording).minor
    for said in recording.messages:
        data = bytes.fromhex(said.data)
        message = m.decode_message(data, minor=minor)
        assert message.kind == said.kind
        assert m.encode_message(message, minor=minor) == data


@pytest.mark.parametrize(("folder", "name"), CASES, ids=IDS)
def test_every_packet_of_the_channel_verifies(folder: Path, name: str) -> None:
    recording = load(folder, name)
    version, roster = version_of(recording), roster_of(recording)
    kinds = set()
    for packet in recording.packets:
        raw = bytes.fromhex(packet.payload)
        origin = read_topic(packet.topic, fleet=recording.fleet, server=recording.server)
        kind, parts = read_packet(raw)
        kinds.add(kind)
        if kind in ("birth", "death"):
            presence = read_presence(raw, roster)
            assert (presence.name, presence.protocol) == (origin.sender, version)
        elif kind == "roster":
            assert read_roster(parts[0], operator_key=bytes.fromhex(recording.operator)).digest == roster.digest
        else:
            body = read_body({"hello": Hello, "accept": Accept, "reject": Reject}[kind], parts[0])
            assert isinstance(body, Hello | Accept | Reject)
            assert (body.sender, body.protocol) == (origin.sender, version)
            verify_body(body, parts[0], parts[1], roster.entry(body.sender).sign_key)
    assert kinds >= {"birth", "hello", "accept", "roster"}


# --- today's agents, asked by the recorded server -------------------------------------------------------------------


class Ear:
    """Handler of a party that only takes down what it hears."""

    def __init__(self) -> None:
        self.heard: dict[tuple[str, bytes], m.Message] = {}
        self.refused: list[str] = []

    def on_message(self, incoming: Incoming) -> None:
        self.heard[incoming.sender, incoming.correlation] = incoming.message

    def on_presence(self, name: str, online: bool, boot: int) -> None: ...
    def on_connection(self, connected: bool, reason: str) -> None: ...
    def on_roster(self, roster: Roster) -> None: ...
    def on_refusal(self, sender: str, error: Exception) -> None:
        self.refused.append(f"{sender}: {error}")


def stage(name: str) -> tuple[VirtualLoop, MemoryWire, SimulatedFleet]:
    loop = VirtualLoop()
    wire = MemoryWire(loop, network=None)
    return loop, wire, SimulatedFleet(scenario_of(CONVERSATIONS[name]()), loop=loop, wire=wire, network=None)


def ghost(
    fleet: SimulatedFleet, wire: MemoryWire, loop: VirtualLoop, name: str, seed: int, version: ProtocolVersion, ear: Any
) -> Endpoint:
    """A party of the recorded version, with the keys that it had."""
    book = fleet._book()
    book.accept(fleet._signed)
    return Endpoint(
        name=name,
        identity=simulation_device_key(seed, name),
        roster=book,
        fleet="simulated",
        server=SERVER,
        boot=1,
        transport=wire.transport(name, loop),
        loop=loop,
        handler=ear,
        version="recorded",
        protocol=version,
    )


def asked(recording: Recording, minor: int) -> Iterator[tuple[Said, m.Message, m.Message]]:
    """The server's commands in their order, each with the answer that came then. On shares up to the first message that
    is a step of the protocol: what follows depends on what each party has drawn."""
    answers = {
        (said.sender, said.correlation): m.decode_message(bytes.fromhex(said.data), minor=minor)
        for said in recording.messages
        if said.receiver == SERVER
    }
    for said in recording.messages:
        if said.sender != SERVER:
            continue
        if said.kind == "spdz-setup":
            return
        command = m.decode_message(bytes.fromhex(said.data), minor=minor)
        answer = answers.get((said.receiver, said.correlation))
        assert answer is not None, said
        yield said, command, answer


def alike(one: Any, other: Any) -> bool:
    """Equal, but for floats, which another build of NumPy may round otherwise, and for what was measured or drawn."""
    if type(one) is not type(other):
        return False
    if isinstance(one, m.Array):
        mine, theirs = (np.frombuffer(a.data, dtype=a.dtype) for a in (one, other))
        same = (one.dtype, one.shape) == (other.dtype, other.shape)
        return same and (not one.dtype.startswith("float") or np.allclose(mine, theirs, rtol=1e-3, atol=1e-5))
    if isinstance(one, float):
        return bool(np.isclose(one, other, rtol=1e-3, atol=1e-6)) or (one != one and other != other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, bytes):
        return len(one) == len(other)
    if isinstance(one, msgspec.Struct):
        return all(alike(getattr(one, n), getattr(other, n)) for n in one.__struct_fields__ if not n.endswith("_s"))
    return bool(one == other)


@pytest.mark.parametrize(("folder", "name"), CASES, ids=IDS)
def test_todays_agents_answer_the_recorded_server(folder: Path, name: str) -> None:
    recording = load(folder, name)
    version = version_of(recording)
    loop, wire, fleet = stage(name)
    ear = Ear()
    server = ghost(fleet, wire, loop, SERVER, seed_of(name), version, ear)
    server.open()
    fleet.start_agents()
    names = {said.receiver for said in recording.messages if said.sender == SERVER}
    assert loop.run_until(lambda: all(map(server.online, names)), deadline_s=loop.now_s() + LIMIT_S)
    count = 0
    for said, command, then in asked(recording, version.minor):
        key = (said.receiver, bytes.fromhex(said.correlation))
        server.send(said.receiver, command, correlation=key[1], context=bytes.fromhex(said.context))
        assert loop.run_until(lambda key=key: key in ear.heard, deadline_s=loop.now_s() + LIMIT_S), said.kind
        now = ear.heard[key]
        assert alike(now, then), f"{said.kind}: {now!r:.400} instead of {then!r:.400}"
        if isinstance(now, m.SumShare):
            assert m.encode_message(now) == m.encode_message(then)  # the masks of the recorded seeds, to the bit
        count += 1
    assert count >= 10
    assert not ear.refused
    fleet.close()


# --- today's server, answered by recorded agents --------------------------------------------------------------------


class Parrot(Ear):
    """Answers each command by what the recorded agent answered to its like, one after the other."""

    def __init__(self, name: str, recording: Recording, minor: int) -> None:
        super().__init__()
        self.endpoint: Endpoint | None = None
        self.asked: list[str] = []
        self.before: tuple[m.Array, ...] = ()  # the parameters that training began with
        kinds = {(s.receiver, s.correlation): s.kind for s in recording.messages if s.sender == SERVER}
        self._answers: dict[str, deque[m.Message]] = defaultdict(deque)
        for said in recording.messages:
            if said.sender == name and said.receiver == SERVER:
                kind = kinds[name, said.correlation]
                self._answers[kind].append(m.decode_message(bytes.fromhex(said.data), minor=minor))

    def on_message(self, incoming: Incoming) -> None:
        command = incoming.message
        self.asked.append(command.kind)
        if isinstance(command, m.Train):
            self.before = tuple(command.params)
        assert self._answers[command.kind], self.asked
        answer = self._answers[command.kind].popleft()
        if isinstance(command, m.PlanPut) and isinstance(answer, m.PlanReady):
            # Another PyTorch may trace other nodes: the Plan's hash is not what is recorded here.
            answer = msgspec.structs.replace(answer, plan_id=hashlib.sha256(command.plan).digest())
        assert self.endpoint is not None
        self.endpoint.send(incoming.sender, answer, correlation=incoming.correlation, context=incoming.context)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_todays_server_trains_on_the_recorded_agents_answers(folder: Path, tmp_path: Path) -> None:
    recording = load(folder, "train")
    version = version_of(recording)
    loop, wire, fleet = stage("train")
    conductor = fleet.start_server()
    trained = [m.decode_message(bytes.fromhex(said.data)) for said in recording.messages if said.kind == "trained"]
    runs = {reply.run for reply in trained if isinstance(reply, m.Trained)}
    assert len(runs) == 1
    parrots = {}
    for name in fleet.members:
        parrot = parrots[name] = Parrot(name, recording, version.minor)
        parrot.endpoint = ghost(fleet, wire, loop, name, seed_of("train"), version, parrot)
        parrot.endpoint.open()
    with RunStore(tmp_path, wall_s=loop.wall_s) as store:
        result = run_job(
            CONVERSATIONS["train"](),
            run=runs.pop(),
            conductor=conductor,
            loop=fleet.loop,
            store=store,
            members=fleet.members,
            observer=lambda event: None,
            resume=False,
            pooled=None,
            world=None,
            owned=lambda rows: None,
        )
    assert result.summary["rounds"] == 1 and result.summary["dropouts"] == 0
    for parrot in parrots.values():
        assert {"describe", "plan-put", "moments", "train", "evaluate"} <= set(parrot.asked)
        assert not parrot.refused
    # The model is what it was, and the average of the recorded updates, weighted by rows.
    updates = [reply for reply in trained if isinstance(reply, m.Trained)]
    weights = [reply.rows for reply in updates]
    before = next(iter(parrots.values())).before
    for k, tensor in enumerate(result.tensors.values()):
        theirs = [np.frombuffer(reply.update[k].data, reply.update[k].dtype) for reply in updates]
        mean = np.frombuffer(before[k].data, before[k].dtype) + np.average(theirs, axis=0, weights=weights)
        assert np.allclose(np.asarray(tensor).ravel(), mean, rtol=1e-4, atol=1e-5)
    fleet.close()
