"""A privacy plan in words: a paragraph for a data protection officer."""

from __future__ import annotations

import math

from sordino_server.accounting.adversary import NOT_COVERED
from sordino_server.accounting.privacy_plan import PrivacyPlan, UnitPlan
from sordino_server.progress import number

_UNIT = {
    "record": "one record (one row of one device's data)",
    "device": "one device (all of its rows together)",
}


def paragraph(plan: PrivacyPlan) -> str:
    """One paragraph for a data protection officer: unit, ε, δ, adversary, what is not covered."""
    first = plan.first
    promise = (
        f"The job {plan.job} is planned with differential privacy for {_UNIT[first.unit]}: epsilon {_up(first)} at "
        f"delta {first.delta:g}, for the whole run of {_rounds(plan)}."
    )
    said = [
        promise,
        _meaning(first),
        f"This holds against {first.promise.adversary}.",
    ]
    second = plan.second
    if second is not None:
        said.append(
            f"Beside it, {_UNIT['device']} is protected with epsilon {_up(second)} at delta {second.delta:g}, against "
            f"{second.promise.adversary}."
        )
    said.append(
        f"Not covered: {'; '.join(NOT_COVERED)}. Training the same data again adds to what is spent: each device keeps "
        "its own account and refuses what passes the budget that its owner has set."
    )
    return " ".join(said)


def _rounds(plan: PrivacyPlan) -> str:
    rounds = f"{plan.rounds} round{'s' if plan.rounds != 1 else ''}"
    if plan.local_steps is None or plan.local_steps == 1:
        return rounds
    return f"{rounds} of {plan.local_steps} steps"


def _meaning(unit: UnitPlan) -> str:
    epsilon = unit.found.epsilon
    what = "record" if unit.unit == "record" else "device"
    if epsilon > 20.0:
        return (
            f"An epsilon of this size promises next to nothing: whether a {what} took part may well be told from the "
            "result."
        )
    # The posterior of an observer who thought 50:50, δ aside.
    posterior = 1.0 / (1.0 + math.exp(-epsilon))
    return (
        f"It means that whatever is made of the result, every outcome is at most {number(math.exp(epsilon))} times as "
        f"likely with the {what} as without it (but for a chance of {unit.delta:g}); who held its presence for even "
        f"odds beforehand can be sure of it to at most {100 * posterior:.0f} % afterwards."
    )


def _up(unit: UnitPlan) -> str:
    """ε to three digits, never rounded down."""
    epsilon = unit.found.epsilon
    if epsilon <= 0.0:
        return "0"
    unit_in_last = 10.0 ** (math.floor(math.log10(epsilon)) - 2)
    return f"{math.ceil(epsilon / unit_in_last - 1e-9) * unit_in_last:.3g}"
