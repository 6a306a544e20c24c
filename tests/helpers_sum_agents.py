"""Agents that contribute to secure sums or help with them: owners, helpers, their roster, and commands to them."""

from __future__ import annotations

from helpers_agent import EVALUATE_PLAN, SERVER, TRAIN_PLAN, Bench, bench, evaluate_command, small_table, train_command
from helpers_channel import device, entry, roster
from helpers_sums import sum_terms
from sordino_agent.aggregate.journal import SumJournal
from sordino_agent.policy import Policy
from sordino_common import messages as m
from sordino_common.aggregate.wide import EXTRAS
from sordino_common.channel.roster import Roster

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
