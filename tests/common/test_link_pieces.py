"""The parts of a link on their own: topics, chunks, frames, shared encodings, deadlines, greetings."""

from __future__ import annotations

import hashlib
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_link import bulky, small
from sordino_common.errors import CodecError, LimitExceeded, LocalError
from sordino_common.messages import encode_message
from sordino_common.transport.chunks import MAX_HOLES, Cutter, Holding, Reassembler, Shape
from sordino_common.transport.deadlines import Deadlines
from sordino_common.transport.encoded import EncodedPool, estimate_bytes
from sordino_common.transport.frames import (
    MAX_DONE,
    MAX_STATES,
    PART_OVERHEAD,
    Ack,
    Frame,
    Part,
    Probe,
    Refuse,
    State,
    Whole,
    decode_frames,
    encode_frames,
)
from sordino_common.transport.greetings import Greetings
from sordino_common.transport.inbound import Budget, Receiver
from sordino_common.transport.settings import LinkSettings
from sordino_common.transport.topics import (
    Origin,
    packet_topic,
    read_topic,
    roster_topic,
    status_topic,
    subscriptions,
)

# --- topics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sender", "receiver", "topic"),
    [
        ("hub", "alto", "sordino/ward/alto/cmd"),
        ("alto", "hub", "sordino/ward/alto/reply"),
        ("alto", "bass", "sordino/ward/bass/peer/alto"),
    ],
)
def test_a_packet_topic_names_its_sender(sender: str, receiver: str, topic: str) -> None:
    assert packet_topic("ward", sender, receiver, "hub") == topic
    assert read_topic(topic, fleet="ward", server="hub") == Origin(sender=sender, channel="packet")


def test_status_and_roster_topics() -> None:
    read = {"fleet": "ward", "server": "hub"}
    assert read_topic(status_topic("ward", "alto"), **read) == Origin(sender="alto", channel="status")
    assert read_topic(roster_topic("ward", "hub"), **read) == Origin(sender="hub", channel="roster")
    assert subscriptions("ward", "hub", "hub") == ("sordino/ward/+/reply", "sordino/ward/+/status")
    assert "sordino/ward/alto/peer/+" in subscriptions("ward", "alto", "hub")


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "sordino/ward/alto",
        "sordino/other/alto/cmd",
        "else/ward/alto/cmd",
        "sordino/ward/Alto/cmd",
        "sordino/ward/alto/roster",
        "sordino/ward/alto/peer/",
        "sordino/ward/alto/peer/bass/x",
        "sordino/ward/alto/status/",
    ],
)
def test_bad_topics_are_refused(topic: str) -> None:
    with pytest.raises(CodecError, match="none of fleet"):
        read_topic(topic, fleet="ward", server="hub")


@pytest.mark.parametrize("name", ["", "Alto", "a/b", "+", "a" * 64])
def test_names_that_would_break_topics_are_refused(name: str) -> None:
    with pytest.raises(LocalError, match="not a name"):
        packet_topic("ward", "hub", name, "hub")
    with pytest.raises(LocalError, match="itself"):
        packet_topic("ward", "hub", "hub", "hub")


# --- chunks -----------------------------------------------------------------------------------------------------------


def shape_of(data: bytes, chunk_bytes: int) -> Shape:
    return Shape(size=len(data), chunk_bytes=chunk_bytes, digest=hashlib.sha256(data).digest())


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(min_size=1, max_size=400),
    chunk_bytes=st.integers(1, 50),
    seed=st.integers(0, 999),
    loss=st.floats(0, 0.9),
)
def test_chunks_lost_in_any_order_are_all_there_in_the_end(
    data: bytes, chunk_bytes: int, seed: int, loss: float
) -> None:
    draw = random.Random(seed)
    shape = shape_of(data, chunk_bytes)
    cutter, reassembler, view = Cutter(shape), Reassembler(shape), memoryview(data)
    for _ in range(10_000):
        flying = []
        while len(flying) < 8 and (index := cutter.next_index) is not None:
            cutter.sent(index)
            flying.append(index)
        draw.shuffle(flying)
        for index in flying:
            if draw.random() >= loss:
                reassembler.put(index, bytes(cutter.chunk(view, index)))
        told = reassembler.holding()
        cutter.acknowledge(told)
        for index in flying:
            cutter.lost(index)
        if cutter.complete:
            break
    assert reassembler.complete and reassembler.assemble() == data


@settings(max_examples=200, deadline=None)
@given(have=st.sets(st.integers(0, 99)))
def test_a_holding_tells_nothing_but_the_truth(have: set[int]) -> None:
    reassembler = Reassembler(shape_of(bytes(100), 1))
    for index in have:
        assert reassembler.put(index, b"\0")
        assert not reassembler.put(index, b"\0")
    told = reassembler.holding()
    in_holes = {index for first, behind in told.holes for index in range(first, behind)}
    claimed = set(range(told.end)) - in_holes
    assert claimed <= have and in_holes.isdisjoint(have)
    if len(told.holes) < MAX_HOLES:
        assert claimed == have


def test_a_parcel_with_a_wrong_digest_is_refused() -> None:
    reassembler = Reassembler(Shape(size=4, chunk_bytes=2, digest=bytes(32)))
    reassembler.put(0, b"ab")
    with pytest.raises(LocalError, match="1 chunks are missing"):
        reassembler.assemble()
    reassembler.put(1, b"cd")
    with pytest.raises(CodecError, match="SHA-256"):
        reassembler.assemble()


@pytest.mark.parametrize(("index", "data"), [(-1, b"ab"), (3, b"a"), (0, b"a"), (2, b"ab"), (1, b"")])
def test_chunks_of_a_wrong_place_or_length_are_refused(index: int, data: bytes) -> None:
    with pytest.raises(CodecError, match="chunk"):
        Reassembler(Shape(size=5, chunk_bytes=2, digest=bytes(32))).put(index, data)


@pytest.mark.parametrize(("size", "chunk_bytes"), [(0, 1), (1, 0), (1 << 30, 1)])
def test_parcels_that_can_not_be_are_refused(size: int, chunk_bytes: int) -> None:
    with pytest.raises(CodecError, match="parcel"):
        Shape(size=size, chunk_bytes=chunk_bytes, digest=bytes(32))


def test_a_parcel_of_one_chunk_needs_no_digest() -> None:
    reassembler = Reassembler(Shape(size=2, chunk_bytes=2, digest=b""))
    reassembler.put(0, b"ab")
    assert reassembler.assemble() == b"ab"
    for size, digest in ((3, b""), (2, b"1"), (2, bytes(31))):
        with pytest.raises(CodecError, match="parcel"):
            Shape(size=size, chunk_bytes=2, digest=digest)


@pytest.mark.parametrize("holes", [((0, 2),), ((5, 4),), ((3, 4), (3, 5)), ((8, 11),)])
def test_holdings_that_contradict_themselves_are_refused(holes: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(CodecError, match="holding"):
        Holding(upto=2, end=10, holes=holes)


# --- frames -----------------------------------------------------------------------------------------------------------

PART = Part(stamp=3, floor=1, parcel=2, index=0, shape=shape_of(b"abc", 2), correlation=bytes(range(16)), data=b"ab")
FRAMES: list[Frame] = [
    PART,
    Probe(stamp=4, floor=2, parcels=(2, 5)),
    Ack(
        stamp=9,
        done=(1, 2),
        held=(7,),
        states=(
            State(parcel=3, incarnation=2, chunk_bytes=512, holding=Holding(upto=1, end=9, holes=((1, 3), (5, 6)))),
        ),
    ),
    Refuse(parcel=4, code="limit", reason="too long"),
]
WHOLE = Whole(stamp=3, floor=1, parcel=2, correlation=bytes(16), data=b"abc")


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)
def test_frames_come_back_as_they_were(frame: Frame) -> None:
    assert decode_frames(encode_frames([frame])) == [frame]
    assert decode_frames(encode_frames(FRAMES)) == FRAMES
    assert decode_frames(encode_frames([WHOLE]) + encode_frames([frame])) == [WHOLE, frame]


def test_the_overhead_of_a_part_and_the_size_of_an_ack_are_bounded() -> None:
    huge = (1 << 63) - 1
    part = Part(
        stamp=huge,
        floor=huge,
        parcel=huge,
        index=huge,
        shape=Shape(size=huge, chunk_bytes=huge, digest=bytes(32)),
        correlation=bytes(16),
        data=bytes(1 << 17),
    )
    assert len(encode_frames([part])) <= len(part.data) + PART_OVERHEAD
    # Chunk and parcel numbers as they get at 2^32 packets a lane: the largest ack still fits a packet of 2 KiB.
    many = 1 << 32
    holes = tuple((60_000 + 2 * hole, 60_001 + 2 * hole) for hole in range(MAX_HOLES))
    state = State(parcel=many, incarnation=many, chunk_bytes=many, holding=Holding(upto=1, end=65_536, holes=holes))
    ack = Ack(stamp=many, done=(many,) * MAX_DONE, held=(many,) * MAX_DONE, states=(state,) * MAX_STATES)
    assert len(encode_frames([ack])) < 1500


GOOD = [encode_frames([frame]) for frame in (WHOLE, *FRAMES)]
_PROBE_HEAD = b"Q" + bytes(16)
_ACK_HEAD = b"A" + bytes(8)
_PART_HEAD = b"P" + bytes(24)
_SIZES = struct.pack(">QQQ", 0, 3, 2)


@pytest.mark.parametrize("frame", GOOD, ids=lambda data: data[:1].decode())
def test_a_frame_that_is_cut_short_is_refused(frame: bytes) -> None:
    for end in range(1, len(frame)):
        with pytest.raises(CodecError):
            decode_frames(frame[:end])


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"X",
        b"R" + b"\xff" * 8 + b"\1a\0\1b",  # a number of 2^63 and more
        b"R" + bytes(8) + b"\1\xff\0\1b",  # no UTF-8
        b"R" + bytes(8) + b"\1a\x04\xb1" + bytes(1201),  # too long a reason
        b"W" + bytes(24 + 16 + 4),  # nothing in it
        b"W" + b"\x80" + bytes(7 + 16 + 16) + b"\0\0\0\1a",  # a stamp of 2^63, a floor, a parcel
        b"W" + bytes(8) + b"\x80" + bytes(7 + 8 + 16) + b"\0\0\0\1a",
        b"W" + bytes(16) + b"\x80" + bytes(7 + 16) + b"\0\0\0\1a",
        b"W" + bytes(24 + 16) + b"\0\0\0\2a",
        _PROBE_HEAD + b"\x21" + bytes(33 * 8),
        _PROBE_HEAD + b"\1" + b"\x80" + bytes(7),
        _ACK_HEAD + b"\x21\0\0" + bytes(33 * 8),
        _ACK_HEAD + b"\0\x21\0" + bytes(33 * 8),
        _ACK_HEAD + b"\0\0\5" + bytes(5 * 33),
        _ACK_HEAD + b"\0\0\1" + struct.pack(">QQQIIB", 1, 1, 1, 1, 200, 17) + bytes(17 * 8),
        _ACK_HEAD + b"\0\0\1" + struct.pack(">QQQIIB", 1, 1, 1, 5, 4, 0),
        _ACK_HEAD + b"\0\0\1" + struct.pack(">QQQIIBII", 1, 1, 1, 1, 9, 1, 3, 3),
        _PART_HEAD + _SIZES + bytes(48) + b"\0\0\0\3ab",
        _PART_HEAD + struct.pack(">QQQ", 0, 1 << 40, 1) + bytes(48) + b"\0\0\0\1a",
        b"W" + bytes(40) + b"\0\0\0\0",  # nothing in it
        b"W" + b"\x80" + bytes(39) + b"\0\0\0\1a",
        GOOD[3] * 5,
        GOOD[3] + b"\0",
    ],
)
def test_bad_frames_are_refused(bad: bytes) -> None:
    with pytest.raises(CodecError):
        decode_frames(bad)


# --- receiver: what a hostile sender may not do -----------------------------------------------------------------------


def receiver(**changes: object) -> Receiver:
    chosen = LinkSettings(**{"chunk_bytes": 1024, "max_message_bytes": 8192, "reassembly_bytes": 8192, **changes})  # type: ignore[arg-type]
    return Receiver(chosen, Budget(chosen.reassembly_bytes))


def part(data: bytes, index: int = 0, **changes: object) -> Part:
    fields: dict[str, object] = {
        "stamp": 0,
        "floor": 0,
        "parcel": 0,
        "correlation": bytes(16),
        "shape": shape_of(data, 1024),
    }
    return Part(**{**fields, **changes}, index=index, data=data[index * 1024 : (index + 1) * 1024])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"parcel": 5000},
        {"parcel": 1, "floor": 2},
        {"shape": shape_of(bytes(3000), 1024), "parcel": 1},
        {"correlation": bytes(15) + b"x"},
        {"shape": Shape(size=2048, chunk_bytes=1024, digest=bytes(32))},
    ],
)
def test_a_part_that_contradicts_what_came_before_changes_nothing(changes: dict[str, object]) -> None:
    ours, data = receiver(), bytes(range(256)) * 8
    assert ours.on_part(part(data), 0.0) is None
    before = ours.frames()
    with pytest.raises(CodecError):
        ours.on_part(part(data[:10] if "parcel" in changes and "shape" in changes else data, **changes), 1.0)
    assert ours.frames()[0] == Ack(stamp=0, done=(), held=(), states=())
    assert len(before) == 1
    arrived = ours.on_part(part(data, 1), 2.0)
    assert arrived is not None and arrived.data == data


def test_a_wrong_digest_is_refused_once_and_again_to_every_repetition() -> None:
    ours = receiver()
    lie = part(b"abc", shape=Shape(size=3, chunk_bytes=1024, digest=bytes(32)))
    with pytest.raises(CodecError, match="SHA-256"):
        ours.on_part(lie, 0.0)
    for _ in range(2):
        refusals = [frame for frame in ours.frames() if isinstance(frame, Refuse)]
        assert [refusal.code for refusal in refusals] == ["codec"]
        assert ours.on_part(lie, 1.0) is None


def test_reassemblies_of_one_peer_are_bounded_in_number_and_bytes() -> None:
    ours = receiver(reassemblies_per_peer=2)
    data = bytes(2048)
    for parcel in range(4):
        assert ours.on_part(part(data, parcel=parcel), 0.0) is None
    ack = ours.frames()[0]
    assert isinstance(ack, Ack)
    assert ack.held == (2, 3) and [state.parcel for state in ack.states] == [0, 1]
    assert set(ours.held) == {2, 3}
    ours.reset()
    assert not ours.held and ours.budget.left == 8192


def test_what_lies_below_the_floor_is_forgotten_and_never_delivered() -> None:
    ours = receiver()
    assert ours.on_part(part(bytes(2048)), 0.0) is None
    assert ours.budget.left < 8192
    arrived = ours.on_part(part(b"next", parcel=1, floor=1), 0.0)
    assert arrived is not None and ours.budget.left == 8192
    assert ours.on_part(part(bytes(2048), 1), 0.0) is None


# --- shared encodings, deadlines, greetings ---------------------------------------------------------------------------


def test_a_message_is_held_once_for_all_its_users() -> None:
    pool = EncodedPool(limit_bytes=1000, max_message_bytes=100_000)
    message = bulky(2000)
    first, second = pool.acquire(message), pool.acquire(message)
    assert first is second and bytes(first.data) == encode_message(message)
    assert pool.bytes == len(first.data)
    assert pool.admits(message) and not pool.admits(small())
    pool.release(first)
    pool.release(second)
    assert pool.bytes == 0 and pool.admits(small())
    with pytest.raises(LocalError, match="more often"):
        pool.release(second)
    with pytest.raises(LimitExceeded, match="at most 100000"):
        pool.acquire(bulky(200_000))


@pytest.mark.parametrize("nbytes", [0, 100, 70_000])
def test_the_estimate_is_close(nbytes: int) -> None:
    message = bulky(nbytes)
    size = len(encode_message(message))
    assert size <= estimate_bytes(message) <= size + 100


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.one_of(st.integers(0, 50), st.just(float("inf"))))))
def test_deadlines_pass_in_order_and_as_last_set(steps: list[tuple[int, float]]) -> None:
    deadlines: Deadlines[int] = Deadlines()
    oracle: dict[int, float] = {}
    for item, due_s in steps:
        deadlines.set(item, due_s)
        oracle[item] = due_s
    live = {item: due_s for item, due_s in oracle.items() if due_s < float("inf")}
    assert deadlines.next_s() == min(live.values(), default=float("inf"))
    passed = deadlines.pop(25.0)
    assert set(passed) == {item for item, due_s in live.items() if due_s <= 25.0}
    assert [live[item] for item in passed] == sorted(live[item] for item in passed)


def test_deadlines_keep_no_more_than_they_need() -> None:
    deadlines: Deadlines[int] = Deadlines()
    for number in range(10_000):
        deadlines.set(number % 7, float(number))
    assert len(deadlines) < 200


def test_greetings_back_off_and_begin_again_when_the_peer_appears() -> None:
    greetings = Greetings(LinkSettings())
    greetings.want(("alto", b""), 0.0)
    times = []
    while len(times) < 8:
        now_s = greetings.next_s()
        assert greetings.due(now_s) == [("alto", b"")]
        times.append(now_s)
    assert times == [0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 61.0, 91.0]
    greetings.want(("alto", b""), 92.0)
    assert greetings.next_s() == 121.0
    greetings.hurry("alto", 100.0)
    assert greetings.due(100.0) == [("alto", b"")] and greetings.next_s() == 101.0
    greetings.settle(("alto", b""))
    assert greetings.next_s() == float("inf")


def test_answers_to_unknown_sessions_are_rationed() -> None:
    greetings = Greetings(LinkSettings())
    assert [greetings.may_answer("alto", now_s) for now_s in (0.0, 1.0, 4.9, 5.0)] == [True, False, False, True]
    assert greetings.may_answer("bass", 1.0)
