"""The packets that go round paho: cut out of the stream wherever it breaks, written in order, left to paho if odd."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import pytest

from helpers_fake_broker import PUBLISH, packet, puback, publish
from sordino_common.transport.reactor import Reactor
from sordino_common.transport.wire import Wire, plain_head

MOST = 70_000


class Pair:
    """A wire, and the other end of it."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        ours, self.theirs = socket.socketpair()
        for end in (ours, self.theirs):
            end.setblocking(False)
        self.wire = Wire(ours, self.reactor, most_bytes=MOST)
        self.wire.watch(lambda _ready: None)

    def close(self) -> None:
        self.wire.close()
        self.theirs.close()
        self.reactor.close()

    def take(self) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """What is there now: plain packets, and the bytes that are left to paho."""
        plain, others = [], b""
        self.wire.fill()
        while True:
            found = self.wire.next_plain()
            if found is not None:
                plain.append(found)
            elif self.wire.waits_for_paho:
                data = self.wire.recv(7)
                if not data:
                    return plain, others
                others += data
            else:
                return plain, others


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def plain(topic: bytes, payload: bytes) -> bytes:
    return packet(PUBLISH, len(topic).to_bytes(2, "big") + topic + b"\0" + payload)


@pytest.mark.parametrize("nbytes", [0, 1, 100, 119, 120, 121, 16_000, 16_375, 16_376, 16_377, 65_000])
def test_a_plain_packet_is_as_mqtt_writes_it(pair: Pair, nbytes: int) -> None:
    payload = random.Random(1).randbytes(nbytes)
    written = plain_head("a/ü".encode(), nbytes) + payload
    assert written == plain("a/ü".encode(), payload)
    pair.theirs.sendall(written)
    assert pair.take() == ([("a/ü".encode(), payload)], b"")


@pytest.mark.parametrize("seed", range(30))
def test_a_stream_is_cut_the_same_wherever_it_breaks(pair: Pair, seed: int) -> None:
    draw = random.Random(seed)
    stream, expected, left = b"", [], b""
    for _ in range(12):
        body = draw.randbytes(draw.choice([0, 1, 90, 130, 3000]))
        if draw.random() < 0.6:
            topic = draw.choice([b"x", b"", b"some/topic"])
            stream += plain(topic, body)
            expected.append((topic, body))
        else:
            other = draw.choice(
                [
                    publish(b"x", body),  # quality of service 1
                    puback(b"\0\1x\0\1"),
                    packet(PUBLISH, b"\0\1x\0" + body, flags=1),  # retained
                    packet(PUBLISH, b"\0\1x\5\x03\0\2ab" + body),  # with a property
                    packet(PUBLISH, b"\0\x09x"),  # the topic runs over the end
                    packet(PUBLISH, b"\0"),
                    packet(PUBLISH, b""),
                    packet(PUBLISH, b"\0\1x"),  # no properties at all: malformed
                    plain(b"x", bytes(MOST)),  # too large to be held back
                ]
            )
            stream += other
            left += other
    found, passed = [], b""
    while stream:
        cut = draw.choice([1, 2, 3, 5, 50, 4000, 40_000])
        pair.theirs.sendall(stream[:cut])
        stream = stream[cut:]
        some, bytes_ = pair.take()
        found += some
        passed += bytes_
    assert found == expected
    assert passed == left


def test_a_length_that_is_none_goes_to_paho(pair: Pair) -> None:
    noise = b"\x30\xff\xff\xff\xff\xff and more"
    pair.theirs.sendall(noise)
    assert pair.take() == ([], noise)


def test_the_end_comes_after_what_was_there(pair: Pair) -> None:
    pair.theirs.sendall(plain(b"x", b"1") + plain(b"x", b"22")[:-1])
    pair.theirs.close()
    found, left = pair.take()
    assert found == [(b"x", b"1")]
    pair.wire.fill()
    assert pair.wire.waits_for_paho
    assert left + pair.wire.recv(100) == plain(b"x", b"22")[:-1]
    assert pair.wire.recv(100) == b""


def test_nothing_to_read_is_not_the_end(pair: Pair) -> None:
    pair.wire.fill()
    assert not pair.wire.waits_for_paho
    with pytest.raises(BlockingIOError):
        pair.wire.recv(1)


def test_what_the_socket_does_not_take_leaves_later_and_in_order(pair: Pair) -> None:
    big = random.Random(2).randbytes(8 << 20)
    pair.wire.offer(big)
    assert pair.wire.blocked
    with pytest.raises(BlockingIOError):
        pair.wire.send(b"paho's")
    came = b""
    while pair.wire.blocked:
        came += pair.theirs.recv(1 << 20)
        pair.wire.flush()
    assert pair.wire.send(b"paho's") == 6
    while len(came) < len(big) + 6:
        came += pair.theirs.recv(1 << 20)
    assert came == big + b"paho's"


def test_a_connection_that_breaks_while_writing_is_told_by_reading(pair: Pair) -> None:
    pair.theirs.close()
    pair.wire.offer(b"lost")
    assert not pair.wire.blocked
    assert pair.wire.waits_for_paho
    with pytest.raises(BrokenPipeError):
        pair.wire.recv(1)
    assert isinstance(pair.wire.error, BrokenPipeError)


def test_what_comes_after_the_end_waits_for_no_room(pair: Pair) -> None:
    pair.theirs.close()
    pair.wire.offer(b"lost")
    pair.wire.offer(b"lost too")
    assert not pair.wire.blocked
    with pytest.raises(BrokenPipeError):
        pair.wire.send(b"paho's")


def test_the_end_frees_what_waited_for_room(pair: Pair) -> None:
    pair.wire.offer(bytes(8 << 20))
    assert pair.wire.blocked
    pair.theirs.shutdown(socket.SHUT_WR)
    pair.wire.fill()
    assert not pair.wire.blocked


def test_what_is_larger_than_one_read_is_read_on_at_once(pair: Pair) -> None:
    whole = plain(b"x", random.Random(3).randbytes(69_000))
    pair.theirs.sendall(whole)
    reads = 0
    while pair.wire.next_plain() is None:
        assert pair.wire.pending() is (reads > 0)
        pair.wire.fill()
        reads += 1
    assert reads == 2
    assert pair.wire.drained
    pair.wire.fill()
    assert not pair.wire.pending()


@pytest.mark.parametrize("large", [False, True])
def test_a_whole_packet_comes_out_however_its_beginning_is_cut(pair: Pair, large: bool) -> None:
    """Also behind others, and in what was put together from pieces: offsets count from where the last one ended."""
    for nbytes in (0, 123, 124, 16_379, 16_380, 65_000):
        before, whole = plain(b"t", bytes(66_000 if large else 3)), plain(b"t", bytes(nbytes))
        for cut in (1, 2, 3, 4, 5):
            pair.theirs.sendall(before + whole[:cut])
            taken = pair.take()
            if large:  # more than one read
                taken = [*taken[0], *pair.take()[0]], b""
            assert taken[0][0][0] == b"t"
            assert len(taken[0]) == 1
            pair.theirs.sendall(whole[cut:])
            assert pair.take() == ([(b"t", bytes(nbytes))], b"")


@pytest.mark.parametrize("behind", [0, 1, 500])
def test_the_end_in_the_middle_of_something_large_comes_after_all_that_was_there(pair: Pair, behind: int) -> None:
    before, large = plain(b"t", bytes(behind)), plain(b"x", random.Random(4).randbytes(69_900))
    pair.theirs.sendall(before * (behind > 0) + large[: 68_000 - behind])
    found, left = pair.take()
    more, after = pair.take()
    assert (found + more, left + after) == ([(b"t", bytes(behind))] * (behind > 0), b"")
    pair.theirs.sendall(large[68_000 - behind : 68_100])
    pair.theirs.close()
    assert pair.take() == ([], b"")
    pair.wire.fill()
    assert pair.wire.waits_for_paho
    left = b""
    while data := pair.wire.recv(50_000):
        left += data
    assert left == large[:68_100]


def test_a_break_in_the_middle_of_something_large_is_told_after_what_was_there(pair: Pair) -> None:
    large = plain(b"x", bytes(69_900))
    pair.theirs.sendall(large[:-1])
    pair.take()
    pair.take()
    pair.theirs.close()
    pair.wire.offer(b"lost")
    assert pair.wire.next_plain() is None
    left = b""
    while len(left) < len(large) - 1:
        left += pair.wire.recv(100_000)
    assert left == large[:-1]
    with pytest.raises(BrokenPipeError):
        pair.wire.recv(1)


@pytest.mark.parametrize("seed", range(10))
def test_large_packets_among_small_ones(pair: Pair, seed: int) -> None:
    draw = random.Random(seed)
    packets = [(b"x", draw.randbytes(draw.choice([0, 200, 65_520, 65_530, 65_531, 65_532, 69_000]))) for _ in range(12)]
    stream = b"".join(plain(*one) for one in packets)
    found = []
    while stream:
        cut = draw.choice([7, 3000, 65_536, 100_000])
        pair.theirs.sendall(stream[:cut])
        stream = stream[cut:]
        while True:
            some, left = pair.take()
            assert left == b""
            found += some
            if not some and not pair.wire.pending():
                break
    assert found == packets


def test_it_says_when_it_is_drained(pair: Pair) -> None:
    """So that nobody looks twice; never before all is taken, and not at the end, which is still to be read."""
    whole = plain(b"x", b"1")
    pair.theirs.sendall(whole + whole + whole[:-1])
    pair.wire.fill()
    for _ in range(2):
        assert pair.wire.next_plain() == (b"x", b"1")
        assert not pair.wire.drained
    assert pair.wire.next_plain() is None
    assert not pair.wire.drained
    pair.theirs.sendall(whole[-1:])
    pair.wire.fill()
    assert pair.wire.next_plain() == (b"x", b"1")
    assert pair.wire.drained
    pair.theirs.sendall(puback(b"\0\1"))
    pair.wire.fill()
    assert pair.wire.next_plain() is None
    assert not pair.wire.drained
    pair.wire.recv(100)
    pair.theirs.sendall(whole)
    pair.wire.fill()
    pair.theirs.close()
    pair.wire.fill()
    assert pair.wire.next_plain() == (b"x", b"1")
    assert not pair.wire.drained
    assert pair.wire.waits_for_paho


def test_it_is_busy_while_anybody_waits_for_room(pair: Pair) -> None:
    assert not pair.wire.busy
    pair.wire.want_write(True)
    assert pair.wire.busy
    pair.wire.offer(bytes(8 << 20))
    pair.wire.want_write(False)
    assert pair.wire.busy
    while pair.wire.blocked:
        assert pair.wire.busy
        pair.theirs.recv(1 << 20)
        pair.wire.flush()
    assert not pair.wire.busy
