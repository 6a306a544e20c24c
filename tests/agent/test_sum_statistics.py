"""`sum-statistics`: the fleet's statistics are those of its rows plus the noise, priced before and after the work."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from helpers_agent import Bench, bench, small_table
from helpers_channel import device
from helpers_sum_fleet import HELPERS, OWNERS, ROSTER, ROWS, helper, lead, terms
from helpers_sums import noise_of
from sordino_agent.aggregate.tasks import SumStatisticsTask
from sordino_agent.budget import BudgetSpec
from sordino_agent.data.catalogue import MemoryCatalogue
from sordino_agent.executor import InlineExecutor
from sordino_agent.ledger import Charge, Ledger
from sordino_agent.policy import Policy
from sordino_agent.tasks import decode_task, encode_task
from sordino_agent.workshop import Programs, Workshop, plan_limits
from sordino_common import messages as m
from sordino_common.clock import VirtualLoop
from sordino_common.errors import CodecError
from sordino_common.privacy.mechanism import Mechanism
from sordino_common.privacy.row_queries import entry_bound, length_of, sensitivity_squared
from sordino_common.privacy.row_sums import answer

POLICY = Policy(jobs=("statistics",), min_rows=2, min_cohort=3)
COLUMNS = (
    m.RangedColumn(name="f0", low=-3.0, high=3.0),
    m.RangedColumn(name="f1", low=-3.0, high=3.0),
    m.RangedColumn(name="y", low=-10.0, high=10.0),
)
QUERIES = (
    m.RowQuery(kind="gram", columns=(0, 1, 2), bits=8, weight=3, row_norm=1.0, target_norm=0.5, bias=0.25),
    m.RowQuery(kind="dyadic", columns=(1,), bits=3, weight=1000),
)


def command(**changes: object) -> m.SumStatistics:
    mine = {"length": length_of(QUERIES), "bound": entry_bound(QUERIES, ROWS), "noise": noise_of(1 << 44)}
    fields: dict[str, object] = {
        "terms": terms(**mine),
        "round": 1,
        "dataset": "toy",
        "columns": COLUMNS,
        "queries": QUERIES,
    }
    return m.SumStatistics(**{**fields, **changes})  # type: ignore[arg-type]


def with_terms(**changes: object) -> m.SumStatistics:
    return command(terms=msgspec.structs.replace(command().terms, **changes))


def owner(name: str = "pi-0", *, policy: Policy = POLICY, budget: BudgetSpec | None = None) -> Bench:
    loop = VirtualLoop()
    table = small_table(rows=ROWS + 10, seed=OWNERS.index(name))
    workshop = Workshop(
        catalogue=MemoryCatalogue([table]),
        programs=Programs(executor="numpy", limits=plan_limits(64 << 20)),
        memory_bytes=64 << 20,
    )
    executor = InlineExecutor(loop, workshop=workshop, seconds_of=lambda cost: 1.0)
    ledger = Ledger(None, budgets={} if budget is None else {"toy": budget})
    made = bench(loop=loop, executor=executor, policy=policy, name=name, identity=device(name), ledger=ledger)
    made.core.on_roster(ROSTER)
    return made


def charges(made: Bench) -> list[Charge]:
    return [one.charge for one in made.core._ledger.entries()]


def test_the_fleets_answers_are_those_of_all_train_rows_plus_the_noise() -> None:
    owners, helpers = {name: owner(name) for name in OWNERS}, {name: helper(name) for name in HELPERS}
    asked = with_terms(noise=noise_of(1))
    total, _ = lead(asked, owners=owners, helpers=helpers)
    exact = np.zeros(length_of(QUERIES), dtype=np.int64)
    for name in OWNERS:
        table = small_table(rows=ROWS + 10, seed=OWNERS.index(name))
        values = {column.name: table.column(column.name)[table.train] for column in COLUMNS}
        exact += answer(COLUMNS, values, QUERIES)
    # Three aggregators of σ = 1: beyond 12 an entry has a chance of 2 exp(-12²/6) < 1e-10.
    assert np.abs(total - exact).max() <= 12
    assert np.abs(exact).max() > 1000


def test_one_release_of_every_row_is_charged_by_the_noise_of_one_aggregator() -> None:
    made = owner()
    assert isinstance(made.ask(command()), m.Contribution)
    price = Mechanism(unit="record", sensitivity_squared=sensitivity_squared(QUERIES), sigma_squared=1 << 44)
    run = command().terms.run
    assert charges(made) == [
        Charge(dataset="toy", split="train", run=run, round=1, what="sum-statistics", mechanism=price)
    ]


def test_with_a_budget_there_is_no_answer_without_noise_and_none_beyond_it() -> None:
    made = owner(budget=BudgetSpec(epsilon=2.0, delta=1e-5))
    for refused, code, words in (
        (with_terms(noise=None), "budget", "`sum-statistics without noise`"),
        (with_terms(noise=noise_of(1 << 20)), "budget", "would bring what was spent"),
    ):
        got = made.ask(refused)
        assert isinstance(got, m.Refused)
        assert (got.code, words in got.reason) == (code, True), got
    assert charges(made) == []


REFUSALS = {
    "a length that is not the queries'": (with_terms(length=1), "command", "have 24 answers, the terms of the sum say"),
    "a bound that rows may pass": (
        with_terms(bound=entry_bound(QUERIES, ROWS) - 1),
        *("command", "an answer over 30 rows can reach"),
    ),
    "an unknown column": (
        command(columns=(*COLUMNS[:2], m.RangedColumn(name="salary", low=0.0, high=1.0))),
        *("unknown-data", "salary"),
    ),
    "an unknown dataset": (command(dataset="other"), "unknown-data", "other"),
    "a small cohort": (with_terms(minimum=2), "policy", "policy.min_cohort"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_by_name_cost_nothing(name: str) -> None:
    asked, code, words = REFUSALS[name]
    made = owner()
    got = made.ask(asked)
    assert isinstance(got, m.Refused)
    assert (got.code, words in got.reason) == (code, True), got
    assert charges(made) == []


def test_the_owner_decides_by_kind_rows_noise_and_dataset() -> None:
    for changes, words in (
        ({"jobs": ("aggregate", "train")}, "kind `statistics`"),
        ({"min_rows": 31}, "policy.min_rows"),
        ({"min_noise_multiplier": 1e6}, "policy.min_noise_multiplier"),
        ({"datasets": {"toy": ("train",)}}, "`statistics`"),
    ):
        got = owner(policy=msgspec.structs.replace(POLICY, **changes)).ask(command())  # type: ignore[arg-type]
        assert isinstance(got, m.Refused)
        assert words in got.reason


def test_malformed_statistics_are_no_message() -> None:
    with pytest.raises(CodecError, match="beyond the 2 given"):
        command(columns=COLUMNS[:2])
    with pytest.raises(CodecError, match="named twice"):
        command(columns=(*COLUMNS, COLUMNS[0]))


def test_the_task_passes_the_pipe() -> None:
    task = SumStatisticsTask(command=command(), agent="pi-0", min_rows=2)
    assert decode_task(encode_task(task)) == task
