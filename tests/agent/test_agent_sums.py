"""Secure sums at the agent: contributors and helpers with their real keys, boxes, policies, journal and worker's work.

The server of these tests is a `LeaderSum`, or an attacker. What it could send instead is at the head of
`tests/common/test_attack_aggregate.py`; here is what the daemon adds: policy, roster, boxes, journal, budget.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from helpers_agent import EVALUATE_PLAN, TRAIN_PLAN, Bench, data_ref, evaluate_command, train_command, zero_params
from helpers_sum_agents import HELPERS, OWNERS, POLICY, everybody, fleet, helper, metrics, owner, terms, update
from helpers_sum_fleet import lead
from helpers_sums import noise_of
from sordino_agent.aggregate.contribute import Unmetered
from sordino_agent.aggregate.tasks import ShareFacts, ShareTask, SumFacts, SumMetricsTask, SumUpdateTask
from sordino_agent.aggregate.work import fixed_point, flat, update_vector
from sordino_agent.tasks import Done, TrainFacts, decode_outcome, decode_task, encode_outcome, encode_task
from sordino_common import messages as m
from sordino_common.aggregate.wide import ROWS_LIMBS, joined
from sordino_common.errors import BudgetRefused, LimitExceeded
from sordino_common.plan.arrays import from_numpy, to_numpy
from sordino_common.plan.plan import plan_id
from sordino_common.privacy.grid import norm_squared
from sordino_common.privacy.grid_bound import grid_bound

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


def test_plans_of_the_commands_are_those_of_plain_training() -> None:
    assert update().plan_id == plan_id(TRAIN_PLAN)
    assert metrics().plan_id == plan_id(EVALUATE_PLAN)
    assert to_numpy(zero_params()[0]).shape == (3, 1)
    assert data_ref().split == "train"


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
