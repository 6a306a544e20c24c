"""A privacy budget as a filter over Rényi curves: may this release still be made? Plain Python.

Who asks for releases (the server) sees earlier results and chooses what it asks for next. A filter that holds against
that at *one* order α is Feldman and Zrnic's (arXiv 2008.11193, Theorem 4.3): stop before the sum of the orders' costs
passes B_α. The reason is that M_α = exp((α-1) L - (α-1) Σρ_α), L the privacy loss so far, is a supermartingale.

To allow whichever order turns out best, take the mixture M = Σ_α w_α M_α with Σ w_α = 1, which is a supermartingale as
well. If at the end *some* order has Σρ_α + c(α, w_α δ) <= ε, c being the conversion of `rdp`, then with
k_α = (1/α)·(1-1/α)^(α-1), the largest value of (1 - e^(ε-L))₊ · e^(-(α-1)(L-ε)) over L,

    (1 - e^(ε-L))₊ <= k_α e^((α-1)(L-ε)) = k_α M_α e^((α-1)(Σρ_α - ε)) <= w_α δ M_α <= δ M,

and δ(ε) = E[(1 - e^(ε-L))₊] <= δ E[M] <= δ. So an order costs log(1/w_α)/(α-1) more than if it had been fixed, and
nothing is assumed of how the server chooses. (Allowing any order at full δ would be right only if the costs did not
depend on results.) Half of the weight lies on the order that is best for a budget spent on Gaussian noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Self

from sordino_common.errors import LocalError
from sordino_common.privacy.rdp import ORDERS, conversion
from sordino_common.privacy.zcdp import rho_of_epsilon

# The orders that share the other half: a factor of about 1.4 apart, so that some is within a fifth of the best.
_OTHERS: Final = (2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 1024, 2048, 4096)
_SLACK: Final = 1.0 + 1e-9  # so that a cost of exactly ρ fits a budget of ρ, whatever the floats' last digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """(ε, δ), for everything that is ever released under it. `affords` is the filter. Raises `LocalError` unless
    ε > 0 and 0 < δ < 1/2."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (0.0 < self.epsilon <= 1e6 and 0.0 < self.delta < 0.5):
            raise LocalError(
                f"a budget has 0 < epsilon <= 1e6 and 0 < delta < 0.5, got epsilon {self.epsilon}, delta {self.delta}"
            )

    @classmethod
    def of_rho(cls, rho: float, delta: float) -> Self:
        """The (ε, δ) such that unsampled Gaussian releases of ρ in all, and no more, are affordable. It is a little
        above `zcdp.epsilon_of_rho` (the order is an integer of `ORDERS` and carries half of the weight)."""
        if not (0.0 < rho <= 1e6 and 0.0 < delta < 0.5):
            raise LocalError(f"a budget has 0 < rho <= 1e6 and 0 < delta < 0.5, got rho {rho}, delta {delta}")
        # Which order is favoured depends on ε alone, so look for the ε that is its own consequence, from below.
        costs = [(order * rho * _SLACK + conversion(order, delta / 2.0), order) for order in ORDERS]
        epsilon, _ = min(costs)
        budget = cls(epsilon=max(epsilon, 1e-9), delta=delta)
        while budget.epsilon_of([order * rho for order in ORDERS]) > budget.epsilon:
            budget = cls(epsilon=budget.epsilon * 1.0005, delta=delta)
        return budget

    def affords(self, spent: Sequence[float], cost: Sequence[float]) -> bool:
        """Whether `cost` may follow `spent` (curves at `ORDERS`)."""
        _check(spent)
        _check(cost)
        return self.epsilon_of([a + b for a, b in zip(spent, cost, strict=True)]) <= self.epsilon

    def epsilon_of(self, spent: Sequence[float]) -> float:
        """The ε that `spent` amounts to by this budget's orders and weights, at its δ; 0 if nothing is spent."""
        _check(spent)
        if not any(spent):
            return 0.0
        offsets = _offsets(self.epsilon, self.delta)
        return max(0.0, min(value + offset for value, offset in zip(spent, offsets, strict=True)))


def _check(spent: Sequence[float]) -> None:
    if len(spent) != len(ORDERS) or not all(0.0 <= value < math.inf for value in spent):
        raise LocalError(f"a curve has {len(ORDERS)} finite values >= 0, one for each order")


@lru_cache(maxsize=64)
def _offsets(epsilon: float, delta: float) -> tuple[float, ...]:
    """c(α, w_α δ) at every order; infinite at orders of no weight."""
    rho = rho_of_epsilon(epsilon, delta / 2.0)
    favoured = min(ORDERS, key=lambda order: order * rho + conversion(order, delta / 2.0))
    others = [order for order in _grid() if order != favoured]
    offsets = {order: conversion(order, delta / (2.0 * len(others))) for order in others}
    offsets[favoured] = conversion(favoured, delta / 2.0)
    return tuple(offsets.get(order, math.inf) for order in ORDERS)


@lru_cache(maxsize=1)
def _grid() -> tuple[int, ...]:
    return tuple(order for order in ORDERS if order in _OTHERS)
