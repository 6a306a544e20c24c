"""Secure sums are exact, and none of the parties gets anywhere by sending something else.

What each party could send instead, and the test that it gets nowhere:

contributor, a vector of another dtype or length, too few boxes, garbage in a box, another session, a seed under other
    terms (other noise)                 -> test_malformed_contributions_are_excluded_by_name
contributor, twice, or after the cut    -> test_duplicates_and_latecomers_change_nothing
contributor, entries beyond the bound   -> test_an_honest_contributor_refuses_what_does_not_fit; one that lies shifts
    the sum: poisoning, which SECURITY.md states
stranger, a contribution                -> test_a_stranger_is_not_taken
leader, a second cut, a member fewer; seeds after the cut
                                        -> test_one_cut_is_answered_and_no_other
leader, a cut below the minimum or the helper's policy; members without a seed, strangers, doubles
                                        -> test_cuts_that_a_helper_refuses
leader, other terms for a session (no noise, a smaller minimum), to the helper or between parties
                                        -> test_terms_do_not_change, test_a_seed_is_good_under_its_own_terms_only
leader, terms that wrap                 -> test_terms_that_wrap_are_refused_by_everybody
helper, a share of another set, dtype, length or session, or a second one
                                        -> test_shares_that_are_not_taken
helper, silence                         -> test_without_one_share_there_is_no_sum
helper, "rejected" for an honest seed   -> test_a_helper_can_exclude_but_by_name
leader and all helpers but one together -> test_what_the_leader_sees_is_uniform
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_sums import (
    Circle,
    Helper,
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
from sordino_common.aggregate.helper import HelperSum, SumAnswered
from sordino_common.aggregate.leader import LeaderSum, NotTaken
from sordino_common.aggregate.masks import CHUNK_BYTES, add_mask, add_noise, mask_info
from sordino_common.aggregate.seeds import read_seed, seed_plaintext
from sordino_common.aggregate.shares import share_of
from sordino_common.aggregate.terms import check_terms, choose_bits, largest_sum, noise_tail
from sordino_common.aggregate.wide import LIMB_BOUND, joined, limbs
from sordino_common.errors import CodecError, ConfigError, LimitExceeded, LocalError, PolicyRefusal, RemoteError
from sordino_common.messages import RejectedSeed, SumCut, SumSeedsChecked, SumShare
from sordino_common.messages.sums import members_digest
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


# --- contributors ------------------------------------------------------------------------------------------------


def test_an_honest_contributor_refuses_what_does_not_fit() -> None:
    terms = sum_terms(bound=1000)
    for value in (1001, -1001, np.iinfo(np.int64).min):
        x = np.zeros(7, np.int64)
        x[3] = value
        with pytest.raises(LimitExceeded, match="is beyond the bound that the terms of the sum state; a larger bound"):
            mask(x, terms, contributor="agent-00000")
    for x in (np.zeros(8, np.int64), np.zeros(7, np.float64), np.zeros((7, 1), np.int64)):
        with pytest.raises(LocalError, match=r"expected int64\[7\]"):
            mask(x, terms, contributor="agent-00000")  # type: ignore[arg-type]


def test_malformed_contributions_are_excluded_by_name() -> None:
    terms = sum_terms(minimum=3, most=12)
    circle = Circle(terms, names(12))
    x = vectors(12, 7, bound=1000)
    good = {name: circle.contribution(name, x[k]) for k, name in enumerate(circle.asked)}
    other = sum_terms(minimum=3, most=12, noise=noise_of(1))
    with_other_terms = mask(x[5], other, contributor=circle.asked[5])
    words = np.zeros(7, np.uint32)
    seeds = [bytes(32), bytes(32)]
    bad = {
        0: (contribution_of(terms, np.zeros(7, np.uint64), seeds), r"uint64\[7\], expected uint32\[7\]"),
        1: (contribution_of(terms, np.zeros(8, np.uint32), seeds), r"uint32\[8\], expected"),
        2: (contribution_of(terms, np.zeros((7, 1), np.uint32), seeds), r"uint32\[7, 1\], expected"),
        3: (contribution_of(terms, words, seeds[:1]), "1 sealed seeds for 2 helpers"),
        4: (contribution_of(sum_terms(session=bytes(16)), words, seeds), "to another sum"),
        5: (
            contribution_of(other, with_other_terms.words, [seed.expose() for seed in with_other_terms.seeds]),
            "helper helper-0 rejects its seed: the seed was sealed under other terms",
        ),
        6: (contribution_of(terms, words, [bytes(31), bytes(32)]), "holds 63 bytes, expected 64"),
    }
    for k, name in enumerate(circle.asked):
        circle.give(name, bad[k][0] if k in bad else good[name])
    total = circle.finish()
    np.testing.assert_array_equal(total, x[7:].sum(axis=0))
    assert circle.leader.members == tuple(circle.asked[7:])
    assert set(circle.leader.excluded) == set(circle.asked[:7])
    for k, (_, why) in bad.items():
        with pytest.raises(AssertionError, match=why):
            raise AssertionError(circle.leader.excluded[circle.asked[k]])


def test_a_stranger_is_not_taken() -> None:
    circle = Circle(sum_terms(), names(3))
    x = vectors(3, 7, bound=1000)
    why = circle.give("mallory", circle.contribution("mallory", x[0]))
    assert why == "was not asked to contribute to this sum"
    assert "mallory" not in circle.leader.excluded  # anybody could fill that list
    for k, name in enumerate(circle.asked):
        circle.give(name, circle.contribution(name, x[k]))
    np.testing.assert_array_equal(circle.finish(), x.sum(axis=0))


def test_duplicates_and_latecomers_change_nothing() -> None:
    circle = Circle(sum_terms(), names(4))
    x = vectors(4, 7, bound=1000)
    for k, name in enumerate(circle.asked[:3]):
        circle.give(name, circle.contribution(name, x[k]))
    again = circle.give("agent-00000", circle.contribution("agent-00000", x[3], seed=1))
    assert again == "a second contribution: the first one counts"
    assert "agent-00000" not in circle.leader.excluded
    cut = circle.leader.cut()
    late = circle.give("agent-00003", circle.contribution("agent-00003", x[3]))
    assert late == "too late: the set of contributors was fixed"
    assert circle.leader.excluded == {"agent-00003": late}
    for name, helper in circle.helpers.items():
        circle.leader.share(name, helper.answer(cut))
    np.testing.assert_array_equal(circle.leader.result(no_noise), x[:3].sum(axis=0))
    with pytest.raises(LocalError, match="no result yet"):
        circle.leader.result(no_noise)


def test_vectors_that_wait_are_bounded() -> None:
    terms = sum_terms(length=1000)
    leader = LeaderSum(terms, asked=names(10), waiting_bytes=3 * 4000)
    circle = Circle(terms, names(10))
    for k, name in enumerate(circle.asked):
        message = circle.contribution(name, np.full(1000, k, np.int64))
        if k < 3:
            leader.contribute(name, message)
        else:
            with pytest.raises(NotTaken, match="no room: 3 vectors wait for the helpers"):
                leader.contribute(name, message)
    for helper in terms.helpers:  # once they are added there is room again
        leader.checked(helper, SumSeedsChecked(session=terms.session, accepted=tuple(names(3)), rejected=()))
    assert leader.added == frozenset(names(3))
    assert not leader.waiting


def test_who_waits_at_the_cut_is_excluded() -> None:
    circle = Circle(sum_terms(), names(3))
    x = vectors(3, 7, bound=1000)
    for k, name in enumerate(circle.asked[:2]):
        circle.give(name, circle.contribution(name, x[k]))
    boxes = circle.leader.contribute("agent-00002", circle.contribution("agent-00002", x[2]))
    helper = circle.helpers["helper-0"]
    circle.leader.checked("helper-0", helper.check({"agent-00002": boxes["helper-0"]}))
    assert circle.leader.waiting == {"agent-00002"}
    np.testing.assert_array_equal(circle.finish(), x[:2].sum(axis=0))
    assert circle.leader.excluded == {"agent-00002": "helper helper-1 had not confirmed its seed at the cut"}


# --- leaders -----------------------------------------------------------------------------------------------------


def opened(count: int = 4, **changes: object) -> tuple[Helper, list[str]]:
    """A helper that holds `count` seeds."""
    terms = sum_terms(**changes)
    helper = Helper("helper-0", terms, frozenset(names(count + 2)))
    for name in names(count):
        helper.sum.accept(name, Seed(seeded(len(name))(32)))
    return helper, names(count)


def test_one_cut_is_answered_and_no_other() -> None:
    helper, team = opened()
    session = helper.terms.session
    helper.answer(SumCut(session=session, members=tuple(team)))
    for members in (team, team[:3], team[1:], team[:2]):
        with pytest.raises(SumAnswered, match="answered before; a helper answers once"):
            helper.answer(SumCut(session=session, members=tuple(members)))
    with pytest.raises(SumAnswered, match="after the cut"):
        helper.sum.accept("agent-00009", Seed(bytes(32)))


@pytest.mark.parametrize(
    ("members", "error", "text"),
    [
        ([0], PolicyRefusal, "a sum of 1 contributors: the terms say at least 2, this helper's policy.min_cohort 3"),
        ([0, 1], PolicyRefusal, "this helper's policy.min_cohort 3"),
        ([0, 1, 4], CodecError, "no seed was taken from agent-00004"),
        ([0, 1, 7], CodecError, "not in the roster as owners of data: agent-00007"),
        ([0, 1, 1], CodecError, "ascending order, each once"),
        ([1, 0, 2], CodecError, "ascending order"),
    ],
)
def test_cuts_that_a_helper_refuses(members: list[int], error: type[RemoteError], text: str) -> None:
    helper, team = opened()
    chosen = [names(10)[k] for k in members]
    for _ in range(2):
        with pytest.raises(error, match=text):
            helper.sum.cut(chosen, at_least=3, roster=helper.roster)
    assert len(helper.sum.cut(team, at_least=3, roster=helper.roster)) == 4  # a refusal changes nothing


def test_the_terms_minimum_counts_too() -> None:
    helper, team = opened(minimum=4)
    with pytest.raises(PolicyRefusal, match="the terms say at least 4"):
        helper.sum.cut(team[:3], at_least=2, roster=helper.roster)


def test_more_than_the_terms_allow_are_not_taken() -> None:
    helper, _ = opened(4, most=4)
    with pytest.raises(CodecError, match="as many seeds are here"):
        helper.sum.accept("agent-00005", Seed(bytes(32)))


def test_a_cut_on_the_wire_is_in_order() -> None:
    with pytest.raises(CodecError, match="ascending order, each once"):
        SumCut(session=bytes(16), members=("b", "a"))


def test_terms_do_not_change() -> None:
    helper, _ = opened(noise=noise_of(4))
    helper.sum.require_same(sum_terms(noise=noise_of(4)))
    for terms in (sum_terms(), sum_terms(noise=noise_of(3)), sum_terms(noise=noise_of(4), minimum=3)):
        with pytest.raises(CodecError, match="a sum's terms do not change"):
            helper.sum.require_same(terms)
    with pytest.raises(CodecError, match="helper-9 is not among the helpers"):
        HelperSum(sum_terms(), helper="helper-9")


def test_a_seed_is_good_under_its_own_terms_only() -> None:
    """A leader that shows a helper terms without the noise, or with a smaller minimum, gets no seed accepted."""
    noisy = sum_terms(noise=noise_of(100), minimum=5)
    box = seed_plaintext(bytes(range(32)), noisy)
    assert read_seed(box, noisy.digest).expose() == bytes(range(32))
    for terms in (sum_terms(minimum=5), sum_terms(noise=noise_of(100)), sum_terms(noise=noise_of(99), minimum=5)):
        with pytest.raises(CodecError, match="sealed under other terms"):
            read_seed(box, terms.digest)


# --- helpers -----------------------------------------------------------------------------------------------------


def test_shares_that_are_not_taken() -> None:
    circle = Circle(sum_terms(), names(3))
    x = vectors(3, 7, bound=1000)
    for k, name in enumerate(circle.asked):
        circle.give(name, circle.contribution(name, x[k]))
    leader, terms = circle.leader, circle.terms
    early = SumShare(session=terms.session, members=bytes(32), share=from_numpy(np.zeros(7, np.uint32)))
    with pytest.raises(NotTaken, match="before the set of contributors was fixed"):
        leader.share("helper-0", early)
    cut = leader.cut()
    good = circle.helpers["helper-0"].answer(cut)
    fields = {"session": good.session, "members": good.members, "share": good.share}
    for changes, who, text in (
        ({"session": bytes(16)}, "helper-0", "another sum"),
        ({}, "helper-7", "another sum"),
        ({"members": members_digest(cut.members[:2])}, "helper-0", "another set of contributors"),
        ({"share": from_numpy(np.zeros(8, np.uint32))}, "helper-0", r"uint32\[8\], expected uint32\[7\]"),
        ({"share": from_numpy(np.zeros(7, np.uint64))}, "helper-0", r"uint64\[7\], expected uint32\[7\]"),
    ):
        with pytest.raises(NotTaken, match=text):
            leader.share(who, SumShare(**{**fields, **changes}))  # type: ignore[arg-type]
    leader.share("helper-0", good)
    with pytest.raises(NotTaken, match="a second share"):
        leader.share("helper-0", good)
    leader.share("helper-1", circle.helpers["helper-1"].answer(cut))
    np.testing.assert_array_equal(leader.result(no_noise), x.sum(axis=0))


def test_without_one_share_there_is_no_sum() -> None:
    circle = Circle(sum_terms(), names(3))
    for name in circle.asked:
        circle.give(name, circle.contribution(name, np.ones(7, np.int64)))
    cut = circle.leader.cut()
    circle.leader.share("helper-1", circle.helpers["helper-1"].answer(cut))
    assert circle.leader.missing_shares == ("helper-0",)
    with pytest.raises(LocalError, match="shares are missing of helper-0"):
        circle.leader.result(no_noise)


def test_a_helper_can_exclude_but_by_name() -> None:
    circle = Circle(sum_terms(), names(3))
    x = vectors(3, 7, bound=1000)
    for k, name in enumerate(circle.asked[:2]):
        circle.give(name, circle.contribution(name, x[k]))
    circle.leader.contribute("agent-00002", circle.contribution("agent-00002", x[2]))
    lie = RejectedSeed(name="agent-00002", reason="I say so")
    circle.leader.checked("helper-1", SumSeedsChecked(session=circle.terms.session, accepted=(), rejected=(lie,)))
    # too late to take anything back from those who are in
    back = RejectedSeed(name="agent-00000", reason="I changed my mind")
    circle.leader.checked("helper-1", SumSeedsChecked(session=circle.terms.session, accepted=(), rejected=(back,)))
    assert circle.leader.excluded == {"agent-00002": "helper helper-1 rejects its seed: I say so"}
    with pytest.raises(CodecError, match="seeds of another sum"):
        circle.leader.checked("helper-9", SumSeedsChecked(session=circle.terms.session, accepted=(), rejected=()))
    np.testing.assert_array_equal(circle.finish(), x[:2].sum(axis=0))


def test_too_few_are_no_sum() -> None:
    circle = Circle(sum_terms(minimum=3), names(4))
    for name in circle.asked[:2]:
        circle.give(name, circle.contribution(name, np.ones(7, np.int64)))
    with pytest.raises(LocalError, match="2 contributions, the terms say at least 3"):
        circle.leader.cut()


# --- what the leader sees ------------------------------------------------------------------------------------------

SCORE = 6.1  # the normal tail beyond 6.1 is 5.3e-10; with fewer than 100 tables a test, false alarms stay below 1e-7


def score(words: np.ndarray) -> float:
    """Chi-square of the words' bytes against uniform, the worst byte position, as a standard normal score
    (Wilson-Hilferty: the cube root of X / k is normal with mean 1 - 2/(9k) and variance 2/(9k))."""
    raw = np.ascontiguousarray(words).view(np.uint8).reshape(-1, words.dtype.itemsize)
    worst = -math.inf
    for position in range(raw.shape[1]):
        counts = np.bincount(raw[:, position], minlength=256)
        expected = len(raw) / 256
        statistic = float(((counts - expected) ** 2 / expected).sum())
        spread = 2 / (9 * 255)
        worst = max(worst, ((statistic / 255) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))
    return worst


def views(bad: str = "") -> dict[str, np.ndarray]:
    """What a leader sees that works together with helper-1, of 8 contributors that send the largest vector there is, in
    two sums: masked vectors without helper-1's mask, their differences between contributors and between sums."""
    seen: dict[tuple[int, int], np.ndarray] = {}
    for index in range(2):
        terms = sum_terms(length=20_000, bits=32, bound=1 << 20, most=8, session=bytes([index] * 16), index=index)
        digest = bytes(32) if bad == "same key in two sums" else terms.digest
        for k, name in enumerate(names(8)):
            x = np.full(20_000, 1 << 20, np.int64)
            random = seeded(1 + k + 8 * index)
            if bad == "":
                masked = mask(x, terms, contributor=name, random=random)
                words, seeds = masked.words.copy(), masked.seeds
            else:
                words = x.astype(np.uint32)
                seeds = (Seed(random(32)), Seed(random(32)))
                if bad == "same seed for all":
                    seeds = (Seed(bytes(32)), seeds[1])
                if bad == "same key in two sums":
                    seeds = (Seed(bytes([k] * 32)), seeds[1])
                who = "" if bad == "same seed for all" else name
                if bad != "no mask of the honest helper":
                    add_mask(words, terms, seeds[0], mask_info(digest, who, "helper-0"), negative=True)
                add_mask(words, terms, seeds[1], mask_info(terms.digest, name, "helper-1"), negative=True)
            add_mask(words, terms, seeds[1], mask_info(terms.digest, name, "helper-1"))
            if bad == "folded to 8 bits":
                words &= np.uint32(0xFFFFFF)
            seen[index, k] = words
    return {
        "masked vectors": np.concatenate(list(seen.values())),
        "differences between contributors": np.concatenate([seen[0, k] - seen[0, k + 1] for k in range(7)]),
        "differences between sums": np.concatenate([seen[0, k] - seen[1, k] for k in range(8)]),
    }


def test_what_the_leader_sees_is_uniform() -> None:
    """With all helpers but one colluding. The vectors are constant, as far from uniform as can be."""
    for what, words in views().items():
        assert score(words) < SCORE, what


@pytest.mark.parametrize(
    ("bad", "caught_by"),
    [
        ("no mask of the honest helper", "masked vectors"),
        ("folded to 8 bits", "masked vectors"),
        ("same seed for all", "differences between contributors"),
        ("same key in two sums", "differences between sums"),
    ],
)
def test_bad_masks_are_seen(bad: str, caught_by: str) -> None:
    assert score(views(bad)[caught_by]) > SCORE


def test_without_helpers_who_collude_the_whole_vector_is_uniform() -> None:
    terms = sum_terms(length=50_000, bits=64, bound=1 << 20, most=8)
    y = [
        mask(np.zeros(50_000, np.int64), terms, contributor=name, random=seeded(k)).words
        for k, name in enumerate(names(4))
    ]
    assert score(np.concatenate(y)) < SCORE


def test_a_seed_used_twice_gives_two_masks() -> None:
    """Misuse that the key's label forgives: one seed for two helpers, two contributors, or two sums."""
    terms = sum_terms(length=64)
    seed = Seed(bytes(32))
    masks = []
    for digest, who, helper in (
        (terms.digest, "a", "h"),
        (terms.digest, "a", "i"),
        (terms.digest, "b", "h"),
        (sum_terms(index=9).digest, "a", "h"),
    ):
        words = np.zeros(64, np.uint32)
        add_mask(words, terms, seed, mask_info(digest, who, helper))
        masks.append(words.tobytes())
    assert len(set(masks)) == 4


def test_nothing_secret_is_in_a_repr() -> None:
    terms = sum_terms()
    masked = mask(np.ones(7, np.int64), terms, contributor="agent-00000")
    assert repr(masked) == "Masked(uint32[7], 2 seeds, hidden)"
    helper, _ = opened()
    assert repr(helper.sum) == "HelperSum(4 seeds, hidden)"
    assert "hidden" in repr(masked.seeds[0])


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
