"""The least noise that keeps a target (ε, δ), beside what is spent already."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache, partial
from typing import Final

from sordino_common.errors import ConfigError, LocalError
from sordino_common.privacy.mechanism import MAX_SIGMA_SQUARED, Mechanism
from sordino_common.privacy.rdp import compose, curve, epsilon_of
from sordino_server.accounting.accountant import Accountant, epsilon_by

MAX_NOISE_MULTIPLIER: Final = 10_000
_TOLERANCE: Final = 10_000  # σ² is found to within 1/10,000 of itself, on the side of more noise


class TargetOutOfReach(ConfigError):
    """No noise that is offered keeps the target. The text has the numbers."""

    code = "privacy-target"


def sigma_squared_for(noise_multiplier: float, sensitivity_squared: int) -> int:
    """The least integer σ² with σ/Δ >= `noise_multiplier`. Raises `LocalError` if it is beyond the sampler."""
    squared = Fraction(noise_multiplier) ** 2 * sensitivity_squared
    sigma_squared = max(1, -(-squared.numerator // squared.denominator))
    if sigma_squared > MAX_SIGMA_SQUARED:
        raise LocalError(f"a noise multiplier of {noise_multiplier:g} needs sigma_squared above 2^80; lower grid_bits")
    return sigma_squared


def calibrate(
    template: Mechanism,
    *,
    epsilon: float,
    delta: float,
    spent: Sequence[Mechanism] = (),
    accountant: Accountant = "pld",
) -> Mechanism:
    """`template` with the least `sigma_squared` (within 1/10,000 of it) such that it and `spent` are (ε, δ)-DP.

    Which σ² the template has doesn't matter. Raises `TargetOutOfReach` if `spent` alone passes the target, or if it
    takes a noise multiplier above 10,000."""
    already = epsilon_by(spent, delta, accountant)
    if spent and already >= epsilon:
        raise TargetOutOfReach(
            f"epsilon {epsilon:g} at delta {delta:g} can't be kept: what is spent already gives {already:.4g}"
        )

    @cache
    def at(sigma_squared: int) -> float:
        return epsilon_by([*spent, dataclasses.replace(template, sigma_squared=sigma_squared)], delta, accountant)

    most = min(MAX_SIGMA_SQUARED, MAX_NOISE_MULTIPLIER**2 * template.sensitivity_squared)
    rough = partial(_rough, template, spent, delta)
    if (found := rough(most)) > epsilon:
        raise TargetOutOfReach(
            f"epsilon {epsilon:g} at delta {delta:g} can't be kept over {template.count} releases of sampling rate "
            f"{template.sampling_rate:g}: with a noise multiplier of {(most / template.sensitivity_squared) ** 0.5:g} "
            f"it is {found:.4g} by rdp; take fewer rounds or local steps, a lower sampling_rate, or a larger epsilon"
        )
    high = _search(rough, epsilon, template.sensitivity_squared, 1, most)
    while at(high) > epsilon:  # where the last digits differ, or the grid of pld costs more than pld gains
        high = min(most, high + max(1, high // 1000))
    if accountant == "pld":
        low = max(1, high // 2)
        while low > 1 and at(low) <= epsilon:
            low, high = max(1, low // 2), low
        high = _search(at, epsilon, high, low, high)
    return dataclasses.replace(template, sigma_squared=high)


def _rough(template: Mechanism, spent: Sequence[Mechanism], delta: float, sigma_squared: int) -> float:
    """The rdp figure by our own curves: the same as `dp-accounting`'s, and fast."""
    curves = [curve(one) for one in (*spent, dataclasses.replace(template, sigma_squared=sigma_squared))]
    return epsilon_of(compose(curves), delta)


def _search(at: Callable[[int], float], epsilon: float, guess: int, low: int, high: int) -> int:
    """The least σ² in (low, high] with at(σ²) <= `epsilon`, to within the tolerance, on the side of more noise.

    `at` falls; at(high) <= epsilon. Where `low` also keeps the target it is the answer. False position on logarithms
    (ε is nearly a power of σ), with halving when an end stays where it is (Illinois)."""
    if (at_low := at(low)) <= epsilon:
        return low
    at_high = at(high)
    weight_low, weight_high = math.log(at_low / epsilon), math.log(max(at_high, 1e-300) / epsilon)
    middle = guess if low < guess < high else 0
    while high - low > max(1, high // _TOLERANCE):
        if not middle:
            share = weight_low / (weight_low - weight_high)
            # Aim a quarter of the tolerance beyond the root, so that the last step ends the search from both sides.
            middle = round(math.exp(math.log(low) + share * math.log(high / low)) * (1 + 0.25 / _TOLERANCE))
            middle = min(high - 1, max(low + 1, middle))
        value = at(middle)
        if value <= epsilon:
            high, weight_high, weight_low = middle, math.log(max(value, 1e-300) / epsilon), weight_low / 2
        else:
            low, weight_low, weight_high = middle, math.log(value / epsilon), weight_high / 2
        middle = 0
    return high
