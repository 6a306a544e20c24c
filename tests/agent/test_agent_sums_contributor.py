"""What an agent as a contributor refuses: terms, commands, helpers that stand together, what its budget forbids."""

from __future__ import annotations

import msgspec
import pytest

from helpers_agent import TRAIN_PLAN, bench, small_table
from helpers_channel import device
from helpers_sum_agents import POLICY, ROSTER, fleet, helper, metrics, owner, terms, update
from helpers_sums import noise_of
from sordino_agent.budget import BudgetSpec
from sordino_agent.ledger import Ledger
from sordino_agent.policy import Policy
from sordino_common import messages as m
from sordino_common.channel.roster import Roster
from sordino_common.privacy.grid_bound import grid_bound

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
