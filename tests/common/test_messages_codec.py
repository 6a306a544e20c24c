"""The codec: a round trip for whatever can be written, and one named refusal for everything else."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import struct
import tracemalloc
from pathlib import Path

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_messages import EXAMPLES, F32, mutate
from sordino_common.errors import CodecError, LocalError
from sordino_common.messages import (
    Array,
    Limits,
    TensorPut,
    decode,
    decode_message,
    encode,
    encode_message,
    message_types,
)
from sordino_common.messages.array import DTYPES

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "messages.json").read_text("utf-8"))


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    size = math.prod(shape) * DTYPES[dtype][0]
    return Array(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 64), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.binary(max_size=40)
    | arrays()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=30), inner, max_size=5),
    max_leaves=30,
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(values)
def test_round_trip(value: object) -> None:
    data = encode(value)
    again = decode(data)
    assert again == value
    assert encode(again) == data


def by_cbor2(value: object) -> bytes:
    """As `cbor2` alone writes it."""

    def tagged(value: object) -> object:
        if isinstance(value, Array):
            return cbor2.CBORTag(40, [list(value.shape), cbor2.CBORTag(DTYPES[value.dtype][1], value.data)])
        if isinstance(value, list | tuple):
            return [tagged(item) for item in value]
        return {key: tagged(item) for key, item in value.items()} if isinstance(value, dict) else value

    return cbor2.dumps(tagged(value), canonical=True)


LONG = st.sampled_from(["", "a", "b", "aa", "ü", "z" * 22, "z" * 23, "z" * 24, "y" * 24, "x" * 255, "x" * 256])


@settings(deadline=None, derandomize=True, max_examples=100)
@given(values | st.dictionaries(st.text(max_size=3) | LONG, scalars, max_size=12))
def test_what_is_written_by_hand_is_as_by_cbor2(value: object) -> None:
    assert encode(value) == by_cbor2(value)


def test_lengths_and_counts_are_written_as_by_cbor2() -> None:
    for count in (0, 1, 23, 24, 255, 256, 65_535, 65_536):
        row = Array("uint8", (count, 1), bytes(count))
        for value in (row, [row] * min(count, 300), {f"{k:x}": row for k in range(min(count, 300))}, bytes(count)):
            assert encode(value) == by_cbor2(value)
    for value in ((1, (2, [F32])), {"a": True, "b": [F32, None, -0.0, math.nan, 1e300]}, [{"x": F32}, {}, []]):
        assert encode(value) == by_cbor2(value)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.floats())
def test_every_float_has_one_encoding(number: float) -> None:
    back = decode(encode(number))
    assert struct.pack(">d", back) == struct.pack(">d", number) or math.isnan(number)


@pytest.mark.parametrize("number", [0.0, -0.0, 1.0, 65504.0, 2.0**-24, math.inf, math.nan, 1.0 + 2.0**-20])
def test_a_float_that_fits_a_narrower_form_is_refused_in_a_wider_one(number: float) -> None:
    with pytest.raises(CodecError, match="shortest form of a float"):
        decode(b"\xfb" + struct.pack(">d", number))


@pytest.mark.parametrize(
    ("hexed", "text"),
    [
        ("", "ends at byte 0"),
        ("0101", "1 bytes after the end"),
        ("1817", "not the shortest form of 23"),
        ("190017", "not the shortest form"),
        ("5f4101ff", "indefinite"),
        ("9f01ff", "indefinite"),
        ("c11a514b67b0", "tag 1 at byte 0 is not taken"),
        ("c24101", "tag 2 at byte 0 is not taken"),
        ("d85544000000ff", "tag 85 at byte 0 is not taken"),
        ("f7", "simple value 23"),
        ("f0", "simple value 16"),
        ("f818", "simple value 24"),
        ("fb3ff0000000000000", "shortest form of a float"),
        ("fa7fc00000", "shortest form of a float"),
        ("f97e01", "shortest form of a float"),
        ("a2616101616102", "duplicate or out of order"),
        ("a2616201616102", "duplicate or out of order"),
        ("a10101", "map key at byte 1 is not text"),
        ("62c328", "not UTF-8"),
        ("5b7fffffffffffffff00", "truncated string"),
        ("9b000000010000000001", "a container of 4294967296 items"),
        ("bb0000000100000000", "a container of 8589934592 items"),
        ("d8288101", "needs an array of two"),
        ("d8288201d85540", "not a list of at most"),
        ("d828828120d85540", "not a natural number"),
        ("d828828101d8554100", "needs 4 bytes of data, got 1"),
        ("d828828101d8504400000000", "of no known element type"),
        ("d82882811b7fffffffffffffffd85540", "bytes of data, got 0"),
        ("d828828900000000000000000000d85540", "not a list of at most 8"),
        ("81" * 13 + "00", "nested deeper than 12"),
        ("1c", "indefinite or reserved"),
        ("18", "truncated head"),
    ],
)
def test_refusals_name_what_is_wrong(hexed: str, text: str) -> None:
    with pytest.raises(CodecError, match=text):
        decode(bytes.fromhex(hexed))


def test_limits_hold_before_anything_is_built() -> None:
    with pytest.raises(CodecError, match="at most 10 are taken"):
        decode(bytes(11), Limits(payload_bytes=10))
    with pytest.raises(CodecError, match="more than 3 items"):
        decode(encode([1, 2, 3]), Limits(items=3))
    with pytest.raises(CodecError, match="text of 5 bytes"):
        decode(encode("hello"), Limits(text_bytes=4))


def test_scalars_may_stand_at_the_deepest_level() -> None:
    for value in (None, True, 1.5, 7, "x", b"x"):
        nested: object = value
        for _ in range(12):
            nested = [nested]
        assert decode(encode(nested)) == nested
        with pytest.raises(CodecError, match="nested deeper than 12"):
            decode(encode([nested]))


def test_what_has_no_place_on_the_wire() -> None:
    with pytest.raises(LocalError, match="set has no place"):
        encode({1})
    with pytest.raises(LocalError, match="map keys must be text"):
        encode({1: 2})


def test_an_array_stays_as_it_is() -> None:
    for name in ("dtype", "shape", "data", "more"):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(F32, name, b"")
        with pytest.raises(AttributeError, match="immutable"):
            delattr(F32, name)
    for other in (copy.copy(F32), copy.deepcopy(F32)):
        assert (other, hash(other)) == (F32, hash(F32))


def test_an_array_shows_no_values() -> None:
    assert repr(F32) == "Array(float32[2, 3])"
    with pytest.raises(LocalError, match=r"float32\[2\] needs 8 bytes, got 3"):
        Array("float32", (2,), b"abc")
    with pytest.raises(LocalError, match="'object' is not one of"):
        Array("object", (2,), b"abc")
    with pytest.raises(LocalError, match="negative dimension"):
        Array("uint8", (-1, -3), b"abc")


# --- messages ----------------------------------------------------------------------------------------------------


def test_every_message_has_an_example_and_a_vector() -> None:
    assert set(EXAMPLES) == set(message_types())
    assert set(VECTORS["good"]) == set(message_types())


@pytest.mark.parametrize("kind", sorted(EXAMPLES))
def test_golden_vectors(kind: str) -> None:
    golden = bytes.fromhex(VECTORS["good"][kind])
    assert encode_message(EXAMPLES[kind]) == golden
    assert decode_message(golden) == EXAMPLES[kind]


@pytest.mark.parametrize("name", sorted(VECTORS["bad"]))
def test_bad_vectors(name: str) -> None:
    bad = VECTORS["bad"][name]
    with pytest.raises(CodecError, match=bad["error"]):
        decode_message(bytes.fromhex(bad["data"]))


@pytest.mark.parametrize("kind", sorted(EXAMPLES))
def test_every_field_is_needed_and_none_is_added(kind: str) -> None:
    wire_kind, fields = cbor2.loads(encode_message(EXAMPLES[kind]))
    with pytest.raises(CodecError, match="unknown field"):
        decode_message(cbor2.dumps([wire_kind, {**fields, "zzz": 1}], canonical=True))
    for name in fields:
        rest = {key: value for key, value in fields.items() if key != name}
        with pytest.raises(CodecError, match=f"{kind}: .*{name}"):
            decode_message(cbor2.dumps([wire_kind, rest], canonical=True))


@pytest.mark.parametrize("kind", sorted(EXAMPLES))
def test_wrong_types_are_refused(kind: str) -> None:
    wire_kind, fields = cbor2.loads(encode_message(EXAMPLES[kind]))
    for name in fields:
        with pytest.raises(CodecError, match=f"message {kind}"):
            decode_message(cbor2.dumps([wire_kind, {**fields, name: [{"a": 1}]}], canonical=True))


def test_a_whole_number_in_a_float_field_is_written_as_a_float() -> None:
    put = TensorPut(tensor_id=bytes(16), value=F32, lease_s=60)
    assert encode_message(put) == encode_message(TensorPut(tensor_id=bytes(16), value=F32, lease_s=60.0))
    assert decode_message(encode_message(put)) == put


def test_a_message_that_breaks_its_own_bound_is_our_bug() -> None:
    with pytest.raises(LocalError, match="message plan-ready"):
        encode_message(type(EXAMPLES["plan-ready"])(plan_id=b"short", peak_bytes=1, flops=1))  # type: ignore[call-arg]


@pytest.mark.soak
def test_mutated_messages_are_refused_by_name() -> None:
    """10^5 mutations (a fifth by default): `CodecError` or a valid message; memory stays bounded."""
    rng = random.Random(20_261_123)
    encoded = [encode_message(example) for example in EXAMPLES.values()]
    cases = 100_000 if os.environ.get("SORDINO_SOAK") else 20_000
    known = set(message_types().values())
    accepted = 0
    tracemalloc.start()
    for _ in range(cases):
        data = mutate(rng.choice(encoded), rng)
        try:
            message = decode_message(data)
        except CodecError:
            continue
        accepted += 1
        assert type(message) in known
        assert encode_message(message) == data  # no field escapes its bound, and nothing has a second encoding
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 1024 * 1024
    assert accepted < cases // 3
