"""What privacy has cost, against what its owner allows. Pure arithmetic; `ledger.py` keeps it on disk.

A release is a `Mechanism`: count times f(D) + N_Z(0, σ² I), with ||f(D) - f(D')||² <= Δ² for neighbours D, D' that
differ by one unit (a record, or this whole device), each unit sampled with probability q. `Spent` is the composition of
releases over the same rows and unit. Who asks for releases (the server) sees earlier results first, so the budget is a
filter (`privacy/budget.py`), not a sum of a plan made in advance. Releases over disjoint rows (the splits of a
dataset) compose in parallel, so each split has the whole budget.

The two units are kept apart, and each must stay within the budget. A release that is charged under `device` alone is
not counted under `record`: it hides the device's whole part; a single row of it may show as much as an exchange of the
device would, for which Δ² is four times as large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Final

import msgspec

from sordino_common.privacy import zcdp
from sordino_common.privacy.budget import Budget
from sordino_common.privacy.mechanism import Mechanism
from sordino_common.privacy.rdp import ZERO, Curve, curve

MOST_ROUNDS: Final = 1 << 30  # more are not counted


class BudgetSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that may ever be learnt from a dataset's rows: `epsilon` at `delta`, or `rho` of zero-concentrated DP.

    Sampled rows have no useful ρ: they are held against the (ε, δ) that plain Gaussians of `rho` would use up.
    Neighbouring relation: one unit more or less; how many rows there are is no secret."""

    delta: Annotated[float, msgspec.Meta(gt=0.0, lt=0.5)]
    epsilon: Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] | None = None
    rho: Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] | None = None

    def __post_init__(self) -> None:
        # A ValueError here becomes a validation error with the entry's file, line and column.
        if (self.epsilon is None) == (self.rho is None):
            raise ValueError("give either epsilon or rho, with delta")

    @property
    def filter(self) -> Budget:
        """What decides whether a release is affordable."""
        return _filter(self)

    def allows(self, spent: Spent) -> bool:
        """Whether `spent` is within the budget."""
        return self.filter.affords(ZERO, spent.curve)

    def __str__(self) -> str:
        amount = f"epsilon {self.epsilon:g}" if self.epsilon is not None else f"rho {self.rho:g}"
        return f"{amount} at delta {self.delta:g}"


@lru_cache(maxsize=256)
def _filter(spec: BudgetSpec) -> Budget:
    if spec.epsilon is not None:
        return Budget(epsilon=spec.epsilon, delta=spec.delta)
    assert spec.rho is not None
    return Budget.of_rho(spec.rho, spec.delta)


@dataclass(frozen=True, slots=True)
class Spent:
    """A composition of releases: `curve` at `rdp.ORDERS`, never too low; `rho` as long as no release was of sampled
    rows, else None."""

    curve: Curve = ZERO
    rho: float | None = 0.0

    def plus(self, mechanism: Mechanism, times: int = 1) -> Spent:
        """With `times` more of such releases."""
        return Spent(
            curve=tuple(_up(have + _up(times * more)) for have, more in zip(self.curve, curve(mechanism), strict=True)),
            rho=None if self.rho is None or mechanism.sampled else _up(self.rho + times * zcdp.rho_of(mechanism)),
        )


def rounds_left(budget: BudgetSpec, spent: Spent, mechanism: Mechanism) -> int:
    """How many more releases like `mechanism` the budget allows, at most `MOST_ROUNDS`."""
    if not budget.allows(spent.plus(mechanism)):
        return 0
    low, high = 1, 2
    while high <= MOST_ROUNDS and budget.allows(spent.plus(mechanism, high)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if budget.allows(spent.plus(mechanism, middle)):
            low = middle
        else:
            high = middle
    return low


def _up(value: float) -> float:
    """The next float: a sum is never rounded below the true one."""
    return math.nextafter(value, math.inf)
