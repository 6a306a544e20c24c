"""Secure sums at the agent: contributors and helpers with their real keys, boxes, policies, journal and worker's work.

The server of these tests is a `LeaderSum`, or an attacker. What it could send instead is at `test_aggregate.py`'s head;
here is what the daemon adds: policy, roster, boxes, journal, budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from helpers_agent import (
    EVALUATE_PLAN,
    SERVER,
    TRAIN_PLAN,
    Bench,
    bench,
    data_ref,
    evaluate_command,
    small_table,
    train_command,
    zero_params,
)
from helpers_channel import device, entry, roster
from helpers_sum_fleet import lead
from helpers_sums import noise_of, sum_terms
from sordino_agent.aggregate.contribute import Unmetered
from sordino_agent.aggregate.journal import SumJournal
from sordino_agent.aggregate.tasks import ShareFacts, ShareTask, SumFacts, SumMetricsTask, SumUpdateTask
from sordino_agent.aggregate.work import fixed_point, flat, update_vector
from sordino_agent.budget import BudgetSpec
from sordino_agent.ledger import Ledger
from sordino_agent.policy import Limits, Policy
from sordino_agent.tasks import (
    Done,
    TrainFacts,
    decode_outcome,
    decode_task,
    encode_outcome,
    encode_task,
)
from sordino_common import messages as m
from sordino_common.aggregate.helper import SumAnswered
from sordino_common.aggregate.seeds import seed_plaintext
from sordino_common.aggregate.wide import EXTRAS, ROWS_LIMBS, joined
from sordino_common.channel.roster import Roster
from sordino_common.channel.sealed_box import open_box, seal_box
from sordino_common.errors import BudgetRefused, LimitExceeded, SordinoError
from sordino_common.plan.arrays import from_numpy, to_numpy
from sordino_common.plan.plan import plan_id
from sordino_common.privacy.grid import norm_squared
from sordino_common.privacy.grid_bound import grid_bound

OWNERS = tuple(f"pi-{k}" for k in range(5))
HELPERS = ("helper-0", "helper-1")
LENGTH = 4 + EXTRAS  # w [3, 1], b [1]
POLICY = Policy(jobs=("describe", "train", "evaluate", "aggregate"), plans="any", min_rows=2, min_cohort=3)
HELPS = Policy(jobs=("help",), min_cohort=3)


def fleet(**changes: dict[str, object]) -> Roster:
    """The server, five owners, two helpers in zones of their own. `changes`: fields of entries by name."""
    fields: dict[str, dict[str, object]] = {
        SERVER: {"roles": ("server",)},
        **{name: {"roles": ("data",)} for name in OWNERS},
        **{name: {"roles": ("helper",), "zone": f"zone-{k}"} for k, name in enumerate(HELPERS)},
    }
    for name, more in changes.items():
        fields.setdefault(name.replace("_", "-"), {}).update(more)
    return roster(entries=[entry(name, **more) for name, more in fields.items()])


ROSTER = fleet()


def owner(name: str = "pi-0", *, policy: Policy = POLICY, roster: Roster = ROSTER, **more: object) -> Bench:
    table = small_table(rows=40 + 10 * OWNERS.index(name), seed=OWNERS.index(name))
    made = bench(table, policy=policy, name=name, identity=device(name), **more)  # type: ignore[arg-type]
    made.core.on_roster(roster)
    for plan in (TRAIN_PLAN, EVALUATE_PLAN):
        assert isinstance(made.ask(m.PlanPut(plan=plan)), m.PlanReady)
    return made


def helper(
    name: str = "helper-0", *, policy: Policy = HELPS, roster: Roster = ROSTER, journal: SumJournal | None = None
) -> Bench:
    made = bench(policy=policy, name=name, identity=device(name), sums=journal)
    made.core.on_roster(roster)
    return made


def terms(**changes: object) -> m.SumTerms:
    fields: dict[str, object] = {"length": LENGTH, "bound": 1 << 26, "minimum": 3, "most": 5, "helpers": HELPERS}
    return sum_terms(**{**fields, **changes})


def update(**changes: object) -> m.SumUpdate:
    """As `train_command`, to be summed."""
    train = train_command()
    fields: dict[str, object] = {name: getattr(train, name) for name in train.__struct_fields__ if name != "run"}
    fields |= {"terms": terms(), "weight": "rows", "weight_unit": 80, "fraction_bits": 16, "clip": None}
    return m.SumUpdate(**{**fields, **changes})  # type: ignore[arg-type]


def metrics(**changes: object) -> m.SumMetrics:
    evaluate = evaluate_command()
    fields: dict[str, object] = {name: getattr(evaluate, name) for name in evaluate.__struct_fields__ if name != "run"}
    fields |= {"terms": terms(length=2, bits=64, bound=1 << 48), "fraction_bits": 20}
    return m.SumMetrics(**{**fields, **changes})  # type: ignore[arg-type]


def everybody() -> tuple[dict[str, Bench], dict[str, Bench]]:
    return {name: owner(name) for name in OWNERS}, {name: helper(name) for name in HELPERS}


# --- the way it should be ------------------------------------------------------------------------------------------


def test_a_sum_of_updates_is_that_of_the_plain_ones() -> None:
    owners, helpers = everybody()
    total, leader = lead(update(), owners=owners, helpers=helpers)
    plain = {name: made.ask(train_command()) for name, made in owners.items()}
    rows = loss = 0.0
    mean = np.zeros(4)
    for reply in plain.values():
        assert isinstance(reply, m.Trained)
        mean += flat(reply.update) * reply.rows
        rows += reply.rows
        loss += reply.loss_sum / reply.steps * reply.rows
    assert joined(total[4 : 4 + ROWS_LIMBS].tolist()) == rows == 30 + 40 + 50 + 60 + 70
    assert joined(total[4 + ROWS_LIMBS :].tolist()) / 2**20 == pytest.approx(loss, abs=5 * 2**-21)
    # Five roundings of half a unit; a unit is 2^-16 of an update with weight_unit rows.
    np.testing.assert_allclose(total[:4] / 2**16 * 80, mean, atol=5 * 0.5 * 2**-16 * 80, rtol=0)
    assert leader.members == OWNERS
    assert not leader.excluded


def test_a_sum_of_metrics_is_that_of_the_plain_ones() -> None:
    owners, helpers = everybody()
    total, _ = lead(metrics(), owners=owners, helpers=helpers)
    plain = [made.ask(evaluate_command()) for made in owners.values()]
    assert total[0] == 50
    assert total[1] / 2**20 == pytest.approx(sum(one.sums[0] for one in plain), abs=5 * 2**-21)  # type: ignore[attr-defined]


def test_nothing_of_one_device_is_in_the_clear() -> None:
    reply = owner().ask(update())
    assert isinstance(reply, m.Contribution)
    assert set(reply.__struct_fields__) == {"session", "masked", "boxes", "seconds"}
    again = owner().ask(update())
    assert isinstance(again, m.Contribution)
    assert reply.masked != again.masked  # the same update under fresh masks
    assert m.encode_message(reply) != m.encode_message(again)
    assert len(reply.boxes[0]) < 250


def test_a_clipped_update_is_on_the_grid_and_says_what_it_costs() -> None:
    facts = TrainFacts(
        rows=9, steps=2, update=(from_numpy(np.full((3, 1), 5.0, np.float32)), from_numpy(np.ones(1, np.float32))),
        loss_sum=1.0,
    )  # fmt: skip
    clip = m.SumClip(norm=0.5, grid_bits=10)
    command = update(terms=terms(length=4, noise=noise_of(7 << 20)), weight="one", clip=clip)
    vector, mechanism = update_vector(command, facts)
    assert mechanism is not None
    assert mechanism.unit == "device"
    assert (mechanism.sensitivity_squared, mechanism.sigma_squared) == (grid_bound(4, 10), 7 << 20)
    assert norm_squared(vector) <= grid_bound(4, 10)
    np.testing.assert_allclose(vector * 0.5 / 1024, 0.5 * np.array([5, 5, 5, 1]) / math.sqrt(76), atol=1e-3)
    without = update(terms=terms(length=4), weight="one", clip=clip)
    assert update_vector(without, facts)[1] is None


def test_a_clipped_update_that_diverges_is_zero_and_not_a_refusal() -> None:
    huge = tuple(from_numpy(np.full(array.shape, 1e30, np.float32)) for array in zero_params())
    clip = m.SumClip(norm=1.0, grid_bits=8)
    owners = {name: owner(name) for name in OWNERS[:3]}
    helpers = {name: helper(name) for name in HELPERS}
    command = update(params=huge, terms=terms(length=4), weight="one", clip=clip)
    total, _ = lead(command, owners=owners, helpers=helpers)
    assert total.tolist() == [0, 0, 0, 0]
    refused = owner().ask(update(params=huge))
    assert isinstance(refused, m.Refused)
    assert refused.code == "diverged"


def test_a_device_that_owns_rows_may_help_too() -> None:
    both = msgspec.structs.replace(POLICY, jobs=("describe", "aggregate", "help"))
    people = fleet(pi_0={"roles": ("data", "helper"), "zone": "zone-9"})
    owners = {name: owner(name, policy=both, roster=people) for name in OWNERS}
    command = update(terms=terms(helpers=("pi-0",)))
    total, _ = lead(command, owners=owners, helpers={"pi-0": owners["pi-0"]})
    assert joined(total[4 : 4 + ROWS_LIMBS].tolist()) == 250


def test_tasks_and_facts_pass_the_pipe() -> None:
    facts = SumFacts(masked=from_numpy(np.arange(4, dtype=np.uint32)), seeds=(bytes(32),))
    command = update(terms=terms(noise=noise_of(1 << 50)))
    for task in (
        SumUpdateTask(command=command, plan=b"plan", agent="pi-0", min_rows=2),
        SumMetricsTask(command=metrics(), plan=b"plan", agent="pi-0", min_rows=2),
        ShareTask(terms=command.terms, helper="helper-0", members=OWNERS, seeds=(bytes(32),) * 5),
    ):
        assert decode_task(encode_task(task)) == task
    mechanism = update_vector(
        update(terms=terms(length=4, noise=noise_of(1 << 50)), weight="one", clip=m.SumClip(norm=1.0, grid_bits=16)),
        TrainFacts(rows=9, steps=2, update=zero_params(), loss_sum=1.0),
    )[1]
    assert mechanism is not None
    for result in (
        facts,
        msgspec.structs.replace(facts, mechanisms=(mechanism,)),
        ShareFacts(share=from_numpy(np.arange(4, dtype=np.uint64))),
    ):
        assert decode_outcome(encode_outcome(Done(result=result, seconds=0.5))) == Done(result=result, seconds=0.5)
    assert "hidden" in repr(facts)
    assert "hidden" in repr(ShareTask(terms=terms(), helper="helper-0", members=OWNERS, seeds=(bytes(32),) * 5))


def test_fixed_point_refuses_what_it_can_t_hold() -> None:
    assert fixed_point(np.array([0.5, 1.5, -2.5, -0.25]), 1.0, "x").tolist() == [0, 2, -2, 0]
    for value in (2.0**53, math.inf, math.nan):
        with pytest.raises(LimitExceeded, match="x is too large for fixed point"):
            fixed_point(np.array([value]), 1.0, "x")


# --- what a contributor refuses ------------------------------------------------------------------------------------

CONTRIBUTOR_REFUSES: dict[str, tuple[dict[str, object], Policy, Roster, str, str]] = {
    "no aggregation here": (
        {},
        Policy(jobs=("describe", "train")),
        ROSTER,
        "policy",
        "jobs of kind `aggregate` are not served here",
    ),
    "not this dataset": (
        {},
        msgspec.structs.replace(POLICY, datasets={"toy": ("train",)}),
        ROSTER,
        "policy",
        "may not be used for `aggregate`",
    ),
    "another plan": ({}, msgspec.structs.replace(POLICY, plans=("00" * 32,)), ROSTER, "policy", "policy.plans"),
    "a small cohort": (
        {"minimum": 2},
        POLICY,
        ROSTER,
        "policy",
        "may be formed over 2 contributors; this device demands 3 (policy.min_cohort)",
    ),
    "one helper": (
        {"helpers": ("helper-0",)},
        msgspec.structs.replace(POLICY, min_helpers=2),
        ROSTER,
        "policy",
        "has 1 helper; this device demands 2 (policy.min_helpers)",
    ),
    "a stranger helps": (
        {"helpers": ("helper-0", "mallory")},
        POLICY,
        ROSTER,
        "roster",
        "mallory has no key in the roster of epoch 1",
    ),
    "an owner without the role helps": (
        {"helpers": ("pi-1",)},
        POLICY,
        ROSTER,
        "policy",
        "pi-1 has the roles data in the roster; a helper has the role helper",
    ),
    "the server helps": (
        {"helpers": ("server",)},
        POLICY,
        fleet(server={"roles": ("server", "helper")}),
        "policy",
        "and is not the server",
    ),
    "two helpers of one zone": (
        {},
        POLICY,
        fleet(helper_1={"zone": "zone-0"}),
        "policy",
        "helpers helper-0 and helper-1 stand in one zone, zone-0",
    ),
    "a helper in the server's zone": (
        {},
        POLICY,
        fleet(helper_1={"zone": "default"}),
        "policy",
        "helper helper-1 stands in the zone of the server server, default",
    ),
    "words that wrap": ({"bound": 1 << 30}, POLICY, ROSTER, "codec", "let it wrap"),
    "another length": ({"length": 40}, POLICY, ROSTER, "command", "has 11 entries, the terms of the sum say 40"),
    "a bound that does not fit": ({"bound": 100}, POLICY, ROSTER, "limit", "secure_aggregation.largest in the job"),
    "too large": (
        {"length": 1 << 25, "bound": 5},
        POLICY,
        ROSTER,
        "limit",
        "limits.payload_bytes on the device is",
    ),
}


@pytest.mark.parametrize("case", CONTRIBUTOR_REFUSES, ids=str)
def test_what_a_contributor_refuses(case: str) -> None:
    changes, policy, people, code, text = CONTRIBUTOR_REFUSES[case]
    made = bench(small_table(), policy=policy, name="pi-0", identity=device("pi-0"))
    made.core.on_roster(people)
    if policy.plans == "any":
        made.ask(m.PlanPut(plan=TRAIN_PLAN))
    refused = made.ask(update(terms=terms(**changes)))
    assert isinstance(refused, m.Refused)
    assert (refused.code, refused.command) == (code, "sum-update")
    assert text in refused.reason


def test_more_rows_than_the_weight_allows_are_refused() -> None:
    refused = owner().ask(update(weight_unit=29))
    assert isinstance(refused, m.Refused)
    assert "is of 30 rows, but weight_unit is 29" in refused.reason


def test_without_roster_or_key_nothing_is_contributed() -> None:
    made = bench(small_table(), policy=POLICY, name="pi-0", identity=device("pi-0"))
    refused = made.ask(update())
    assert isinstance(refused, m.Refused)
    assert "no roster was received yet" in refused.reason
    made = bench(small_table(), policy=POLICY, name="pi-0", identity=None)
    refused = made.ask(update())
    assert isinstance(refused, m.Refused)
    assert "without it" in refused.reason


def test_a_session_is_contributed_to_once() -> None:
    made = owner()
    assert isinstance(made.ask(update()), m.Contribution)
    refused = made.ask(update())
    assert isinstance(refused, m.Refused)
    assert refused.code == "conflict"
    assert isinstance(made.ask(update(terms=terms(session=bytes(16)))), m.Contribution)


def test_a_helper_that_loses_its_role_meanwhile_gets_no_seed() -> None:
    made = owner()
    correlation = made.tell(update())
    made.core.on_roster(fleet(helper_0={"roles": ("data",)}))
    while made.loop.step():
        pass
    (refused,) = made.answers(correlation)
    assert isinstance(refused, m.Refused)
    assert "helper-0 has the roles data" in refused.reason


@pytest.mark.parametrize("zone", ["default", "zone-1"])
def test_helpers_that_came_to_stand_together_meanwhile_get_no_seed(zone: str) -> None:
    made = owner()
    correlation = made.tell(update())
    made.core.on_roster(fleet(helper_0={"zone": zone}))
    while made.loop.step():
        pass
    (refused,) = made.answers(correlation)
    assert isinstance(refused, m.Refused)
    assert "stand" in refused.reason and f"zone{', zone-1' if zone == 'zone-1' else ' of the server'}" in refused.reason


@pytest.mark.parametrize(
    ("people", "changes", "text"),
    [
        (fleet(helper_0={"zone": "default"}), {}, "helper helper-0 stands in the zone of the server server, default"),
        (fleet(helper_1={"zone": "default"}), {}, "helper helper-1 stands in the zone of the server server, default"),
        (fleet(helper_1={"zone": "zone-0"}), {}, "helpers helper-0 and helper-1 stand in one zone, zone-0"),
        (ROSTER, {"helpers": ("helper-0", "pi-1")}, "pi-1 has the roles data in the roster"),
    ],
)
def test_a_helper_does_not_help_beside_the_server(people: Roster, changes: dict[str, object], text: str) -> None:
    seed = m.SealedSeed(name="pi-0", box=b"unopened")
    refused = helper(roster=people).ask(m.SumSeeds(terms=terms(**changes), seeds=(seed,)))
    assert isinstance(refused, m.Refused) and text in refused.reason


# --- the budget ----------------------------------------------------------------------------------------------------


class Purse(Unmetered):
    """Notes what is asked of it; raises at the step `fails`."""

    def __init__(self, made: Bench, *, fails: str = "") -> None:
        self.made = made
        self.fails = fails
        self.seen: list[str] = []

    def afford(self) -> None:
        self._do("afford")

    def charge(self, facts: SumFacts) -> None:
        (mechanism,) = facts.mechanisms
        self._do(f"charge {mechanism.sigma_squared}")

    def _do(self, what: str) -> None:
        contributions = [one for _, one, _ in self.made.outbox.sent if isinstance(one, m.Contribution)]
        assert not contributions, f"{what}: something has left already"
        self.seen.append(what)
        if self.fails and what.startswith(self.fails):
            raise BudgetRefused("dataset 'toy' can't afford it")


@pytest.mark.parametrize(("fails", "seen"), [("", 2), ("afford", 1), ("charge", 2)])
def test_a_contribution_is_paid_for_before_it_leaves(fails: str, seen: int) -> None:
    made = owner()
    purse = Purse(made, fails=fails)
    made.core.circle._allowance_of = lambda command: purse  # type: ignore[assignment]
    done = made.core.health().tasks_done
    clip = m.SumClip(norm=1.0, grid_bits=8)
    reply = made.ask(update(terms=terms(length=4, noise=noise_of(99)), weight="one", clip=clip))
    assert purse.seen == ["afford", "charge 99"][:seen]
    assert made.core.health().tasks_done == done + (not fails)
    if fails:
        assert isinstance(reply, m.Refused)
        assert reply.code == "budget"
        assert not any(isinstance(one, m.Contribution) for _, one, _ in made.outbox.sent)
    else:
        assert isinstance(reply, m.Contribution)


# --- what a helper refuses -----------------------------------------------------------------------------------------


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


def test_plans_of_the_commands_are_those_of_plain_training() -> None:
    assert update().plan_id == plan_id(TRAIN_PLAN)
    assert metrics().plan_id == plan_id(EVALUATE_PLAN)
    assert to_numpy(zero_params()[0]).shape == (3, 1)
    assert data_ref().split == "train"


def test_a_noised_update_is_charged_to_the_ledger_and_a_plain_one_meets_the_budget() -> None:
    ledger = Ledger(None, budgets={"toy": BudgetSpec(epsilon=3.0, delta=1e-5)})
    made = owner(ledger=ledger)
    refused = made.ask(update())
    assert isinstance(refused, m.Refused)
    assert refused.code == "budget"
    assert "`sum-update without noise` would show something of its rows without noise" in refused.reason
    clip = m.SumClip(norm=1.0, grid_bits=8)
    for k in range(2):  # σ = 2 Δ: one fits, two do not
        command = update(
            terms=terms(session=bytes([k] * 16), length=4, noise=noise_of(4 << 16)), weight="one", clip=clip
        )
        reply = made.ask(command)
        assert isinstance(reply, (m.Contribution, m.Refused)[k]), reply
    assert isinstance(reply, m.Refused)
    assert reply.code == "budget"
    (spent,) = ledger.entries()
    assert spent.charge.mechanism.sensitivity_squared == grid_bound(4, 8)
    assert (spent.charge.what, spent.charge.run, spent.charge.round) == ("sum-update", "toy-1", 1)


def test_sums_of_metrics_over_rows_with_a_budget_are_the_owners_choice() -> None:
    ledger = Ledger(None, budgets={"toy": BudgetSpec(epsilon=3.0, delta=1e-5)})
    refused = owner(ledger=ledger).ask(metrics())
    assert isinstance(refused, m.Refused)
    assert "policy.exact_evaluation: true" in refused.reason
    allows = msgspec.structs.replace(POLICY, exact_evaluation=True)
    assert isinstance(owner(ledger=ledger, policy=allows).ask(metrics()), m.Contribution)


# --- no refusal tells of rows for nothing --------------------------------------------------------------------------


def clipped(**changes: object) -> m.SumUpdate:
    fields: dict[str, object] = {
        "terms": terms(length=4, noise=noise_of(4 << 16)),
        "weight": "one",
        "clip": m.SumClip(norm=1.0, grid_bits=8),
    }
    return update(**{**fields, **changes})


def test_a_bound_below_the_clip_is_refused_before_the_work_without_a_word_about_rows() -> None:
    for bound in (1, 200, 256):
        made = owner(ledger=Ledger(None, budgets={}))
        reply = made.ask(clipped(terms=terms(length=4, bound=bound, noise=noise_of(4 << 16))))
        assert isinstance(reply, m.Refused)
        text = f"an update on a grid of 8 bits can reach 257, the terms of the sum say {bound}"
        assert (reply.code, reply.reason) == ("command", text)
    assert isinstance(owner().ask(clipped(terms=terms(length=4, bound=257, noise=noise_of(4 << 16)))), m.Contribution)
    reply = owner().ask(clipped(terms=terms(length=5, noise=noise_of(4 << 16))))
    assert isinstance(reply, m.Refused)
    assert "has 4 entries, the terms of the sum say 5" in reply.reason


def test_rows_that_overflow_as_the_server_scales_them_are_no_refusal_of_a_clipped_update() -> None:
    """Else the server bisects a column's largest value by its choice of the scale, and nobody pays."""
    ledger = Ledger(None, budgets={})
    made = owner(ledger=ledger)
    wild = msgspec.structs.replace(clipped().data, scale=(1e-300, 1.0, 1.0))
    assert isinstance(made.ask(clipped(data=wild)), m.Contribution)
    assert [one.charge.what for one in ledger.entries()] == ["sum-update"]
    plain = made.ask(update(data=wild))
    assert isinstance(plain, m.Refused)  # without a clip there is no promise


def test_the_least_noise_that_an_owner_demands_is_held_against_the_real_sensitivity() -> None:
    """On a coarse grid rounding makes vectors longer than the clip: 4^1 is not what one device can move the sum by."""
    coarse = m.SumClip(norm=1.0, grid_bits=1)
    assert grid_bound(4, 1) > 4
    strict = msgspec.structs.replace(POLICY, min_noise_multiplier=1.0)
    reply = owner(policy=strict).ask(clipped(terms=terms(length=4, noise=noise_of(4)), clip=coarse))
    assert isinstance(reply, m.Refused)
    assert "policy.min_noise_multiplier" in reply.reason
    enough = noise_of(grid_bound(4, 1))
    assert isinstance(
        owner(policy=strict).ask(clipped(terms=terms(length=4, noise=enough), clip=coarse)), m.Contribution
    )


def test_a_vector_beyond_the_bound_is_refused_without_its_size() -> None:
    reply = owner().ask(update(terms=terms(bound=1)))
    assert isinstance(reply, m.Refused)
    assert "beyond the bound" in reply.reason
    assert not any(letter.isdigit() for letter in reply.reason)
