"""Rényi differential privacy of `Mechanism`s at integer orders, and the (ε, δ) that it gives. Plain Python.

Legend: α order, q sampling rate, σ noise, Δ sensitivity (L2), ν = Δ²/(2σ²), μ_v the discrete Gaussian N_Z(v, σ² I) at
integer centre v.

**The curve is exact, not a bound by the continuous Gaussian.** Mironov, Talwar, Zhang (arXiv 1908.10530, section 3.3)
give for the continuous Gaussian and integer α

    D_α((1-q) μ_0 + q μ_v || μ_0) = 1/(α-1) · log A_α,   A_α = Σ_k C(α,k) (1-q)^(α-k) q^k exp(k(k-1) |v|²/(2σ²)).

All that it takes is E_{x~μ_0}[(μ_v/μ_0)^k] = exp(k(k-1)|v|²/(2σ²)). On the lattice Z^d, with Z = Σ_x exp(-|x|²/2σ²),
which is the normalizer of μ_0 and, v being integer, of μ_v too:

    E = 1/Z · Σ_x exp(-|x|²/2σ²) · exp((2k x·v - k|v|²)/2σ²) = exp((k²-k)|v|²/2σ²) · 1/Z · Σ_x exp(-|x - kv|²/2σ²),

and the last sum is Z, since kv is a lattice vector. So the formula holds on the lattice as an equality. From there:

- *the other direction*, D_α(μ_0 || (1-q) μ_0 + q μ_v), is not larger: x -> v - x is an involution of Z^d that swaps
  μ_0 and μ_v, which is the premise of their Theorem 5;
- *the rest of the sample*: conditioned on which other units are in it, the pair is the one above shifted by an
  integer vector; the mixture over that is covered by quasi-convexity of D_α;
- *any v with |v|² <= Δ²*: every term grows with |v|².

Composition adds curves (Mironov 2017, Proposition 1), for adaptively chosen mechanisms of fixed curves as well.

Conversion (Canonne, Kamath, Steinke 2020, Proposition 12; Balle et al. 2020, Theorem 21): (α, ρ_α)-RDP gives
(ε, δ)-DP with ε = ρ_α + log((α-1)/α) - (log δ + log α)/(α-1), for every α > 1.

Rounding: sums of floats of relative error < 1e-12; every curve is enlarged by 1e-11 of itself, so none is too low.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

from sordino_common.errors import LocalError
from sordino_common.privacy.mechanism import FULL_SAMPLING, Mechanism

# Fine where ε is of order 1 and δ of order 1e-5 (the best α is 5 to 60), then in steps of 2^(1/4): an order that is off
# by a tenth costs about 1 % of ε. Ledgers store curves at these orders: to change them is to change the format.
ORDERS: Final[tuple[int, ...]] = (
    *range(2, 65),
    *(round(64 * 2 ** (step / 4)) for step in range(1, 25)),  # 76 .. 4096
)
_ROUND_UP: Final = 1.0 + 1e-11

Curve = tuple[float, ...]  # one value for each of ORDERS, nats
ZERO: Final[Curve] = (0.0,) * len(ORDERS)


def curve(mechanism: Mechanism) -> Curve:
    """ρ_α of all of `mechanism.count` releases, at every order of `ORDERS`; nats, never too low."""
    one = _curve_of_one(mechanism.sensitivity_squared, mechanism.sigma_squared, mechanism.sampling_threshold)
    return tuple(value * mechanism.count for value in one)


def compose(curves: Iterable[Curve]) -> Curve:
    """The curve of all of them together: their sum, each order for itself."""
    total = list(ZERO)
    for one in curves:
        if len(one) != len(ORDERS):
            raise LocalError(f"a curve has {len(ORDERS)} orders, got {len(one)}")
        for at, value in enumerate(one):
            total[at] += value
    return tuple(total)


def conversion(order: int, delta: float) -> float:
    """What (α, ρ)-RDP adds to ρ to give ε at `delta`: log((α-1)/α) - (log δ + log α)/(α-1)."""
    if order < 2 or not 0.0 < delta < 1.0:
        raise LocalError(f"conversion: order >= 2 and 0 < delta < 1, got {order} and {delta}")
    return math.log1p(-1.0 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def epsilon_of(spent: Sequence[float], delta: float) -> float:
    """The least ε >= 0 such that the curve `spent` gives (ε, δ)-DP, over `ORDERS`. Data must not choose `spent`:
    where releases are chosen by earlier results, `budget.Budget` is the bound."""
    if len(spent) != len(ORDERS):
        raise LocalError(f"a curve has {len(ORDERS)} orders, got {len(spent)}")
    return max(0.0, min(value + conversion(order, delta) for order, value in zip(ORDERS, spent, strict=True)))


def rdp_at(order: int, *, sensitivity_squared: int, sigma_squared: int, sampling_threshold: int) -> float:
    """ρ_α of one release, by the formula of the module's text; nats. α >= 2."""
    if order < 2:
        raise LocalError(f"the formula holds at integer orders >= 2, not at {order}")
    nu = sensitivity_squared / (2 * sigma_squared)
    if sampling_threshold == FULL_SAMPLING:
        return order * nu * _ROUND_UP
    # A_α - 1 = Σ_{k>=2} C(α,k) (1-q)^(α-k) q^k (e^{k(k-1)ν} - 1): the binomial terms alone add up to 1. In this form a
    # small q loses no digits.
    log_q = math.log(sampling_threshold) - math.log(FULL_SAMPLING)
    log_p = math.log1p(-sampling_threshold / FULL_SAMPLING)
    logs = [
        _log_choose(order, k) + (order - k) * log_p + k * log_q + _log_expm1(k * (k - 1) * nu)
        for k in range(2, order + 1)
    ]
    top = max(logs)
    log_excess = top + math.log(math.fsum(math.exp(value - top) for value in logs))
    log_a = log_excess + math.log1p(math.exp(-log_excess)) if log_excess > 0.0 else math.log1p(math.exp(log_excess))
    return log_a / (order - 1) * _ROUND_UP


@lru_cache(maxsize=256)
def _curve_of_one(sensitivity_squared: int, sigma_squared: int, threshold: int) -> Curve:
    return tuple(
        rdp_at(
            order, sensitivity_squared=sensitivity_squared, sigma_squared=sigma_squared, sampling_threshold=threshold
        )
        for order in ORDERS
    )


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _log_expm1(x: float) -> float:
    """log(e^x - 1) for x > 0."""
    return x + math.log1p(-math.exp(-x)) if x > 1.0 else math.log(math.expm1(x))
