"""`sum-gradient` and private `sum-update`: one exact sum over the fleet, each device charged by what it did itself."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from helpers_agent import Bench, bench, small_table, zero_params
from helpers_channel import device
from helpers_private import APPLY_PLAN, GRADIENT_PLAN, TERMS, linear_gradient_plan, private_command
from helpers_sum_fleet import HELPERS, OWNERS, ROSTER, ROWS, helper, lead, terms
from helpers_sums import noise_of
from sordino_agent.aggregate.tasks import SumGradientTask
from sordino_agent.budget import BudgetSpec
from sordino_agent.data.catalogue import MemoryCatalogue
from sordino_agent.executor import InlineExecutor
from sordino_agent.ledger import Charge, Ledger
from sordino_agent.policy import Policy
from sordino_agent.private_step import PrivateSums, gradient_layout
from sordino_agent.tasks import TaskCost, decode_task, encode_task
from sordino_agent.workshop import Programs, Workshop, plan_limits
from sordino_common import messages as m
from sordino_common.aggregate.wide import EXTRAS
from sordino_common.clock import VirtualLoop
from sordino_common.errors import CodecError
from sordino_common.plan.arrays import to_numpy
from sordino_common.plan.executors import load_program
from sordino_common.plan.plan import plan_id
from sordino_common.privacy.grid_bound import grid_bound
from sordino_common.privacy.mechanism import FULL_SAMPLING, Mechanism
from sordino_common.privacy.rdp import curve, epsilon_of
from sordino_common.privacy.rows import row_bound

POLICY = Policy(jobs=("train", "aggregate"), plans="any", min_rows=2, min_cohort=3)


def gradient(**changes: object) -> m.SumGradient:
    train = private_command()
    names = ("round", "attempt", "plan_id", "data", "params", "batch_rows")
    fields: dict[str, object] = {name: getattr(train, name) for name in names}
    fields |= {"terms": terms(), "clip_norm": 1.0, "grid_bits": 12, "sampling_threshold": FULL_SAMPLING}
    return m.SumGradient(**{**fields, **changes})  # type: ignore[arg-type]


def update(**changes: object) -> m.SumUpdate:
    """Both units: DP-SGD on the device, and the whole update clipped."""
    train = private_command()
    names = [name for name in train.__struct_fields__ if name != "run"]
    fields: dict[str, object] = {name: getattr(train, name) for name in names}
    clip = m.SumClip(norm=1.0, grid_bits=8)
    fields |= {"terms": terms(), "weight": "one", "weight_unit": 80, "fraction_bits": 16, "clip": clip}
    return m.SumUpdate(**{**fields, **changes})  # type: ignore[arg-type]


def owner(
    name: str = "pi-0",
    *,
    policy: Policy = POLICY,
    budget: BudgetSpec | None = None,
    limit_s: float = math.inf,
    seconds_of: Callable[[TaskCost], float] = lambda cost: 1.0 if cost.runs else 0.1,
) -> Bench:
    seed = OWNERS.index(name)
    loop = VirtualLoop()
    workshop = Workshop(
        catalogue=MemoryCatalogue([small_table(rows=ROWS + 10, seed=seed)]),
        programs=Programs(executor="numpy", limits=plan_limits(64 << 20)),
        memory_bytes=64 << 20,
        random=random.Random(seed).randbytes,
    )
    executor = InlineExecutor(loop, workshop=workshop, seconds_of=seconds_of, limit_s=limit_s)
    ledger = Ledger(None, budgets={} if budget is None else {"toy": budget})
    made = bench(loop=loop, executor=executor, policy=policy, name=name, identity=device(name), ledger=ledger)
    made.core.on_roster(ROSTER)
    for plan in (GRADIENT_PLAN, APPLY_PLAN):
        assert isinstance(made.ask(m.PlanPut(plan=plan)), m.PlanReady)
    return made


def charges(made: Bench) -> list[Charge]:
    return [one.charge for one in made.core._ledger.entries()]


def clipped_sum(name: str, **changes: object) -> list[int]:
    """What the device's rows give, by itself, without noise."""
    table = small_table(rows=ROWS + 10, seed=OWNERS.index(name))
    x = np.stack([table.column(f"f{k}")[table.train] for k in range(3)], axis=1).astype(np.float32)
    y = table.column("y")[table.train].astype(np.float32)[:, None]
    plan = linear_gradient_plan()
    sums = PrivateSums(
        load_program(plan), gradient_layout(plan), x=x, y=y, clip_norm=1.0, grid_bits=12, threshold=FULL_SAMPLING
    )
    return [int(one) for one in sums.draw([to_numpy(array) for array in zero_params()])]


def test_the_fleets_sum_is_that_of_the_clipped_gradients_plus_the_aggregators_noise() -> None:
    owners, helpers = {name: owner(name) for name in OWNERS}, {name: helper(name) for name in HELPERS}
    command = gradient(terms=terms(noise=noise_of(1)))
    total, _ = lead(command, owners=owners, helpers=helpers)
    exact = np.sum([clipped_sum(name) for name in OWNERS], axis=0)
    # Three aggregators of σ = 1: beyond 12 an entry has a chance of 2 exp(-12²/6) < 1e-10.
    assert np.abs(total - exact).max() <= 12
    assert np.abs(exact).max() > 1000


def test_each_device_charges_one_sampled_step_by_the_noise_of_one_aggregator() -> None:
    made = owner()
    command = gradient(sampling_threshold=1 << 30)
    assert isinstance(made.ask(command), m.Contribution)
    price = Mechanism(
        unit="record", sensitivity_squared=row_bound(4, 12), sigma_squared=1 << 26, sampling_threshold=1 << 30
    )
    run = command.terms.run
    expected = Charge(dataset="toy", split="train", run=run, round=1, what="sum-gradient", mechanism=price)
    assert charges(made) == [expected]


def test_how_long_a_private_step_took_is_told_in_whole_seconds() -> None:
    """It grows with the size of the sample, which nobody is to know."""
    made = owner(seconds_of=lambda cost: 1.2345 if cost.runs else 0.1)
    answer = made.ask(gradient())
    assert isinstance(answer, m.Contribution) and answer.seconds == 2.0


def test_a_session_is_sampled_and_charged_once() -> None:
    made = owner()
    assert isinstance(made.ask(gradient()), m.Contribution)
    again = made.ask(gradient())
    assert isinstance(again, m.Refused)
    assert again.code == "conflict"
    assert len(charges(made)) == 1
    other = gradient(terms=terms(session=b"another-session-"))
    assert isinstance(made.ask(other), m.Contribution)
    assert len(charges(made)) == 2


def test_the_budget_ends_it_by_name() -> None:
    made = owner(budget=BudgetSpec(epsilon=6.0, delta=1e-5))
    for k in range(50):
        answer = made.ask(gradient(terms=terms(session=bytes([k] * 16), index=k)))
        if isinstance(answer, m.Refused):
            break
    assert isinstance(answer, m.Refused)
    assert 1 <= len(charges(made)) == k < 49
    assert answer.code == "budget"
    assert "`sum-gradient` would bring what was spent" in answer.reason


REFUSALS = {
    "a length that is not the Plan's": (
        gradient(terms=terms(length=5)),
        "command",
        "have 4 entries, the terms of the sum say 5",
    ),
    "a bound that rows may pass": (
        gradient(terms=terms(bound=(ROWS << 12) - 1)),
        *("command", "a sum over 30 rows on a grid of 12 bits can reach 122880, the terms of the sum say 122879"),
    ),
    "another batch": (gradient(batch_rows=4), "command", "takes batches of 8 rows, the command says 4"),
    "held-out rows": (
        gradient(data=msgspec.structs.replace(gradient().data, split="test")),
        *("command", "for evaluation only"),
    ),
    "an apply Plan": (gradient(plan_id=plan_id(APPLY_PLAN)), "not-separable", ""),
    "an unknown Plan": (gradient(plan_id=bytes(32)), "unknown-plan", "put it"),
    "a small cohort": (gradient(terms=terms(minimum=2)), "policy", "policy.min_cohort"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_by_name_cost_nothing(name: str) -> None:
    command, code, words = REFUSALS[name]
    made = owner()
    answer = made.ask(command)
    assert isinstance(answer, m.Refused)
    assert (answer.code, words in answer.reason) == (code, True), answer
    assert charges(made) == []


def test_the_owners_least_noise_and_datasets_hold_here_too() -> None:
    answer = owner(policy=msgspec.structs.replace(POLICY, min_noise_multiplier=2.5)).ask(gradient())
    assert isinstance(answer, m.Refused)
    assert "policy.min_noise_multiplier" in answer.reason
    answer = owner(policy=msgspec.structs.replace(POLICY, datasets={"toy": ("train",)})).ask(gradient())
    assert isinstance(answer, m.Refused)
    assert "`aggregate`" in answer.reason


def test_a_sum_of_gradients_without_noise_is_no_message() -> None:
    with pytest.raises(CodecError, match="without noise"):
        gradient(terms=terms(noise=None))


def test_the_task_passes_the_pipe() -> None:
    task = SumGradientTask(command=gradient(), plan=GRADIENT_PLAN, agent="pi-0", min_rows=2)
    assert decode_task(encode_task(task)) == task


# --- work that comes to nothing ------------------------------------------------------------------------------------
#
# A server that sees how long a step takes, and could call it off for nothing, would choose among samples.


def called_off(made: Bench, command: m.SumGradient | m.SumUpdate) -> m.Message:
    correlation = made.tell(command)
    made.tell(m.Cancel(run=command.terms.run, round=command.round))
    while made.loop.step():
        pass
    (answer,) = made.answers(correlation)
    return answer


def test_a_step_that_is_called_off_is_charged_all_the_same() -> None:
    made, paid = owner(), owner()
    answer = called_off(made, gradient(sampling_threshold=1 << 30))
    assert isinstance(answer, m.Refused) and answer.code == "cancelled"
    assert isinstance(paid.ask(gradient(sampling_threshold=1 << 30)), m.Contribution)
    (lost,), (charged,) = charges(made), charges(paid)
    assert lost.what == "sum-gradient, without a result"
    assert lost.mechanism == charged.mechanism


def test_both_units_are_charged_when_an_update_is_called_off() -> None:
    made = owner()
    assert isinstance(called_off(made, update()), m.Refused)
    assert [charge.mechanism.unit for charge in charges(made)] == ["record", "device"]
    assert {charge.what for charge in charges(made)} == {"sum-update, without a result"}


def test_a_step_that_passes_its_time_is_charged() -> None:
    made = owner(limit_s=0.5)
    answer = made.ask(gradient())
    assert isinstance(answer, m.Refused) and answer.code == "limit"
    assert [charge.what for charge in charges(made)] == ["sum-gradient, without a result"]


def test_a_step_that_had_not_begun_costs_nothing() -> None:
    made = owner()
    running = made.tell(gradient())
    waiting = made.tell(gradient(terms=terms(session=bytes(16), run="toy-2")))
    made.tell(m.Cancel(run="toy-2", round=None))
    while made.loop.step():
        pass
    assert isinstance(made.answers(running)[0], m.Contribution)
    assert isinstance(made.answers(waiting)[0], m.Refused)
    assert [charge.what for charge in charges(made)] == ["sum-gradient"]


def test_what_was_called_off_counts_beyond_the_budget_too() -> None:
    """Two commands are affordable when they come; both are called off while they run, one after the other."""
    made = owner()
    assert isinstance(made.ask(gradient()), m.Contribution)
    (charge,) = charges(made)
    worth = epsilon_of(curve(charge.mechanism), 1e-5)
    made = owner(budget=BudgetSpec(epsilon=1.1 * worth, delta=1e-5))
    commands = [gradient(terms=terms(session=bytes([k] * 16), run=f"toy-{k}", index=k)) for k in (1, 2)]
    correlations = [made.tell(command) for command in commands]
    made.tell(m.Cancel(run="toy-1", round=None))
    while not made.answers(correlations[0]):
        assert made.loop.step()
    made.tell(m.Cancel(run="toy-2", round=None))
    while made.loop.step():
        pass
    assert [charge.what for charge in charges(made)] == ["sum-gradient, without a result"] * 2
    answer = made.ask(gradient(terms=terms(session=bytes([9] * 16), index=9)))
    assert isinstance(answer, m.Refused) and answer.code == "budget"


# --- both units ----------------------------------------------------------------------------------------------------


def test_both_units_of_one_release_are_charged() -> None:
    made = owner()
    assert isinstance(made.ask(update()), m.Contribution)
    record, whole = [charge.mechanism for charge in charges(made)]
    assert (record.unit, record.count, record.sigma_squared) == ("record", 5, TERMS.sigma_squared)
    assert record.sensitivity_squared == row_bound(4, TERMS.grid_bits)
    assert whole == Mechanism(unit="device", sensitivity_squared=grid_bound(4, 8), sigma_squared=1 << 26)
    assert {charge.what for charge in charges(made)} == {"sum-update"}


def test_one_unit_that_cant_be_paid_refuses_both() -> None:
    made = owner(budget=BudgetSpec(epsilon=1.0, delta=1e-5))
    answer = made.ask(update())  # the device's noise is plenty, the record's is not
    assert isinstance(answer, m.Refused)
    assert answer.code == "budget"
    assert "unit record" in answer.reason
    assert charges(made) == []


def test_private_updates_are_summed_without_the_devices_unit_too() -> None:
    made = owner(budget=BudgetSpec(epsilon=40.0, delta=1e-5))
    plain = terms(length=4 + EXTRAS, noise=None, bound=1 << 40)
    answer = made.ask(update(clip=None, weight="rows", terms=plain))
    assert isinstance(answer, m.Contribution), answer
    (charge,) = charges(made)
    assert charge.mechanism.unit == "record"


def test_an_update_that_does_not_fit_is_zero_not_a_refusal() -> None:
    """Noise is drawn by then: what a refusal told would not have been paid for."""
    made = owner()
    params = tuple(m.Array("float32", one.shape, b"\x00\x00\x80\x7f" * (one.nbytes // 4)) for one in zero_params())
    plain = terms(length=4 + EXTRAS, noise=None, bound=1 << 40)
    assert isinstance(made.ask(update(clip=None, weight="rows", terms=plain, params=params)), m.Contribution)
    loud = msgspec.structs.replace(TERMS, sigma_squared=1 << 62, clip_norm=1e9)
    answer = made.ask(
        update(clip=None, weight="rows", terms=msgspec.structs.replace(plain, session=bytes(16)), privacy=loud)
    )
    assert isinstance(answer, m.Contribution), answer
    assert len(charges(made)) == 2
