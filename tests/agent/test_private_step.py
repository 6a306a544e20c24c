"""Local DP-SGD through the agent: what leaves is noised, priced by the code that drew it, and paid for first."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from helpers_agent import OPEN_POLICY, TRAIN_PLAN, Bench, bench, one_second, small_table, zero_params
from helpers_private import (
    APPLY_PLAN,
    GRADIENT_PLAN,
    TERMS,
    linear_apply_plan,
    linear_gradient_plan,
    mixing_plan,
    private_command,
)
from sordino_agent.budget import BudgetSpec
from sordino_agent.data.catalogue import MemoryCatalogue
from sordino_agent.errors import LedgerError
from sordino_agent.executor import InlineExecutor
from sordino_agent.ledger import Charge, Ledger
from sordino_agent.policy import Limits
from sordino_agent.private_step import Applier, PrivateSums, StepNoise, gradient_layout, train_private
from sordino_agent.workshop import Programs, Workshop, plan_limits
from sordino_common import messages as m
from sordino_common.clock import VirtualLoop
from sordino_common.errors import LocalError
from sordino_common.plan.arrays import to_numpy
from sordino_common.plan.executors import load_program
from sordino_common.plan.plan import encode_plan, plan_id
from sordino_common.privacy.mechanism import FULL_SAMPLING, Mechanism
from sordino_common.privacy.rows import row_bound

PRICE = Mechanism(
    unit="record",
    sensitivity_squared=row_bound(4, 16),
    sigma_squared=TERMS.sigma_squared,
    sampling_threshold=TERMS.sampling_threshold,
    count=5,
)


def private_bench(
    seed: int | None = 3, *, limits: Limits | None = None, rows: int = 40, **policy: object
) -> tuple[Bench, Ledger]:
    """An agent whose randomness repeats, both Plans put, and its ledger."""
    loop = VirtualLoop()
    source: Callable[[int], bytes] = os.urandom if seed is None else random.Random(seed).randbytes
    limits = limits or Limits(memory_bytes=64 << 20, store_bytes=1 << 20)
    workshop = Workshop(
        catalogue=MemoryCatalogue([small_table(rows=rows)]),
        programs=Programs(executor="numpy", limits=plan_limits(64 << 20)),
        memory_bytes=64 << 20,
        random=source,
    )
    made = bench(
        loop=loop,
        limits=limits,
        policy=msgspec.structs.replace(OPEN_POLICY, **policy),
        executor=InlineExecutor(loop, workshop=workshop, seconds_of=one_second),
    )
    for plan in (GRADIENT_PLAN, APPLY_PLAN):
        made.ask(m.PlanPut(plan=plan))
    return made, made.core._ledger


def charges(ledger: Ledger) -> list[Charge]:
    return [entry.charge for entry in ledger.entries()]


def trained(answer: m.Message) -> m.Trained:
    assert isinstance(answer, m.Trained), answer
    return answer


def test_a_private_update_is_charged_with_what_was_done() -> None:
    made, ledger = private_bench()
    answer = trained(made.ask(private_command()))
    assert (answer.steps, answer.rows, answer.loss_sum) == (5, 30, 0.0)
    assert [array.shape for array in answer.update] == [(3, 1), (1,)]
    assert all(array.dtype == "float32" for array in answer.update)
    expected = Charge(dataset="toy", split="train", run="run-1", round=1, what="train", mechanism=PRICE)
    assert charges(ledger) == [expected]


def test_epochs_are_expected_passes() -> None:
    made, ledger = private_bench()
    assert trained(made.ask(private_command(steps=0, epochs=1.5))).steps == 6  # 1.5 / (1/4)
    assert charges(ledger)[0].mechanism.count == 6


def test_training_that_is_called_off_is_charged_all_the_same() -> None:
    """A server that may call a step off for nothing, by its time, chooses among samples."""
    made, ledger = private_bench()
    command = private_command()
    correlation = made.tell(command)
    made.tell(m.Cancel(run=command.run, round=command.round))
    while made.loop.step():
        pass
    (answer,) = made.answers(correlation)
    assert isinstance(answer, m.Refused) and answer.code == "cancelled"
    (lost,) = charges(ledger)
    assert lost.what == "train, without a result"
    assert isinstance(made.ask(private_command(attempt=1)), m.Trained)
    assert charges(ledger)[1].mechanism == lost.mechanism


def test_it_learns_when_noise_is_small_and_every_row_is_in() -> None:
    made, _ = private_bench()
    terms = msgspec.structs.replace(
        TERMS, clip_norm=1e3, sampling_threshold=FULL_SAMPLING, sigma_squared=1, grid_bits=20
    )
    answer = trained(made.ask(private_command(terms, steps=200)))
    w, b = (to_numpy(array).ravel() for array in answer.update)
    assert np.allclose(w, [1, 2, 3], atol=0.05)
    assert np.allclose(b, [0.5], atol=0.05)


def test_the_step_is_what_the_plans_say_on_the_clipped_sum() -> None:
    """Full sampling, no clipping in effect, noise of one grid unit: SGD with momentum in float64 beside it."""
    table = small_table()
    x = np.stack([table.column(f"f{k}")[table.train] for k in range(3)], axis=1).astype(np.float32)
    y = table.column("y")[table.train].astype(np.float32)[:, None]
    gradient, apply = linear_gradient_plan(), linear_apply_plan(momentum=0.5)
    layout = gradient_layout(gradient)
    sums = PrivateSums(
        load_program(gradient),
        layout,
        x=x,
        y=y,
        clip_norm=1e4,
        grid_bits=20,
        threshold=FULL_SAMPLING,
        random=random.Random(1).randbytes,
    )
    start = [to_numpy(array) for array in zero_params()]
    update, mechanism = train_private(
        sums,
        Applier(load_program(apply), gradient, layout),
        params=start,
        steps=7,
        sigma_squared=1,
        unit=1e4 / 2**20,
        expected_rows=len(x),
        random=random.Random(2).randbytes,
    )
    w, b, v = np.zeros((3, 1)), np.zeros(1), np.zeros((3, 1))
    for _ in range(7):
        error = 2 * (x @ w + b - y)
        v = 0.5 * v + x.T @ error / len(x)
        w, b = w - 0.1 * v, b - 0.1 * error.mean(axis=0)
    # Each of 7 steps is off by about a grid unit of 0.01 in the sum, over 30 rows.
    assert np.abs(update[0] - w).max() < 0.01
    assert np.abs(update[1] - b).max() < 0.01
    assert mechanism.count == 7
    assert all(not value.any() for value in start)  # the caller's arrays are as they were


def test_a_repeat_is_answered_with_the_same_bytes_and_charged_once() -> None:
    made, ledger = private_bench(seed=None)
    first = trained(made.ask(private_command()))
    again = trained(made.ask(private_command()))
    assert again == first
    assert len(charges(ledger)) == 1
    fresh = trained(made.ask(private_command(attempt=1)))
    assert fresh.update != first.update
    assert len(charges(ledger)) == 2


def test_a_repeat_that_was_forgotten_is_a_release_of_its_own() -> None:
    """With no room to keep answers the work is done again, with fresh noise: charged again, never for nothing."""
    limits = Limits(memory_bytes=64 << 20, results_bytes=0)
    made, ledger = private_bench(seed=None, limits=limits)
    first, again = trained(made.ask(private_command())), trained(made.ask(private_command()))
    assert first.update != again.update
    assert len(charges(ledger)) == 2


def test_repeats_while_it_runs_wait_with_it() -> None:
    made, ledger = private_bench(seed=None)
    waiting = [made.tell(private_command()) for _ in range(3)]
    while made.loop.step():
        pass
    answers = {bytes(str(made.answers(one)), "utf-8") for one in waiting}
    assert len(answers) == 1
    assert len(charges(ledger)) == 1


def test_a_budget_ends_private_training_by_name() -> None:
    made, ledger = private_bench()
    made.core.reconfigure(OPEN_POLICY, {"toy": BudgetSpec(epsilon=12.0, delta=1e-5)})
    done = 0
    while isinstance(answer := made.ask(private_command(round=done)), m.Trained):
        done += 1
    assert done >= 1
    assert isinstance(answer, m.Refused)
    assert answer.code == "budget"
    assert "dataset 'toy', train rows, unit record: `train` would bring what was spent" in answer.reason
    assert len(charges(ledger)) == done
    # An answer that was paid for is still given again.
    assert isinstance(made.ask(private_command(round=done - 1)), m.Trained)


def test_nothing_leaves_when_the_ledger_cant_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    made, ledger = private_bench()

    def full(_charges: object) -> None:
        raise LedgerError("ledger.sqlite: the privacy ledger can't be written: database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "charge", full)
        answer = made.ask(private_command())
    assert isinstance(answer, m.Refused)
    assert answer.code == "ledger"
    assert isinstance(made.ask(private_command()), m.Trained)
    assert len(charges(ledger)) == 1


def test_the_charge_is_on_the_disk_before_the_answer_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    made, ledger = private_bench()
    order: list[str] = []
    charge, send = ledger.charge, made.outbox.send

    def charged(these: list[Charge]) -> None:
        charge(these)
        order.append("charged")

    def sent(to: str, message: m.Message, **more: object) -> bytes:
        order.append(message.kind)
        return send(to, message, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(ledger, "charge", charged)
    monkeypatch.setattr(made.outbox, "send", sent)
    made.ask(private_command())
    assert order == ["charged", "trained"]


def test_work_without_a_price_never_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that forgot its mechanism: our bug, told as one, and nothing goes out."""
    made, ledger = private_bench()

    def unpriced(*arguments: object, **more: object) -> tuple[list[object], None]:
        return train_private(*arguments, **more)[0], None  # type: ignore[arg-type, return-value]

    monkeypatch.setattr("sordino_agent.private_step.train_private", unpriced)
    answer = made.ask(private_command())
    assert isinstance(answer, m.Refused)
    assert answer.code == LocalError.code
    assert charges(ledger) == []


def test_seeds_repeat_in_the_simulator_and_the_servers_seed_chooses_no_rows() -> None:
    first = trained(private_bench(seed=3)[0].ask(private_command()))
    assert trained(private_bench(seed=3)[0].ask(private_command())).update == first.update
    assert trained(private_bench(seed=3)[0].ask(private_command(seed=999))).update == first.update
    assert trained(private_bench(seed=4)[0].ask(private_command())).update != first.update


def test_rows_that_are_not_finite_are_no_refusal() -> None:
    """Parameters that overflow every row: all rows count as zero, and what leaves is noise, not an error."""
    made, ledger = private_bench()
    params = tuple(
        m.Array("float32", array.shape, b"\x00\x00\x80\x7f" * (array.nbytes // 4)) for array in zero_params()
    )
    answer = trained(made.ask(private_command(params=params)))
    assert len(answer.update) == 2
    assert len(charges(ledger)) == 1


@given(st.data(), st.integers(1, 30), st.sampled_from([8, 20]), st.sampled_from([0.05, 3.0]))
@settings(max_examples=60, deadline=None)
def test_one_row_less_changes_the_sum_by_at_most_the_sensitivity(
    data: st.DataObject, rows: int, grid_bits: int, clip_norm: float
) -> None:
    """Through sampler, batches, Plan and clipping: D and D' = D without a row, the same coins for all other rows."""
    numbers = st.floats(-100.0, 100.0, width=32)
    x = data.draw(hnp.arrays(np.float32, (rows, 3), elements=numbers))
    y = data.draw(hnp.arrays(np.float32, (rows, 1), elements=numbers))
    params = [
        data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-2.0, 2.0, width=32))) for shape in ((3, 1), (1,))
    ]
    coins = np.array(data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=rows, max_size=rows)), dtype="<u4")
    gone = data.draw(st.integers(0, rows - 1))
    plan = linear_gradient_plan()

    def summed(kept: NDArray[np.int64]) -> tuple[list[int], int]:
        sums = PrivateSums(
            load_program(plan),
            gradient_layout(plan),
            x=x[kept],
            y=y[kept],
            clip_norm=clip_norm,
            grid_bits=grid_bits,
            threshold=3 << 30,
            random=lambda count: coins[kept].tobytes()[:count],
        )
        return [int(one) for one in sums.draw(params)], sums.mechanism(1).sensitivity_squared

    everybody = np.arange(rows)
    (with_it, bound), (without, same) = summed(everybody), summed(np.delete(everybody, gone))
    assert bound == same  # a bound that told the number of rows would be no bound
    assert sum((a - b) ** 2 for a, b in zip(with_it, without, strict=True)) <= bound


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": (1e-320,) * 3},  # only rows that are not zero overflow float32
        {"offset": (1e308,) * 3, "scale": (1e-300,) * 3},
        {"target_scale": 1e-320},
        {"target_offset": -1e308, "target_scale": 1e-10},
    ],
)
def test_the_servers_scaling_is_no_question_about_a_single_row(changes: dict[str, object]) -> None:
    """A refusal because some row overflows would be one noiseless bit of it, asked as often as the server likes."""
    made, ledger = private_bench()
    data = msgspec.structs.replace(private_command().data, **changes)
    assert isinstance(made.ask(private_command(data=data)), m.Trained)
    assert len(charges(ledger)) == 1


# --- refusals ------------------------------------------------------------------------------------------------------

MIXING = encode_plan(mixing_plan())
FEW = encode_plan(linear_apply_plan(features=2))
REFUSALS = {
    "another batch": (private_command(batch_rows=4), "command", "takes batches of 8 rows, the command says 4"),
    "no parameters": (private_command(params=()), "command", "takes 2 parameters, the command has 0"),
    "held-out rows": (
        private_command(data=msgspec.structs.replace(private_command().data, split="test")),
        *("command", "for evaluation only"),
    ),
    "a training Plan": (private_command(plan_id=plan_id(TRAIN_PLAN)), "not-separable", "role param"),
    "rows that mix": (private_command(plan_id=plan_id(MIXING)), "not-separable", "mixes the rows"),
    "an apply Plan for another model": (
        private_command(msgspec.structs.replace(TERMS, apply_plan=plan_id(FEW))),
        *("plan", "expected w"),
    ),
    "an unknown apply Plan": (
        private_command(msgspec.structs.replace(TERMS, apply_plan=bytes(32))),
        "unknown-plan",
        "put it",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_by_name_cost_nothing(name: str) -> None:
    command, code, words = REFUSALS[name]
    made, ledger = private_bench()
    for plan in (TRAIN_PLAN, MIXING, FEW):
        made.ask(m.PlanPut(plan=plan))
    answer = made.ask(command)
    assert isinstance(answer, m.Refused)
    assert (answer.code, words in answer.reason) == (code, True), answer
    assert charges(ledger) == []


def test_the_owners_least_noise_is_demanded() -> None:
    made, ledger = private_bench(min_noise_multiplier=2.5)
    answer = made.ask(private_command())
    assert isinstance(answer, m.Refused)
    assert answer.code == "policy"
    assert "a noise multiplier of 2 " in answer.reason
    assert "this device demands 2.5 (policy.min_noise_multiplier)" in answer.reason
    assert charges(ledger) == []
    louder = msgspec.structs.replace(TERMS, sigma_squared=1 << 35)
    assert isinstance(made.ask(private_command(louder)), m.Trained)


def test_both_plans_need_the_owners_consent() -> None:
    for allowed in (GRADIENT_PLAN, APPLY_PLAN):
        made, _ = private_bench(plans=(plan_id(allowed).hex(),))
        answer = made.ask(private_command())
        assert isinstance(answer, m.Refused)
        assert answer.code == "policy"
        assert "policy.plans" in answer.reason


def test_nothing_drawn_has_no_price() -> None:
    gradient = linear_gradient_plan()
    sums = PrivateSums(
        load_program(gradient),
        gradient_layout(gradient),
        x=np.zeros((4, 3), np.float32),
        y=np.zeros((4, 1), np.float32),
        clip_norm=1.0,
        grid_bits=16,
        threshold=1,
    )
    with pytest.raises(LocalError, match="nothing was drawn"):
        sums.mechanism(1)
    assert not sums.draw([np.zeros((3, 1), np.float32), np.zeros(1, np.float32)]).any()  # an empty sample, surely
    assert sums.mechanism(1).count == 1


# --- noise of several steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "steps", "draws"), [(1, 5, [5]), (7000, 5, [2, 2, 1]), (40_000, 2, [1, 1])])
def test_every_step_has_noise_of_its_own(
    length: int, steps: int, draws: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    given = np.arange(steps * length)

    def counted(sigma_squared: int, count: int, _: object) -> NDArray[np.int64]:
        assert sigma_squared == 9
        start = sum(drawn)
        drawn.append(count)
        return given[start : start + count]

    monkeypatch.setattr("sordino_agent.private_step.discrete_gaussian", counted)
    noise = StepNoise(9, length, steps)
    taken = np.concatenate([noise.take() for _ in range(steps)])
    assert drawn == [count * length for count in draws]  # not a sample more than the steps need
    assert np.array_equal(np.sort(taken), given)  # and none is used twice
    with pytest.raises(LocalError, match="more steps than were named"):
        noise.take()
