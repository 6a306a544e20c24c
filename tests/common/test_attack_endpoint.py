"""Hostile traffic against endpoints: what a broker, or a member of the fleet gone bad, can put on their topics.

Whatever comes, an endpoint raises nothing, refuses by name, holds bounded memory, and goes on talking to the others.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import tracemalloc
from collections.abc import Iterator
from itertools import count

import pytest

from helpers_channel import FLEET
from helpers_link import MemoryBand, Party, bulky, small
from sordino_common.channel.session import Session
from sordino_common.errors import CodecError, LocalError, RemoteError
from sordino_common.messages import encode, message_types
from sordino_common.transport.chunks import Holding, Shape
from sordino_common.transport.frames import Ack, Frame, Part, Probe, Refuse, State, encode_frames
from sordino_common.transport.memory import Publication
from sordino_common.transport.settings import KIB, MIB, LinkSettings

CASES = int(os.environ.get("SORDINO_FUZZ_CASES", "3000"))
SETTINGS = LinkSettings(
    chunk_bytes=4 * KIB, max_message_bytes=256 * KIB, reassembly_bytes=512 * KIB, encoded_bytes=256 * KIB
)
GROWTH_BYTES = 24 * MIB  # windows of captured packets and half-received messages; far below what the cases send


def fleet() -> MemoryBand:
    band = MemoryBand(settings=SETTINGS, packet_bytes=16 * KIB)
    for name in band.names:
        band.add(name)
    band.all_online()
    return band


def rest(band: MemoryBand, seconds: float = 1.0) -> None:
    band.virtual.run_until(lambda: False, deadline_s=band.virtual.now_s() + seconds)


def session_of(band: MemoryBand, name: str, peer: str, context: bytes = b"") -> Session:
    """The session with which a member gone bad can seal what it likes."""
    session = band.parties[name].endpoint._sessions.established(peer, context)
    assert session is not None
    return session


def attack(band: MemoryBand, name: str, victim: str, frames: list[Frame] | bytes) -> None:
    """A packet of `name`, in its own session, with a content of its choice, put before `victim` at once."""
    plaintext = frames if isinstance(frames, bytes) else encode_frames(frames)
    sealed = session_of(band, name, victim).seal(plaintext)
    band.parties[victim].endpoint.on_packet(f"sordino/{FLEET}/{name}/reply", sealed, False)


def talk(band: MemoryBand) -> None:
    """Every pair exchanges a message, the large ones of many chunks included."""
    pairs = [(a, b) for a in band.names for b in band.names if a != b]
    reports = [band.parties[a].send(b, bulky(60_000, fill=k)) for k, (a, b) in enumerate(pairs)]
    band.told(*reports, within_s=600.0)
    assert all(report.delivered for report in reports), [report.told for report in reports]


# --- one attack each -------------------------------------------------------------------------------------------------


def test_a_peer_that_opens_every_context_can_still_be_greeted() -> None:
    band = fleet()
    bad, hub = band.parties["alto"], band.parties["hub"]
    for k in range(40):
        table = bad.endpoint._sessions
        try:
            hello = table.initiate("hub", bytes([k + 1]), now_s=band.virtual.now_s())
        except LocalError:
            break  # its own table is full, which is what the attack needs
        hub.endpoint.on_packet(f"sordino/{FLEET}/alto/reply", hello, False)
        rest(band)
    hub.endpoint.on_packet(f"sordino/{FLEET}/alto/reply", b"\x84\x66sealed\x50" + bytes(16) + b"\x00\x41a", False)
    report = hub.send("alto", small(1))
    band.told(report)
    assert report.delivered


def test_an_ack_that_names_a_message_twice_ends_it_once() -> None:
    band = fleet()
    hub = band.parties["hub"]
    band.told(hub.send("alto", small(0)))
    band.kill("alto")
    report = hub.send("alto", small(1))
    parcel = next(iter(hub.endpoint._link._peers["alto"].contexts[b""].sender._active))
    attack(band, "alto", "hub", [Ack(stamp=0, done=(parcel, parcel), held=(), states=())])
    assert report.told == [(True, "")]
    assert hub.endpoint.unacknowledged().get("alto", 0) == 0
    assert hub.endpoint._link._peers["alto"].messages == 0


def test_probes_of_messages_that_never_were_take_no_memory() -> None:
    band = fleet()
    band.told(band.parties["alto"].send("hub", small(0)))
    band.broker.stop()  # nothing goes out any more: what is to be told piles up
    receiver = band.parties["hub"].endpoint._link._peers["alto"].contexts[b""].receiver
    for k in range(500):
        attack(band, "alto", "hub", [Probe(stamp=0, floor=0, parcels=tuple(range(32 * k, 32 * k + 32)))])
    assert len(receiver.pending) <= 1024


def test_an_answer_that_is_due_and_wanted_no_more_ends_nobodys_turn() -> None:
    """A probe is to be answered at once, and the next frame says that what it asked for is over: nothing to be told."""
    band = fleet()
    band.told(band.parties["alto"].send("hub", small(0)))
    rest(band, 1.0)
    probe, part = Probe(stamp=900, floor=5, parcels=(5,)), _whole(9, encode(["nonsense", {}]), stamp=901, floor=9)
    attack(band, "alto", "hub", [probe, part])
    attack(band, "alto", "hub", [Probe(stamp=902, floor=20, parcels=(20,)), Probe(stamp=903, floor=21, parcels=())])
    receiver = band.parties["hub"].endpoint._link._peers["alto"].contexts[b""].receiver
    assert not receiver.pending and receiver.due_s == math.inf
    report = band.parties["bass"].send("hub", small(1))
    band.told(report)
    assert report.delivered


def test_parcels_cut_into_crumbs_are_refused() -> None:
    """A chunk costs its receiver some 60 bytes of bookkeeping, which the reassembly budget does not count."""
    band = fleet()
    band.told(band.parties["alto"].send("hub", small(0)))
    shape = Shape(size=65_536, chunk_bytes=1, digest=bytes(32))
    part = Part(stamp=1, floor=0, parcel=900, index=0, shape=shape, correlation=bytes(16), data=b"a")
    attack(band, "alto", "hub", [part])
    hub = band.parties["hub"]
    assert isinstance(hub.heard.refusals[-1][1], CodecError)
    assert hub.endpoint._link.reassembly_bytes == 0


def test_a_member_speaks_for_nobody_else() -> None:
    """Its session says who sent a packet, not the topic, nor anything in it."""
    band = fleet()
    hub = band.parties["hub"]
    band.told(hub.send("bass", small(0)), band.parties["alto"].send("hub", small(1)))
    seen = len(band.packets)
    band.told(band.parties["alto"].send("hub", small(2)))
    packet = next(p.payload for p in band.packets[seen:] if p.topic.endswith("alto/reply"))
    hub.endpoint.on_packet(f"sordino/{FLEET}/bass/reply", packet, False)  # replayed on another's topic
    sealed = session_of(band, "alto", "hub").seal(
        encode_frames([_whole(7, encode(["tensor-dropped", {"dropped": 3}]))])
    )
    hub.endpoint.on_packet(f"sordino/{FLEET}/bass/reply", sealed, False)
    rest(band)
    assert [incoming.sender for incoming in hub.heard.messages] == ["alto"] * 3
    talk(band)


# --- many at random --------------------------------------------------------------------------------------------------


def _whole(number: int, data: bytes, *, stamp: int = 0, floor: int = 0) -> Part:
    shape = Shape(size=len(data), chunk_bytes=max(512, len(data)), digest=hashlib.sha256(data).digest())
    return Part(
        stamp=stamp, floor=floor, parcel=number, index=0, shape=shape, correlation=number.to_bytes(16, "big"), data=data
    )


def mutated(rng: random.Random, data: bytes) -> bytes:
    """`data` with some bits, bytes or pieces changed."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(5):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(changed):
                changed[at] = rng.choice((0, 0x1B, 0x3B, 0x5F, 0x7F, 0x80, 0x9F, 0xBF, 0xF9, 0xFF, rng.randrange(256)))
            case 2:
                del changed[at : at + rng.choice((1, 2, 16, len(changed)))]
            case 3:
                changed[at:at] = rng.randbytes(rng.choice((1, 2, 16)))
            case _:
                changed[at : at + 8] = rng.choice((0, 1, 255, 1 << 32, (1 << 63) - 1)).to_bytes(8, "big")
    return bytes(changed)


def numbers(rng: random.Random) -> int:
    return rng.choice((0, 1, 2, 3, rng.randrange(40), rng.randrange(1200), 1 << 32, (1 << 63) - 1))


def hostile_frame(rng: random.Random) -> Frame:
    """Well-formed, and a lie."""
    try:
        match rng.randrange(5):
            case 0:
                shape = Shape(
                    size=rng.choice((1, 100, 5000, 65_536, 1 << 20, 1 << 40)),
                    chunk_bytes=rng.choice((1, 512, 1024, 4096, 1 << 30)),
                    digest=rng.randbytes(32),
                )
                index = rng.randrange(min(shape.count, 4))
                data = rng.randbytes(min(8192, max(0, shape.length(index))))
                return Part(
                    stamp=numbers(rng), floor=rng.choice((0, 0, 0, numbers(rng))), parcel=numbers(rng), index=index,
                    shape=shape, correlation=rng.randbytes(16), data=data,
                )  # fmt: skip
            case 1:
                kind = rng.choice((*message_types(), "nonsense"))
                fields = {"dropped": numbers(rng)} if rng.random() < 0.5 else {}
                return _whole(rng.randrange(2000), encode([kind, fields]), stamp=rng.randrange(99))
            case 2:
                return Probe(stamp=numbers(rng), floor=rng.choice((0, 0, numbers(rng))),
                             parcels=tuple(numbers(rng) for _ in range(rng.randrange(33))))  # fmt: skip
            case 3:
                states = []
                for _ in range(rng.randrange(5)):
                    upto, end = sorted(min(numbers(rng), (1 << 32) - 1) for _ in range(2))
                    holding = Holding(upto=upto, end=end)
                    states.append(State(parcel=numbers(rng), incarnation=numbers(rng),
                                        chunk_bytes=rng.choice((0, 1, 1024, 4096)), holding=holding))  # fmt: skip
                done, held = (tuple(numbers(rng) for _ in range(rng.randrange(6))) for _ in range(2))
                return Ack(stamp=rng.choice((0, 1, numbers(rng))), done=done, held=held, states=tuple(states))
            case _:
                return Refuse(parcel=numbers(rng), code="x" * rng.randrange(60), reason="\x1b[2J" * rng.randrange(99))
    except RemoteError:  # not even well-formed; take something simpler
        return Probe(stamp=0, floor=0, parcels=())


def assault(band: MemoryBand, rng: random.Random, cases: int) -> Iterator[Party]:
    """Puts one bad packet after the other before one of the parties, on all kinds of topics; yields whom it met."""
    topics = [f"sordino/{FLEET}/{a}/{leaf}" for a in (*band.names, "nobody") for leaf in ("cmd", "reply", "status")]
    topics += [f"sordino/{FLEET}/{a}/peer/{b}" for a in band.names for b in band.names]
    topics += [f"sordino/{FLEET}/hub/roster", f"sordino/{FLEET}", "sordino//x", "elsewhere", ""]
    fresh = count()
    for _ in range(cases):
        victim = rng.choice(list(band.names))
        party = band.parties[victim]
        seen: list[Publication] = band.packets
        match rng.randrange(6):
            case 0:
                payload = rng.randbytes(rng.choice((0, 1, 7, 60, 300, 4000)))
            case 1 if seen:
                payload = rng.choice(seen).payload  # a replay, often on another's topic
            case 2 if seen:
                payload = mutated(rng, rng.choice(seen).payload)
            case _:
                bad = rng.choice([name for name in band.names if name != victim])
                session = band.parties[bad].endpoint._sessions.established(victim)
                if session is None:
                    continue
                frames = encode_frames([hostile_frame(rng) for _ in range(rng.choice((1, 1, 2, 4)))])
                payload = session.seal(frames if rng.random() < 0.7 else mutated(rng, frames))
        topic = rng.choice(topics)
        if rng.random() < 0.05:
            topic = f"sordino/{FLEET}/made-up-{next(fresh)}/status"
        party.endpoint.on_packet(topic, payload, rng.random() < 0.1)
        yield party


def fuzz(cases: int, seed: int) -> None:
    band, rng = fleet(), random.Random(seed)
    talk(band)
    held: list[int] = []
    tracemalloc.start()
    try:
        for number, party in enumerate(assault(band, rng, cases)):
            party.heard.messages.clear()
            if number % 100 == 99:
                for each in band.parties.values():
                    assert all(isinstance(error, RemoteError) for _, error in each.heard.refusals)
                    assert all(sender in ("", "nobody", *band.names) or sender.startswith("made-up-")
                               for sender, _ in each.heard.refusals)  # fmt: skip
                    each.heard.refusals.clear()
                rest(band, 0.5)
                del band.packets[:-400]
                a, b = rng.sample(list(band.names), 2)
                band.parties[a].send(b, bulky(rng.choice((10, 3000, 20_000))), expires_s=30.0)
            if number % 1000 == 999:
                held.append(tracemalloc.get_traced_memory()[0])
                assert held[-1] - held[0] < GROWTH_BYTES, held
        assert tracemalloc.get_traced_memory()[0] < 2 * GROWTH_BYTES
    finally:
        tracemalloc.stop()
    for party in band.parties.values():
        assert party.endpoint._link.reassembly_bytes <= SETTINGS.reassembly_bytes
    # A member that lied about its own numbers may have to be forgotten before the two understand each other again.
    rest(band, 300.0)
    for name in band.names:
        boot = band.parties[name].endpoint.boot
        band.kill(name)
        band.add(name, boot=boot + 1)
    band.all_online()
    talk(band)


def test_fuzz_of_every_topic_and_of_opened_packets() -> None:
    fuzz(CASES, seed=20)


@pytest.mark.soak
@pytest.mark.skipif(not os.environ.get("SORDINO_SOAK"), reason="minutes long: set SORDINO_SOAK=1")
@pytest.mark.timeout(3600)
def test_fuzz_soak() -> None:
    fuzz(100_000, seed=21)
