"""ε of what was released, from the `Mechanism`s that the code which drew sample and noise made.

Three accountants, all for adding or removing one unit (`Mechanism.unit`), Poisson sampling, adaptive composition:

- **rdp**: `dp_accounting.rdp.RdpAccountant` at the integer orders `ORDERS`, where its formula is exact for the discrete
  Gaussian (`sordino_common.privacy.rdp` has the derivation).
- **moments**: Abadi et al. 2016 (arXiv 1607.00133), for comparison with the literature. α(λ) <= λ D_{λ+1}, integer
  λ <= 32, and their tail bound ε = min_λ (T α(λ) + log(1/δ)) / λ (Theorem 2). The paper behind this project used it.
- **pld**: the privacy loss distribution of the *continuous* Gaussian, which needs an argument, because noise here is
  discrete. Let σ² be its variance parameter and t² = 16. The following is a post-processing of continuous noise: take
  X ~ N(v, (σ² - t²) I), then y in Z^d with P(y | X) = exp(-|y - X|²/2t²) / z(X). By Poisson summation every
  coordinate of the normalizer is z = √(2π) t (1 + u) with |u| <= e = 2 exp(-2π²t²) / (1 - exp(-2π²t²)), whatever X is.
  Numerators integrate over X to the density of N(v, σ² I) at y. Hence P(y) is N(y; v, σ²) up to a factor in
  [1/(1+e), 1/(1-e)] for each coordinate; and N_Z(v, σ²), v integer, is N(y; v, σ²) over a normalizer that is 1 up to
  1 ± e (it does not depend on v). So the discrete mechanism is within F^±1 of that post-processing, pointwise,
  F = ((1+e)/(1-e))^d for each release. If the continuous mechanism at σ² - t² is (ε, δ)-DP, the discrete one at σ² is
  (ε + 2 n log F, F^n δ)-DP after n releases, adaptive ones too, since the bound holds for every conditional
  distribution. At t² = 16, e < 10^-136: with d <= 2^40 the slack is far below a float's last digit, but it is added.
  What it costs is t²/σ² of the variance, nothing at a grid of 2^16. Where σ² < 1024 (grids of a few steps) `pld`
  refuses and `account` takes rdp.

Not done: amplification by the choice of participants (the server chooses them), or by shuffling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal

from sordino_common.errors import LocalError
from sordino_common.privacy.mechanism import Mechanism
from sordino_common.privacy.rdp import ORDERS, compose, curve, epsilon_of, rdp_at

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

Accountant = Literal["pld", "rdp"]
PLD_LEAST_SIGMA_SQUARED: Final = 1024
_T_SQUARED: Final = 16
_MAX_DIMENSION: Final = 1 << 40
_LAMBDAS: Final = range(1, 33)
# The grid of privacy losses: so fine beside ε that PLD's rounding (always up) is below 0.1 %, or below 1 % where the
# losses of one release range so much further than ε that such a grid would have too many points.
_FINE, _COARSE, _MOST_POINTS = 20_000, 1_000, 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounted:
    """ε at `delta` by each accountant. `epsilon` is that of `accountant`; `pld` is None where it doesn't apply."""

    delta: float
    accountant: Accountant
    epsilon: float
    pld: float | None
    rdp: float
    moments: float


def account(mechanisms: Sequence[Mechanism], delta: float, *, accountant: Accountant = "pld") -> Accounted:
    """ε of all of `mechanisms` together, of one unit. PLD where it applies, else RDP; `accountant` says which."""
    rdp = epsilon_rdp(mechanisms, delta)
    pld = epsilon_pld(mechanisms, delta) if pld_applies(mechanisms) else None
    use_pld = accountant == "pld" and pld is not None
    return Accounted(
        delta=delta,
        accountant="pld" if use_pld else "rdp",
        epsilon=pld if use_pld and pld is not None else rdp,
        pld=pld,
        rdp=rdp,
        moments=epsilon_moments(mechanisms, delta),
    )


def epsilon_by(mechanisms: Sequence[Mechanism], delta: float, accountant: Accountant) -> float:
    """`account(...).epsilon` without the other figures."""
    if accountant == "pld" and pld_applies(mechanisms):
        return epsilon_pld(mechanisms, delta)
    return epsilon_rdp(mechanisms, delta)


def pld_applies(mechanisms: Sequence[Mechanism]) -> bool:
    """Whether every σ² is large enough for the argument of the module's text."""
    return all(mechanism.sigma_squared >= PLD_LEAST_SIGMA_SQUARED for mechanism in mechanisms)


def epsilon_rdp(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """ε by Rényi divergences at integer orders."""
    _check(mechanisms, delta)
    if not mechanisms:
        return 0.0
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders=[float(order) for order in ORDERS])
    for mechanism in mechanisms:
        event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(mechanism.noise_multiplier)
        if mechanism.sampled:
            event = dp_accounting.PoissonSampledDpEvent(mechanism.sampling_rate, event)
        accountant.compose(event, mechanism.count)
    return float(accountant.get_epsilon(delta))


def epsilon_moments(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """ε by the moments accountant of 2016, for comparison only."""
    _check(mechanisms, delta)
    if not mechanisms:
        return 0.0
    return min(
        (lam * sum(_rdp(mechanism, lam + 1) for mechanism in mechanisms) + math.log(1.0 / delta)) / lam
        for lam in _LAMBDAS
    )


def epsilon_pld(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """ε by the privacy loss distribution, never too low. Raises `LocalError` where it doesn't apply."""
    _check(mechanisms, delta)
    if not mechanisms:
        return 0.0
    if not pld_applies(mechanisms):
        least = min(mechanism.sigma_squared for mechanism in mechanisms)
        raise LocalError(
            f"the PLD of discrete noise is bounded for sigma_squared >= {PLD_LEAST_SIGMA_SQUARED}, here it is {least}; "
            "use a finer grid, or rdp"
        )
    return _epsilon_pld(tuple(mechanisms), delta)


@lru_cache(maxsize=1024)  # a plan, a run's label and every look at what it has spent ask for the same, seconds each
def _epsilon_pld(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    log_factor = _MAX_DIMENSION * sum(mechanism.count for mechanism in mechanisms) * _log_factor()
    rough = epsilon_of(compose(curve(mechanism) for mechanism in mechanisms), delta)
    sampled = [mechanism for mechanism in mechanisms if mechanism.sampled]
    widest = max((_largest_loss(mechanism) for mechanism in sampled), default=math.inf)
    interval = min(1e-3, max(1e-9, rough / _FINE, min(widest / _MOST_POINTS, rough / _COARSE)))
    # Unsampled Gaussians compose to one: their μ² = Δ²/σ² add up (Dong, Roth, Su 2019, Corollary 3.3).
    mu_squared = math.fsum(
        mechanism.count * mechanism.sensitivity_squared / (mechanism.sigma_squared - _T_SQUARED)
        for mechanism in mechanisms
        if not mechanism.sampled
    )
    parts = [
        _distribution(_deviation(mechanism), mechanism.sampling_rate, mechanism.count, interval)
        for mechanism in sampled
    ]
    if mu_squared > 0.0:
        parts.append(_distribution(1.0 / math.sqrt(mu_squared), 1.0, 1, interval))
    total = parts[0]
    for part in parts[1:]:
        total = total.compose(part)
    epsilon = float(total.get_epsilon_for_delta(delta * math.exp(-log_factor)))
    return epsilon + 2.0 * log_factor


def _deviation(mechanism: Mechanism) -> float:
    """The noise multiplier of the continuous mechanism that the discrete one is compared with."""
    return math.sqrt((mechanism.sigma_squared - _T_SQUARED) / mechanism.sensitivity_squared)


def _distribution(deviation: float, rate: float, count: int, interval: float) -> PrivacyLossDistribution:
    from dp_accounting.pld import privacy_loss_distribution

    one: Any = privacy_loss_distribution.from_gaussian_mechanism(
        deviation, sampling_prob=rate, value_discretization_interval=interval, pessimistic_estimate=True
    )
    return one.self_compose(count) if count > 1 else one


def _largest_loss(mechanism: Mechanism) -> float:
    """About the largest privacy loss of one release within ten standard deviations."""
    mu = 1.0 / mechanism.noise_multiplier
    exponent = min(700.0, 10.0 * mu + mu * mu / 2.0)
    return math.log1p(mechanism.sampling_rate * math.expm1(exponent))


def _log_factor() -> float:
    """log((1+e)/(1-e)) for one coordinate of one release."""
    decay = math.exp(-2.0 * math.pi**2 * _T_SQUARED)
    e = 2.0 * decay / (1.0 - decay)
    return math.log1p(e) - math.log1p(-e)


def _rdp(mechanism: Mechanism, order: int) -> float:
    return mechanism.count * _rdp_of_one(
        order, mechanism.sensitivity_squared, mechanism.sigma_squared, mechanism.sampling_threshold
    )


@lru_cache(maxsize=4096)
def _rdp_of_one(order: int, sensitivity_squared: int, sigma_squared: int, threshold: int) -> float:
    return rdp_at(
        order, sensitivity_squared=sensitivity_squared, sigma_squared=sigma_squared, sampling_threshold=threshold
    )


def _check(mechanisms: Sequence[Mechanism], delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise LocalError(f"delta lies in (0, 1), got {delta}")
    units = sorted({mechanism.unit for mechanism in mechanisms})
    if len(units) > 1:
        raise LocalError(f"one ε speaks of one unit; here are releases of {' and '.join(units)}")
