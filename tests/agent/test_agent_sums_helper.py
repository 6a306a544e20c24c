"""What an agent as a helper refuses: second answers, other terms, boxes that are not for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers_agent import Bench, bench
from helpers_channel import device
from helpers_sum_agents import HELPS, OWNERS, ROSTER, fleet, helper, terms
from helpers_sums import noise_of
from sordino_agent.aggregate.journal import SumJournal
from sordino_agent.policy import Limits, Policy
from sordino_common import messages as m
from sordino_common.aggregate.helper import SumAnswered
from sordino_common.aggregate.seeds import seed_plaintext
from sordino_common.channel.roster import Roster
from sordino_common.channel.sealed_box import open_box, seal_box
from sordino_common.errors import SordinoError


def box(
    name: str = "pi-0",
    *,
    to: str = "helper-0",
    under: m.SumTerms | None = None,
    place: m.SumTerms | None = None,
    people: Roster = ROSTER,
    seed: bytes = bytes(range(32)),
) -> m.SealedSeed:
    """A seed of `name`, sealed under the terms `under`, in the place (session, index) of `place`."""
    under = under or terms()
    place = place or under
    sealed = seal_box(
        seed_plaintext(seed, under), identity=device(name), sender=people.entry(name), receiver=people.entry(to),
        session=place.session, round=place.index, kind="seed",
    )  # fmt: skip
    return m.SealedSeed(name=name, box=sealed)


def seeds(*boxes: m.SealedSeed, under: m.SumTerms | None = None) -> m.SumSeeds:
    return m.SumSeeds(terms=under or terms(), seeds=boxes)


def filled(count: int = 4, *, under: m.SumTerms | None = None, **more: object) -> Bench:
    """A helper with seeds of the first `count` owners."""
    made = helper(**more)  # type: ignore[arg-type]
    reply = made.ask(seeds(*(box(name, under=under) for name in OWNERS[:count]), under=under))
    assert isinstance(reply, m.SumSeedsChecked), reply
    assert reply.accepted == OWNERS[:count]
    return made


def cut(*members: str, session: bytes | None = None) -> m.SumCut:
    return m.SumCut(session=session or terms().session, members=members)


def refusal(made: Bench, message: m.Message) -> str:
    refused = made.ask(message)
    assert isinstance(refused, m.Refused), refused
    return f"{refused.code}: {refused.reason}"


def test_a_second_answer_for_a_session_is_refused() -> None:
    made = filled(5)
    assert isinstance(made.ask(cut(*OWNERS)), m.SumShare)
    for members in (OWNERS, OWNERS[:4], OWNERS[1:], OWNERS[:3]):  # sets that differ in one device, and the same set
        assert "sum-answered" in refusal(made, cut(*members))
    late = made.ask(seeds(box("pi-0")))
    assert isinstance(late, m.SumSeedsChecked)
    assert late.rejected[0].reason == "the seed comes after the cut"


def test_a_second_answer_is_refused_after_a_restart_too(tmp_path: Path) -> None:
    path = tmp_path / "sums.sqlite"
    journal = SumJournal(path)
    made = filled(5, journal=journal)
    assert isinstance(made.ask(cut(*OWNERS)), m.SumShare)
    journal.close()
    again = helper(journal=SumJournal(path))
    assert "unknown-session" in refusal(again, cut(*OWNERS[:4]))
    assert "sum-answered: sum 3 of run toy-1 was answered" in refusal(again, seeds(*(box(name) for name in OWNERS)))
    # nor under another session for the same sum of the run
    other = terms(session=bytes(16))
    text = refusal(again, seeds(*(box(name, under=other) for name in OWNERS), under=other))
    assert "sum-answered" in text
    # the next sum is another matter
    following = terms(session=bytes(16), index=4)
    reply = again.ask(seeds(*(box(name, under=following) for name in OWNERS), under=following))
    assert isinstance(reply, m.SumSeedsChecked)
    assert isinstance(again.ask(cut(*OWNERS, session=bytes(16))), m.SumShare)


def test_the_journal_is_written_before_the_share_is_computed(tmp_path: Path) -> None:
    """kill -9 between the two: the answer never left, and never will."""
    path = tmp_path / "sums.sqlite"
    made = filled(5, journal=SumJournal(path))
    correlation = made.tell(cut(*OWNERS))  # the task waits for its turn of the loop
    assert not made.answers(correlation)
    with pytest.raises(SumAnswered):
        SumJournal(path).require_unanswered(terms())


def test_a_refused_cut_is_not_journalled() -> None:
    made = filled(4)
    assert "no seed was taken from pi-4" in refusal(made, cut(*OWNERS))
    assert "policy: a sum of 2 contributors" in refusal(made, cut(*OWNERS[:2]))
    assert isinstance(made.ask(cut(*OWNERS[:4])), m.SumShare)


def test_two_sessions_for_one_sum_of_a_run_are_not_held_side_by_side() -> None:
    made = filled(3)
    other = terms(session=bytes(16))
    assert "take the next index" in refusal(made, seeds(box("pi-0", under=other), under=other))


def test_terms_of_a_session_do_not_change() -> None:
    noisy = terms(noise=noise_of(100))
    made = filled(3, under=noisy)
    assert "a sum's terms do not change" in refusal(made, seeds(box("pi-3")))


HELPER_REFUSES: dict[str, tuple[dict[str, object], Policy, Roster, str]] = {
    "does not help": ({}, Policy(), ROSTER, "policy: jobs of kind `help` are not served here"),
    "lost the role": ({}, HELPS, fleet(helper_0={"roles": ("data",)}), "helper-0 has the roles data"),
    "not among the helpers": ({"helpers": ("helper-1",)}, HELPS, ROSTER, "helper-0 is not among the helpers"),
    "a small cohort": ({"minimum": 2}, HELPS, ROSTER, "this device demands 3 (policy.min_cohort)"),
    "words that wrap": ({"bound": 1 << 30}, HELPS, ROSTER, "let it wrap"),
    "too large": ({"length": 1 << 25, "bound": 5}, HELPS, ROSTER, "limits.payload_bytes on the device is"),
}


@pytest.mark.parametrize("case", HELPER_REFUSES, ids=str)
def test_terms_under_which_a_helper_does_not_help(case: str) -> None:
    changes, policy, people, text = HELPER_REFUSES[case]
    under = terms(**changes)
    made = helper(policy=policy, roster=people)
    assert text in refusal(made, seeds(box("pi-0"), under=under))
    assert made.core.running == ()


REJECTED: dict[str, tuple[Callable[[], m.SealedSeed], str]] = {
    "garbage": (lambda: m.SealedSeed(name="pi-0", box=b"garbage"), "CBOR"),
    "of another sender": (
        lambda: m.SealedSeed(name="pi-1", box=box("pi-0").box), "signature does not verify",
    ),
    "for another helper": (lambda: box("pi-0", to="helper-1"), "signature does not verify"),
    "of another session": (lambda: box("pi-0", place=terms(session=bytes(16))), "signature does not verify"),
    "of another index": (lambda: box("pi-0", place=terms(index=9)), "signature does not verify"),
    "under other terms": (lambda: box("pi-0", under=terms(noise=noise_of(5))), "sealed under other terms"),
    "of the other helper, who owns no data": (lambda: box("helper-1"), "is no owner of data"),
    "of somebody who is not in the roster": (
        lambda: m.SealedSeed(name="mallory", box=box("pi-0").box), "is no owner of data",
    ),
    "too short": (lambda: box("pi-0", seed=bytes(31)), "holds 63 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED, ids=str)
def test_boxes_that_a_helper_rejects(case: str) -> None:
    make, text = REJECTED[case]
    made = helper()
    reply = made.ask(seeds(make(), box("pi-2")))
    assert isinstance(reply, m.SumSeedsChecked)
    assert reply.accepted == ("pi-2",)
    (rejected,) = reply.rejected
    assert text in rejected.reason


def test_a_second_seed_of_one_owner_is_rejected() -> None:
    reply = filled(3).ask(seeds(box("pi-0", seed=bytes(32))))
    assert isinstance(reply, m.SumSeedsChecked)
    assert reply.rejected[0].reason == "a second seed of pi-0: the first one counts"


def test_only_the_server_leads() -> None:
    made = filled(5)
    refused = made.ask(cut(*OWNERS), sender="pi-3")
    assert isinstance(refused, m.Refused)
    assert "commands are taken from 'server' only" in refused.reason
    assert isinstance(made.ask(cut(*OWNERS)), m.SumShare)


def test_a_busy_helper_has_not_answered() -> None:
    """Room is looked for before the journal is written: the cut may be asked again."""
    made = bench(policy=HELPS, name="helper-0", identity=device("helper-0"), limits=Limits(queue=1))
    made.core.on_roster(ROSTER)
    reply = made.ask(seeds(*(box(name) for name in OWNERS)))
    assert isinstance(reply, m.SumSeedsChecked)
    waiting = made.core._desk._pending
    waiting[0] = None  # type: ignore[assignment]  # somebody else's task
    made.tell(cut(*OWNERS))
    assert isinstance(made.outbox.sent[-1][1], m.Refused)
    assert made.outbox.sent[-1][1].code == "busy"
    del waiting[0]
    assert isinstance(made.ask(cut(*OWNERS)), m.SumShare)


def test_sums_are_bounded_and_forgotten_with_their_run() -> None:
    made = helper()
    for k in range(12):
        one = terms(session=bytes([k] * 16), index=k)
        assert isinstance(made.ask(seeds(box("pi-0", under=one), under=one)), m.SumSeedsChecked)
    assert len(made.core.running) == 8
    assert "unknown-session" in refusal(made, cut(*OWNERS, session=bytes(16)))
    made.tell(m.Cancel(run="toy-1", round=None))
    assert made.core.running == ()


def test_a_share_is_opened_by_nobody_but_its_helper() -> None:
    sealed = box("pi-0")
    with pytest.raises(SordinoError):
        open_box(
            sealed.box, identity=device("helper-1"), roster=ROSTER, sender="pi-0", receiver="helper-1",
            session=terms().session, round=terms().index, kind="seed",
        )  # fmt: skip
