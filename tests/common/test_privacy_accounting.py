"""Mechanisms, their Rényi curves on the lattice, ρ, and budgets as filters."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sordino_common.errors import LocalError
from sordino_common.privacy.budget import Budget
from sordino_common.privacy.mechanism import FULL_SAMPLING, Mechanism, threshold_of
from sordino_common.privacy.rdp import ORDERS, ZERO, compose, conversion, curve, epsilon_of, rdp_at
from sordino_common.privacy.zcdp import delta_of, epsilon_of_rho, rho_of, rho_of_epsilon


def lattice_divergences(order: int, centre: tuple[int, ...], sigma_squared: int, q: float) -> tuple[float, float]:
    """(D_α(mixture || μ_0), D_α(μ_0 || mixture)) by summing over Z^d, in logs."""
    reach = int(14 * math.sqrt(sigma_squared)) + order * max(abs(v) for v in centre) + 5
    axes = [np.arange(-reach, reach + 1, dtype=float)] * len(centre)
    points = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")])

    def log_mass(shift: tuple[int, ...]) -> np.ndarray:
        exponent = -((points - np.array(shift, dtype=float)[:, None]) ** 2).sum(axis=0) / (2 * sigma_squared)
        return exponent - np.logaddexp.reduce(exponent)

    zero = log_mass((0,) * len(centre))
    mixture = np.logaddexp(math.log1p(-q) + zero, math.log(q) + log_mass(centre)) if q < 1.0 else log_mass(centre)
    forward = np.logaddexp.reduce(order * mixture + (1 - order) * zero) / (order - 1)
    backward = np.logaddexp.reduce(order * zero + (1 - order) * mixture) / (order - 1)
    return float(forward), float(backward)


@pytest.mark.parametrize("order", [2, 3, 7, 20])
@pytest.mark.parametrize(
    ("centre", "sigma_squared"), [((1,), 1), ((1,), 2), ((3,), 5), ((5,), 40), ((1, 2), 3), ((2, -1), 9)]
)
@pytest.mark.parametrize("q", [1.0, 0.5, 0.01])
def test_the_curve_is_the_sum_over_the_lattice(
    order: int, centre: tuple[int, ...], sigma_squared: int, q: float
) -> None:
    if len(centre) == 2 and order > 7:
        order = 7  # the grid of points grows with its square
    threshold = threshold_of(q)
    formula = rdp_at(
        order,
        sensitivity_squared=sum(v * v for v in centre),
        sigma_squared=sigma_squared,
        sampling_threshold=threshold,
    )
    forward, backward = lattice_divergences(order, centre, sigma_squared, threshold / FULL_SAMPLING)
    assert formula == pytest.approx(forward, rel=1e-9)
    assert backward <= forward * (1 + 1e-9)


def test_at_a_centre_off_the_lattice_it_would_not_hold() -> None:
    # Why f has to be integer-valued: at σ² = 1/8 (not offered) and a shift of 1/2 the normalizers differ.
    points = np.arange(-60, 61, dtype=float)
    zero = -4 * points**2
    half = -4 * (points - 0.5) ** 2
    zero, half = zero - np.logaddexp.reduce(zero), half - np.logaddexp.reduce(half)
    found = float(np.logaddexp.reduce(2 * half - zero))
    assert abs(found - 2 * 0.25 / (2 / 8)) > 0.05


@given(st.integers(1, FULL_SAMPLING), st.floats(0.3, 50.0), st.integers(1, 5000))
@settings(max_examples=60, deadline=None)
def test_curves_grow_with_order_and_count_and_add_up(threshold: int, multiplier: float, count: int) -> None:
    sigma_squared = max(1, round(multiplier**2 * (1 << 20)))
    one = Mechanism(
        unit="record", sensitivity_squared=1 << 20, sigma_squared=sigma_squared, sampling_threshold=threshold
    )
    many = curve(dataclasses.replace(one, count=count))
    assert many == pytest.approx(tuple(count * value for value in curve(one)))
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(curve(one)))
    full = curve(dataclasses.replace(one, sampling_threshold=FULL_SAMPLING))
    assert all(a <= b * (1 + 1e-9) for a, b in zip(curve(one), full, strict=True))
    assert compose([many, ZERO, many]) == tuple(2 * value for value in many)


def test_small_rates_lose_no_digits() -> None:
    # D_2 = log(1 + q² (e^(1/σ²) - 1)) at Δ = 1: at q = 2^-32 the argument of the log is 1 to within a float.
    got = rdp_at(2, sensitivity_squared=1, sigma_squared=1, sampling_threshold=1)
    assert got == pytest.approx(math.expm1(1.0) * 2.0**-64, rel=1e-9)


@pytest.mark.parametrize("order", [2, 5, 64, 4096])
def test_conversion_is_the_published_one(order: int) -> None:
    # Canonne, Kamath, Steinke 2020, Proposition 12, solved for δ: exp((α-1)(ρ-ε)) (1-1/α)^α / (α-1).
    rho, delta = 0.3, 1e-6
    epsilon = rho + conversion(order, delta)
    log_delta = (order - 1) * (rho - epsilon) + order * math.log1p(-1 / order) - math.log(order - 1)
    assert log_delta == pytest.approx(math.log(delta), rel=1e-9)


@pytest.mark.parametrize("rho", [1e-4, 0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 0.01])
def test_rho_and_epsilon_are_inverse(rho: float, delta: float) -> None:
    epsilon = epsilon_of_rho(rho, delta)
    assert delta_of(rho, epsilon) <= delta * (1 + 1e-9)
    if epsilon > 1e-9:  # below, δ alone pays for ρ
        assert rho_of_epsilon(epsilon, delta) == pytest.approx(rho, rel=1e-6)
    assert epsilon <= rho + 2 * math.sqrt(rho * math.log(1 / delta))  # the plain conversion, Bun and Steinke 2016
    orders = min(order * rho + conversion(order, delta) for order in ORDERS)
    assert epsilon <= max(1e-9, orders * (1 + 1e-9))
    if epsilon > 0.02:
        assert orders <= epsilon * (1.02 if rho <= 1.0 else 1.07)  # what integer orders cost


def exact_delta(rho: float, epsilon: float) -> float:
    """δ(ε) of the continuous Gaussian (Balle, Wang 2018), μ = √(2ρ)."""
    mu = math.sqrt(2 * rho)

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize("rho", [0.01, 0.1, 1.0])
def test_the_bounds_are_above_the_exact_gaussian(rho: float) -> None:
    epsilon = epsilon_of_rho(rho, 1e-5)
    assert exact_delta(rho, epsilon) <= 1e-5
    assert exact_delta(rho, epsilon * 0.85) > 1e-5  # and not far above it


def test_rho_of_a_mechanism() -> None:
    mechanism = Mechanism(unit="device", sensitivity_squared=9, sigma_squared=4, count=5)
    assert rho_of(mechanism) == 5 * 9 / 8
    assert curve(mechanism) == pytest.approx(tuple(order * 5 * 9 / 8 for order in ORDERS))
    with pytest.raises(LocalError, match=r"sampled at 0.5 is not described by one rho; use its Rényi curve"):
        rho_of(dataclasses.replace(mechanism, sampling_threshold=1 << 31))


def line(rho: float) -> tuple[float, ...]:
    return tuple(order * rho for order in ORDERS)


@pytest.mark.parametrize("rho", [1e-4, 0.005, 0.1, 0.5, 2.0, 20.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5])
def test_a_budget_of_rho_affords_rho_and_no_more(rho: float, delta: float) -> None:
    budget = Budget.of_rho(rho, delta)
    assert budget.affords(ZERO, line(rho))
    assert budget.affords(line(rho * 0.75), line(rho * 0.25))
    assert not budget.affords(line(rho), line(rho * 0.01))
    assert not budget.affords(ZERO, line(rho * 1.01))
    assert epsilon_of_rho(rho, delta) <= budget.epsilon
    if rho >= 0.005:
        assert budget.epsilon <= 1.08 * epsilon_of_rho(rho, delta)  # the price of being safe against any choice


@pytest.mark.parametrize(("q", "multiplier", "count"), [(0.01, 1.0, 5_000), (0.1, 4.0, 800), (0.004, 0.8, 10_000)])
def test_a_budget_of_epsilon_is_nearly_used_up_by_sampled_steps(q: float, multiplier: float, count: int) -> None:
    steps = Mechanism(
        unit="record",
        sensitivity_squared=1 << 32,
        sigma_squared=round(multiplier**2 * (1 << 32)),
        sampling_threshold=threshold_of(q),
        count=count,
    )
    plain = epsilon_of(curve(steps), 1e-5)
    assert Budget(epsilon=plain * 1.2, delta=1e-5).affords(ZERO, curve(steps))
    assert not Budget(epsilon=plain, delta=1e-5).affords(ZERO, curve(steps))


def test_a_filter_holds_when_costs_are_chosen_by_results() -> None:
    """δ of two Gaussian releases where the second's noise depends on the first's result, by integration.

    An order that is chosen by the result at full δ would be allowed about twice as much at some of these points."""
    delta, worst = 1e-3, 0.0
    budget = Budget(epsilon=1.0, delta=delta)
    spent_limit = next(rho for rho in np.arange(0.2, 0.0, -1e-4) if budget.affords(ZERO, line(float(rho))))
    for share in (0.1, 0.3, 0.6, 0.9):
        first = spent_limit * share
        second = spent_limit - first
        mu1 = math.sqrt(2 * first)
        z = np.linspace(-9, 9 + mu1, 20_001)
        loss = mu1 * (z - mu1 / 2)  # of the first release, under P = N(μ, 1)
        density = np.exp(-((z - mu1) ** 2) / 2) / math.sqrt(2 * math.pi)
        for threshold in np.linspace(-2, 4, 13):
            go_on = loss > threshold
            ended = np.maximum(0.0, 1 - np.exp(np.minimum(0.0, 1.0 - loss)))
            # E over the second release of (1 - e^(ε - L1 - L2))₊ is the Gaussian's own δ at ε - L1.
            further = np.array([exact_delta(second, 1.0 - value) for value in loss])
            worst = max(worst, float(np.trapezoid(np.where(go_on, further, ended) * density, z)))
    assert 0.05 * delta < worst <= delta


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 1e-5), (-1.0, 1e-5), (1.0, 0.0), (1.0, 0.5), (math.nan, 0.1)])
def test_budgets_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(LocalError, match=r"a budget has 0 < epsilon <= 1e6 and 0 < delta < 0.5"):
        Budget(epsilon=epsilon, delta=delta)


def test_curves_of_another_length_or_not_finite_are_refused() -> None:
    budget = Budget(epsilon=1.0, delta=1e-5)
    for bad in ((1.0,), (math.inf,) * len(ORDERS), (math.nan,) * len(ORDERS), (-1.0,) * len(ORDERS)):
        with pytest.raises(LocalError, match="finite values >= 0, one for each order"):
            budget.affords(ZERO, bad)
    assert budget.epsilon_of(ZERO) == 0.0


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("unit", "row", "the unit is record or device, not 'row'"),
        ("sigma_squared", 0, r"sigma_squared is an int in \[1, "),
        ("sigma_squared", 2.0, "got 2.0"),
        ("sigma_squared", True, "got True"),
        ("sensitivity_squared", 0, r"sensitivity_squared is an int in \[1, "),
        ("sampling_threshold", 0, r"sampling_threshold is an int in \[1, 4294967296\], got 0"),
        ("sampling_threshold", FULL_SAMPLING + 1, "got 4294967297"),
        ("count", 0, r"count is an int in \[1, "),
    ],
)
def test_mechanisms_refused(field: str, value: Any, text: str) -> None:
    good = Mechanism(unit="record", sensitivity_squared=4, sigma_squared=9)
    assert good.noise_multiplier == 1.5
    with pytest.raises(LocalError, match=text):
        dataclasses.replace(good, **{field: value})


def test_thresholds() -> None:
    assert threshold_of(1.0) == FULL_SAMPLING
    assert threshold_of(0.25) == 1 << 30
    assert threshold_of(1e-12) == 1
    for rate in (0.0, 1.1, math.nan):
        with pytest.raises(LocalError, match=r"a sampling rate lies in \(0, 1\]"):
            threshold_of(rate)


def test_ledgers_need_no_numpy() -> None:
    import subprocess
    import sys

    code = (
        "import sys, sordino_common.privacy.budget, sordino_common.privacy.rdp, sordino_common.privacy.zcdp\n"
        "sys.exit('numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
