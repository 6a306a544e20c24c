"""Zero-concentrated differential privacy: ρ of Gaussian mechanisms, and ρ <-> (ε, δ). Plain Python.

ρ-zCDP (Bun, Steinke 2016) bounds the Rényi curve by the line α ρ. The discrete Gaussian of noise σ² and L2 sensitivity
Δ has ρ = Δ²/(2σ²), exactly as the continuous one (Canonne, Kamath, Steinke 2020, Theorem 14: shifts are integer).
Neighbouring relation: that of the `Mechanism`.
"""

from __future__ import annotations

import math
from typing import Final

from sordino_common.errors import LocalError
from sordino_common.privacy.mechanism import Mechanism

_STEPS: Final = 200  # halvings: more than a float has bits


def rho_of(mechanism: Mechanism) -> float:
    """ρ of all releases of an unsampled mechanism. A Poisson-sampled one has no useful line: `rdp.curve`."""
    if mechanism.sampled:
        raise LocalError(
            f"a mechanism sampled at {mechanism.sampling_rate:g} is not described by one rho; use its Rényi curve"
        )
    return mechanism.count * mechanism.sensitivity_squared / (2 * mechanism.sigma_squared)


def delta_of(rho: float, epsilon: float) -> float:
    """The least δ that ρ-zCDP gives at ε: min over real α > 1 of exp((α-1)(αρ-ε) + α log(1-1/α)) / (α-1).

    Canonne, Kamath, Steinke 2020, Corollary 13; the exponent's derivative (2α-1)ρ - ε + log(1-1/α) grows with α."""
    if rho < 0.0 or epsilon < 0.0:
        raise LocalError(f"rho and epsilon are not negative, got {rho} and {epsilon}")
    if rho == 0.0:
        return 0.0
    low, high = 1.0 + 1e-9, (epsilon + 1.0) / (2.0 * rho) + 2.0
    for _ in range(_STEPS):
        alpha = (low + high) / 2.0
        if (2.0 * alpha - 1.0) * rho - epsilon + math.log1p(-1.0 / alpha) < 0.0:
            low = alpha
        else:
            high = alpha
    alpha = high
    exponent = (alpha - 1.0) * (alpha * rho - epsilon) + alpha * math.log1p(-1.0 / alpha) - math.log(alpha - 1.0)
    return min(1.0, math.exp(min(0.0, exponent)))


def epsilon_of_rho(rho: float, delta: float) -> float:
    """The least ε such that ρ-zCDP gives (ε, δ)-DP; rounded up within the search's last step."""
    _check_delta(delta)
    if rho < 0.0:
        raise LocalError(f"rho is not negative, got {rho}")
    if rho == 0.0:
        return 0.0
    low, high = 0.0, rho + 2.0 * math.sqrt(rho * math.log(1.0 / delta))  # Bun, Steinke 2016, Proposition 1.3
    for _ in range(_STEPS):
        middle = (low + high) / 2.0
        if delta_of(rho, middle) <= delta:
            high = middle
        else:
            low = middle
    return high


def rho_of_epsilon(epsilon: float, delta: float) -> float:
    """The largest ρ whose ρ-zCDP gives (ε, δ)-DP; rounded down within the search's last step."""
    _check_delta(delta)
    if epsilon <= 0.0:
        raise LocalError(f"epsilon is above 0, got {epsilon}")
    low, high = 0.0, epsilon + 1.0  # ρ = ε+1 gives more than δ for every δ < 1/2 or so; checked below
    while delta_of(high, epsilon) <= delta:
        high *= 2.0
        if high > 1e12:
            raise LocalError(f"delta {delta} is so large that it bounds no rho")
    for _ in range(_STEPS):
        middle = (low + high) / 2.0
        if delta_of(middle, epsilon) <= delta:
            low = middle
        else:
            high = middle
    return low


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise LocalError(f"delta lies in (0, 1), got {delta}")
