"""Secure sums are exact, words are wide enough, and memory does not grow with the number of contributors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_sums import (
    Circle,
    contribution_of,
    names,
    no_noise,
    noise_of,
    rounded_gaussian,
    seeded,
    sum_terms,
    vectors,
)
from sordino_common.aggregate.contributor import mask
from sordino_common.aggregate.helper import HelperSum
from sordino_common.aggregate.leader import LeaderSum
from sordino_common.aggregate.masks import CHUNK_BYTES, add_noise
from sordino_common.aggregate.shares import share_of
from sordino_common.aggregate.terms import check_terms, choose_bits, largest_sum, noise_tail
from sordino_common.aggregate.wide import LIMB_BOUND, joined, limbs
from sordino_common.errors import CodecError, ConfigError, LocalError
from sordino_common.messages import SumSeedsChecked
from sordino_common.plan.arrays import from_numpy
from sordino_common.privacy.discrete_gaussian import noise_bound
from sordino_common.ring.prg import Seed, Stream, expand_bytes

# --- sums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("dropouts", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("count", [10, 100, 1000, 10_000])
def test_the_sum_is_exact(count: int, dropouts: float, bits: int) -> None:
    """Bit for bit the integer sum of those who are in, whoever falls out before the cut, at the words' edge."""
    bound = ((1 << (bits - 1)) - 1) // count
    terms = sum_terms(bits=bits, bound=bound, most=count, length=9, helpers=("helper-0", "helper-1", "helper-2"))
    circle = Circle(terms, names(count))
    x = vectors(count, 9, bound=bound, seed=count)
    stay = np.random.default_rng(count + bits).random(count) >= dropouts
    for k, name in enumerate(circle.asked):
        if stay[k]:
            assert circle.give(name, circle.contribution(name, x[k])) is None
    total = circle.finish()
    assert total.dtype == np.int64
    assert total.tolist() == [sum(int(v) for v in column) for column in x[stay].T]
    assert len(circle.leader.members) == int(stay.sum())


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.integers(1, 40_000),
    st.integers(2, 6),
    st.integers(1, 3),
    st.sampled_from([32, 64]),
    st.integers(0, 1 << 31),
)
def test_the_sum_is_exact_for_any_shape(length: int, count: int, helpers: int, bits: int, seed: int) -> None:
    """Lengths on both sides of a chunk (32,768 words of 32 bits)."""
    terms = sum_terms(
        length=length, bits=bits, bound=1 << 20, most=count, helpers=tuple(f"helper-{k}" for k in range(helpers))
    )
    circle = Circle(terms, names(count))
    x = vectors(count, length, bound=1 << 20, seed=seed)
    for k, name in enumerate(circle.asked):
        circle.give(name, circle.contribution(name, x[k], seed=seed))
    np.testing.assert_array_equal(circle.finish(), x.sum(axis=0))


def test_noise_comes_from_every_aggregator() -> None:
    """Two helpers and the leader: three times the variance. Of 40,000 entries the sample variance is within 5 % but for
    a chance below 1e-10 (its deviation is sqrt(2 / 40,000) = 0.7 %)."""
    terms = sum_terms(length=40_000, noise=noise_of(2500), bound=1 << 16, most=4)
    circle = Circle(terms, names(4), draw=rounded_gaussian(3))
    x = vectors(4, 40_000, bound=1 << 16)
    for k, name in enumerate(circle.asked):
        circle.give(name, circle.contribution(name, x[k]))
    error = circle.finish() - x.sum(axis=0)
    assert abs(error.var() / (3 * 2500) - 1) < 0.05
    assert abs(error.mean()) < 5


def test_noise_of_another_type_is_our_bug() -> None:
    terms = sum_terms(noise=noise_of(4), bound=10, most=3)
    words = np.zeros(7, np.uint32)
    for draw in (
        lambda s, n: np.zeros(n, np.float64),
        lambda s, n: np.zeros(n + 1, np.int64),
    ):
        with pytest.raises(LocalError, match=r"expected int64\[7\]"):
            add_noise(words, terms, noise_of(4), draw)  # type: ignore[arg-type]


def test_a_stream_goes_on_where_it_ended() -> None:
    seed, whole = Seed(bytes(range(32))), bytearray(CHUNK_BYTES * 5 + 123)
    expand_bytes(seed, b"info", memoryview(whole))
    stream, pieces = Stream(seed, b"info"), bytearray(len(whole))
    at = 0
    for size in (1, 63, 64, CHUNK_BYTES, 3 * CHUNK_BYTES + 7, 0):
        stream.fill(memoryview(pieces)[at : at + size])
        at += size
    stream.fill(memoryview(pieces)[at:])
    assert pieces == whole


@given(st.integers(-(1 << 62), (1 << 62)), st.integers(-(1 << 62), 1 << 62))
def test_wide_numbers_add_up(a: int, b: int) -> None:
    one, other = limbs(a, 4), limbs(b, 4)
    assert all(abs(limb) <= LIMB_BOUND for limb in (*one, *other))
    assert joined([x + y for x, y in zip(one, other, strict=True)]) == a + b


def test_wide_numbers_have_an_end() -> None:
    assert joined(limbs((1 << 48) - 1, 3)) == (1 << 48) - 1
    assert joined(limbs(-(1 << 48), 3)) == -(1 << 48)
    for value in (1 << 48, -(1 << 48) - 1):
        with pytest.raises(LocalError, match="3 limbs of 16"):
            limbs(value, 3)


# --- how wide the words must be ----------------------------------------------------------------------------------


def test_words_are_chosen_so_that_nothing_wraps() -> None:
    at_edge = {"most": 8, "length": 10, "helpers": 2, "noise": None}
    assert choose_bits(bound=(1 << 28) - 1, **at_edge) == 32  # type: ignore[arg-type]
    assert choose_bits(bound=1 << 28, **at_edge) == 64  # type: ignore[arg-type]
    assert choose_bits(bound=5, bits=64, **at_edge) == 64  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"8 contributions of entries up to 268435456 can reach 2147483648, and 32-bit"
    ):
        choose_bits(bound=1 << 28, bits=32, **at_edge)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"noise of variance 9 from 3 aggregators.*64-bit words hold less than"):
        choose_bits(bound=1 << 60, **{**at_edge, "noise": noise_of(9)})  # type: ignore[arg-type]


@given(st.integers(1, 1 << 50), st.integers(2, 4), st.integers(1, 1 << 28))
def test_the_tail_of_the_noise_is_below_the_stated_chance(sigma_squared: int, aggregators: int, length: int) -> None:
    tail = noise_tail(noise_of(sigma_squared), aggregators=aggregators, length=length)
    assert math.log2(2 * length) - tail**2 / (2 * aggregators * sigma_squared) / math.log(2) < -60
    # and not much more than is needed
    needed = math.sqrt(2 * aggregators * sigma_squared * (61 + math.log2(length)) * math.log(2))
    assert tail <= 1.02 * needed + 3


def test_terms_that_wrap_are_refused_by_everybody() -> None:
    fits = sum_terms(bound=(1 << 31) // 10_000 - 1)
    check_terms(fits)
    assert largest_sum(bound=fits.bound, most=10_000, length=7, helpers=2, noise=None) < 1 << 31
    for terms in (sum_terms(bound=1 << 31), sum_terms(bound=fits.bound, noise=noise_of(1 << 40))):
        with pytest.raises(CodecError, match="let it wrap: it can reach"):
            mask(np.zeros(7, np.int64), terms, contributor="agent-00000")
        with pytest.raises(CodecError, match="let it wrap"):
            HelperSum(terms, helper="helper-0")
        with pytest.raises(CodecError, match="let it wrap"):
            LeaderSum(terms, asked=())


def test_terms_that_make_no_sense_can_t_be_made() -> None:
    with pytest.raises(CodecError, match="a helper is named twice"):
        sum_terms(helpers=("helper-0", "helper-0"))
    with pytest.raises(CodecError, match="at least 5 and at most 4"):
        sum_terms(minimum=5, most=4)


def test_every_field_of_the_terms_is_in_their_digest() -> None:
    base = sum_terms()
    others = [
        sum_terms(session=bytes(16)), sum_terms(run="toy-2"), sum_terms(index=4), sum_terms(purpose="another"),
        sum_terms(bits=64), sum_terms(length=8), sum_terms(bound=999), sum_terms(helpers=("helper-1", "helper-0")),
        sum_terms(minimum=3), sum_terms(most=9999), sum_terms(noise=noise_of(1)), sum_terms(noise=noise_of(2)),
    ]  # fmt: skip
    assert len({terms.digest for terms in (base, *others)}) == 13


# --- memory ------------------------------------------------------------------------------------------------------


def test_a_share_takes_one_accumulator_and_one_chunk_whatever_n() -> None:
    """Counted by tracemalloc: NumPy reports its arrays to it."""
    import tracemalloc

    terms = sum_terms(length=1 << 20, bound=10, most=1000)
    peaks = {}
    for count in (2, 60):
        seeds = [Seed(seeded(k)(32)) for k in range(count)]
        tracemalloc.start()
        share_of(terms, helper="helper-0", members=names(count), seeds=seeds, draw=no_noise)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    accumulator = 4 << 20
    assert max(peaks.values()) < accumulator + 3 * CHUNK_BYTES
    assert abs(peaks[60] - peaks[2]) < 100_000


def test_a_leader_holds_one_accumulator_whatever_n() -> None:
    import tracemalloc

    terms = sum_terms(length=1 << 18, bound=10, most=1000)
    zero = from_numpy(np.zeros(terms.length, np.uint32))
    boxes = (b"a", b"b")
    peaks = {}
    for count in (2, 60):
        team = names(count)
        tracemalloc.start()
        leader = LeaderSum(terms, asked=team)
        for name in team:
            message = contribution_of(terms, np.zeros(0, np.uint32), ())
            message = type(message)(session=terms.session, masked=zero, boxes=boxes, seconds=0.0)
            leader.contribute(name, message)
            for helper in terms.helpers:
                leader.checked(helper, SumSeedsChecked(session=terms.session, accepted=(name,), rejected=()))
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert max(peaks.values()) < (1 << 20) + 100_000
    assert abs(peaks[60] - peaks[2]) < 50_000


def test_the_tail_is_that_of_the_sampler() -> None:
    """Terms are checked without NumPy, so the bound is written down twice: here they agree, but for ln 2's digits."""
    for sigma_squared, length, aggregators in ((1, 1, 2), (1 << 40, 10_000, 4), (12_345, 1 << 28, 3)):
        mine = noise_tail(noise_of(sigma_squared), aggregators=aggregators, length=length)
        theirs = noise_bound(sigma_squared, length, aggregators)
        assert abs(mine - theirs) <= 2 + theirs // 10_000
