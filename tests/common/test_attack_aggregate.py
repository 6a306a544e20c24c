"""None of the parties of a secure sum gets anywhere by sending something else.

What each party could send instead, and the test that it gets nowhere (here, in `test_aggregate.py` for terms that wrap,
in `test_aggregate_secrecy.py` for what is seen):

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

import numpy as np
import pytest

from helpers_sums import Circle, contribution_of, names, no_noise, noise_of, opened, sum_terms, vectors
from sordino_common.aggregate.contributor import mask
from sordino_common.aggregate.helper import HelperSum, SumAnswered
from sordino_common.aggregate.leader import LeaderSum, NotTaken
from sordino_common.aggregate.seeds import read_seed, seed_plaintext
from sordino_common.errors import CodecError, LimitExceeded, LocalError, PolicyRefusal, RemoteError
from sordino_common.messages import RejectedSeed, SumCut, SumSeedsChecked, SumShare
from sordino_common.messages.sums import members_digest
from sordino_common.plan.arrays import from_numpy
from sordino_common.ring.prg import Seed

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
