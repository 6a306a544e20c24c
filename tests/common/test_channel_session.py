"""A session: each counter once, in any order within the window, and nothing but what the peer sealed."""

from __future__ import annotations

import copy
import pickle

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_channel import FLEET, seeded
from sordino_common.channel.packets import MAX_COUNTER, read_packet, sealed_head
from sordino_common.channel.session import SEALED_OVERHEAD, WINDOW, Session, derive_session, shared_secret
from sordino_common.errors import CodecError, HandshakeError, LocalError, SessionError
from sordino_common.messages.codec import Limits, decode, encode


def pair(**changes: object) -> tuple[Session, Session]:
    """(initiator's end, responder's end)."""
    fields: dict[str, object] = {
        "shared": seeded("shared"),
        "hello": b"hello",
        "accept": b"accept",
        "fleet": FLEET,
        "peer_boot": 1,
        "context": b"",
        **changes,
    }
    return (
        derive_session(peer="bass", initiated=True, **fields),  # type: ignore[arg-type]
        derive_session(peer="alto", initiated=False, **fields),  # type: ignore[arg-type]
    )


def give(receiver: Session, packet: bytes) -> bytes:
    _, (session_id, counter, ciphertext) = read_packet(packet)
    assert session_id == receiver.id
    return receiver.open(counter, ciphertext)


def state(session: Session) -> tuple[int, int, int]:
    return session._next, session._highest, session._seen


def test_both_directions() -> None:
    a, b = pair()
    for plaintext in (b"", b"x", bytes(1000), bytes(70_000)):
        assert give(b, a.seal(plaintext)) == plaintext
        assert give(a, b.seal(plaintext)) == plaintext
    assert a.sent == b.sent == 4
    assert give(b, a.seal(memoryview(b"view"))) == b"view"
    assert give(b, a.seal(bytearray(b"array"))) == b"array"


def test_the_directions_have_keys_of_their_own() -> None:
    a, b = pair()
    packet = a.seal(b"ping")
    for end in (a, pair()[0]):  # reflected to its sender
        before = state(end)
        with pytest.raises(SessionError, match="packet 0 is forged or damaged"):
            give(end, packet)
        assert state(end) == before
    assert b.seal(b"ping") != packet


@pytest.mark.parametrize(
    "changes",
    [
        {"shared": seeded("other")},
        {"hello": b"hellp"},
        {"accept": b"accepu"},
        {"hello": b"helloa", "accept": b"ccept"},  # the same bytes, cut elsewhere
    ],
    ids=["shared", "hello", "accept", "boundary"],
)
def test_everything_signed_enters_the_keys(changes: dict[str, object]) -> None:
    a, _ = pair()
    _, other = pair(**changes)
    assert a.id != other.id
    _, (_, counter, ciphertext) = read_packet(a.seal(b"x"))
    with pytest.raises(SessionError):
        other.open(counter, ciphertext)


def test_the_fleet_enters_the_associated_data() -> None:
    a, _ = pair()
    _, other = pair(fleet="other")
    with pytest.raises(SessionError):
        give(other, a.seal(b"x"))


def test_a_replay_is_refused() -> None:
    a, b = pair()
    packets = [a.seal(bytes([k])) for k in range(5)]
    for packet in packets:
        give(b, packet)
    for number, packet in enumerate(packets):
        before = state(b)
        with pytest.raises(SessionError, match=f"packet {number} is a replay"):
            give(b, packet)
        assert state(b) == before


def test_the_window_s_edges() -> None:
    a, b = pair()
    packets = [a.seal(b"") for _ in range(WINDOW + 1)]
    give(b, packets[WINDOW])
    with pytest.raises(SessionError, match=f"packet 0 is {WINDOW} behind the newest, at most {WINDOW - 1}"):
        give(b, packets[0])
    give(b, packets[1])  # WINDOW - 1 behind: the last that fits
    with pytest.raises(SessionError, match="replay"):
        give(b, packets[1])
    later = a.seal(b"")
    give(b, later)
    with pytest.raises(SessionError, match=f"{WINDOW} behind"):
        give(b, packets[1])
    for packet in packets[2:WINDOW]:
        give(b, packet)


def test_a_long_jump_is_cheap_and_forgets_nothing_that_counts() -> None:
    a, b = pair()
    first = a.seal(b"")
    give(b, first)
    a._next = MAX_COUNTER - 1
    last_but_one, last = a.seal(b""), a.seal(b"last")
    assert give(b, last) == b"last"
    assert give(b, last_but_one) == b""
    for packet in (first, last_but_one, last):
        with pytest.raises(SessionError):
            give(b, packet)
    assert b._seen.bit_length() <= WINDOW


def test_the_counter_does_not_wrap() -> None:
    a, _ = pair()
    a._next = MAX_COUNTER
    a.seal(b"")
    for _ in range(2):
        with pytest.raises(LocalError, match=r"all 2\^64 counters are used"):
            a.seal(b"")
    assert a.sent == MAX_COUNTER + 1


@pytest.mark.parametrize("nbytes", [0, 100_000])
def test_a_counter_is_gone_even_if_sealing_fails(nbytes: int) -> None:
    a, _ = pair()

    class Broken:
        def encrypt(self, *_: object) -> bytes:
            raise MemoryError

        def encrypt_into(self, *_: object) -> int:
            raise MemoryError

    a._seal = Broken()  # type: ignore[assignment]
    with pytest.raises(MemoryError):
        a.seal(bytes(nbytes))
    assert a.sent == 1


@pytest.mark.parametrize("counter", [-1, MAX_COUNTER + 1])
def test_counters_out_of_range(counter: int) -> None:
    _, b = pair()
    with pytest.raises(SessionError, match="is not in"):
        b.open(counter, bytes(16))


@pytest.mark.parametrize("size", [0, 1, 15])
def test_a_ciphertext_shorter_than_its_tag(size: int) -> None:
    _, b = pair()
    with pytest.raises(SessionError, match="forged or damaged"):
        b.open(0, bytes(size))
    assert state(b) == (0, -1, 0)


def test_another_counter_does_not_open() -> None:
    a, b = pair()
    _, (_, _, ciphertext) = read_packet(a.seal(b"x"))
    for counter in (1, 2, 1 << 32, MAX_COUNTER):
        with pytest.raises(SessionError, match="forged"):
            b.open(counter, ciphertext)
    assert b.open(0, ciphertext) == b"x"


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(st.integers(0, 40) | st.integers(0, 3000), max_size=80))
def test_the_window_equals_a_slow_oracle(counters: list[int]) -> None:
    a, b = pair()
    packets: dict[int, bytes] = {}
    seen: set[int] = set()
    for counter in counters:
        a._next = counter
        packet = packets.setdefault(counter, a.seal(counter.to_bytes(2, "big")))
        fresh = counter not in seen and counter > max(seen, default=-1) - WINDOW
        if fresh:
            assert give(b, packet) == counter.to_bytes(2, "big")
            seen.add(counter)
        else:
            with pytest.raises(SessionError):
                give(b, packet)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.data())
def test_any_flipped_bit_of_a_packet_is_noticed(data: st.DataObject) -> None:
    a, b = pair()
    a._next = data.draw(st.sampled_from([0, 23, 24, 255, 256, 65_536, 1 << 32, MAX_COUNTER]))
    packet = bytearray(a.seal(b"some plaintext"))
    bit = data.draw(st.integers(0, len(packet) * 8 - 1))
    packet[bit // 8] ^= 1 << bit % 8
    try:
        kind, parts = read_packet(bytes(packet))
    except CodecError:
        return
    assert kind == "sealed"
    session_id, counter, ciphertext = parts
    if session_id == b.id:
        with pytest.raises(SessionError):
            b.open(counter, ciphertext)
    assert state(b) == (0, -1, 0)


# --- the packet's bytes ----------------------------------------------------------------------------------------------

LIMITS = Limits(depth=1, items=8, text_bytes=16)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.binary(min_size=16, max_size=16),
    st.integers(0, MAX_COUNTER) | st.sampled_from([23, 24, 255, 256, 65535, 65536, 2**32 - 1, 2**32]),
    st.binary(max_size=300) | st.sampled_from([bytes(65_535), bytes(65_536)]),
)
def test_by_hand_and_by_codec_is_the_same(session_id: bytes, counter: int, ciphertext: bytes) -> None:
    packet = sealed_head(session_id, counter, len(ciphertext)) + ciphertext
    assert packet == encode(["sealed", session_id, counter, ciphertext])
    assert read_packet(packet) == ("sealed", [session_id, counter, ciphertext])
    assert len(packet) <= len(ciphertext) + SEALED_OVERHEAD - 16


@settings(deadline=None, derandomize=True, max_examples=1500)
@given(st.data())
def test_what_the_codec_refuses_is_refused_by_hand_too(data: st.DataObject) -> None:
    """Mutated sealed packets: `read_packet` takes one if and only if the strict codec does, with the same parts."""
    number = data.draw(st.sampled_from([0, 5, 23, 24, 200, 256, 70_000, 1 << 33]))
    packet = bytearray(encode(["sealed", bytes(16), number, data.draw(st.binary(max_size=30))]))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(9, len(packet)))
        match data.draw(st.integers(0, 2)):
            case 0 if at < len(packet):
                packet[at] = data.draw(st.integers(0, 255))
            case 1:
                packet[at:at] = data.draw(st.binary(min_size=1, max_size=4))
            case _:
                del packet[at : at + data.draw(st.integers(1, 4))]
    raw = bytes(packet)
    try:
        expected = decode(raw, LIMITS)
        assert isinstance(expected, list)
        fits = len(expected) == 4 and isinstance(expected[2], int) and not isinstance(expected[2], bool)
        fits = fits and expected[2] >= 0 and isinstance(expected[1], bytes) and isinstance(expected[3], bytes)
        fits = fits and len(expected[1]) == 16
    except CodecError:
        fits = False
    if fits:
        assert read_packet(raw) == ("sealed", expected[1:])
    else:
        with pytest.raises(CodecError):
            read_packet(raw)


@pytest.mark.parametrize(
    "parts",
    [
        ["sealed"],
        ["sealed", bytes(16), 0],
        ["sealed", bytes(15), 0, b""],
        ["sealed", bytes(17), 0, b""],
        ["sealed", bytes(16), -1, b""],
        ["sealed", bytes(16), True, b""],
        ["sealed", bytes(16), 1.0, b""],
        ["sealed", bytes(16), "0", b""],
        ["sealed", bytes(16), 0, "text"],
        ["sealed", bytes(16), 0, b"", b""],
        ["hello", b""],
        ["hello", b"", "text"],
        ["roster"],
        ["roster", 1],
        ["unknown", b"", b""],
        [],
        [1],
        {},
        "sealed",
    ],
)
def test_packets_of_no_known_shape(parts: object) -> None:
    with pytest.raises(CodecError, match="packet: "):
        read_packet(cbor2.dumps(parts, canonical=True))


def test_an_oversized_packet_is_refused_before_it_is_parsed() -> None:
    size = 8 * 1024 * 1024 + 4097
    for packet in (bytes(size), encode(["sealed", bytes(16), 0, bytes(size)])):
        with pytest.raises(CodecError, match="at most"):
            read_packet(packet)


# --- degenerate keys -------------------------------------------------------------------------------------------------

# RFC 7748 section 6.1 and Wycheproof's x25519 "LowOrderPublic" and "NonCanonicalPublic" groups.
LOW_ORDER = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]
NOT_CANONICAL = [
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "0900000000000000000000000000000000000000000000000000000000000080",
    "cdeb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b880",
    "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
]


@pytest.mark.parametrize("key", LOW_ORDER)
def test_low_order_keys_are_refused(key: str) -> None:
    with pytest.raises(HandshakeError, match="with bass: the X25519 key has small order"):
        shared_secret(X25519PrivateKey.generate(), bytes.fromhex(key), "bass")


@pytest.mark.parametrize("key", NOT_CANONICAL)
def test_second_encodings_are_refused(key: str) -> None:
    with pytest.raises(HandshakeError, match="is not canonical"):
        shared_secret(X25519PrivateKey.generate(), bytes.fromhex(key), "bass")


@pytest.mark.parametrize("key", LOW_ORDER)
def test_behind_that_check_stands_the_all_zero_check(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sordino_common.channel.session.check_box_key", lambda _: None)
    with pytest.raises(HandshakeError, match="shared secret is all zero"):
        shared_secret(X25519PrivateKey.generate(), bytes.fromhex(key), "bass")


def test_a_back_end_that_returns_zeros_is_caught_as_well() -> None:
    class Lenient:
        def exchange(self, _: object) -> bytes:
            return bytes(32)

    with pytest.raises(HandshakeError, match="shared secret is all zero"):
        shared_secret(Lenient(), (9).to_bytes(32, "little"), "bass")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 31, 33])
def test_ephemerals_of_a_wrong_length(size: int) -> None:
    with pytest.raises(HandshakeError, match=f"has 32 bytes, got {size}"):
        shared_secret(X25519PrivateKey.generate(), bytes(size), "bass")


# --- secrecy ---------------------------------------------------------------------------------------------------------


def test_a_session_is_not_shown_copied_or_pickled() -> None:
    a, _ = pair(context=b"\x01\x02")
    assert repr(a) == f"Session({a.id.hex()}, peer=bass, context=0102)"
    with pytest.raises(LocalError, match="counters would be used twice"):
        pickle.dumps(a)
    for copier in (copy.copy, copy.deepcopy):
        with pytest.raises(LocalError, match="counters would be used twice"):
            copier(a)
