"""Accountants against published figures, exact formulas and direct sums; calibration."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest

from sordino_common.errors import LocalError
from sordino_common.privacy.mechanism import Mechanism, Unit, threshold_of
from sordino_common.privacy.rdp import ORDERS, compose, curve, epsilon_of
from sordino_server.accounting import accountant
from sordino_server.accounting.accountant import account, epsilon_moments, epsilon_pld, epsilon_rdp
from sordino_server.accounting.calibrate import TargetOutOfReach, calibrate, sigma_squared_for

GRID = 1 << 32


def mechanism(q: float, z: float, count: int, *, grid: int = GRID, unit: Unit = "record") -> Mechanism:
    return Mechanism(
        unit=unit,
        sensitivity_squared=grid,
        sigma_squared=sigma_squared_for(z, grid),
        sampling_threshold=threshold_of(q),
        count=count,
    )


# (q, σ, steps, δ, published ε, relative tolerance). The accountants that made the last three also looked at orders
# between the integers, which can only lower ε.
PUBLISHED = {
    "Abadi et al. 2016, section 3.1: 1.26 by the moments accountant": (0.01, 4.0, 10_000, 1.26, 0.004),
    "TensorFlow Privacy, MNIST tutorial, 15 epochs": (250 / 60_000, 1.3, 3_600, 1.18, 0.005),
    "TensorFlow Privacy, MNIST table, 15 epochs": (256 / 60_000, 1.3, 3_515, 1.19, 0.005),
    "TensorFlow Privacy, MNIST table, 60 epochs": (256 / 60_000, 1.1, 14_062, 3.01, 0.005),
    "TensorFlow Privacy, MNIST table, 45 epochs": (256 / 60_000, 0.7, 10_546, 7.10, 0.01),
    "Bu, Dong, Long, Su 2020, figure 4, 20 epochs": (256 / 60_000, 1.3, 4_687, 1.34, 0.01),
    "Bu, Dong, Long, Su 2020, figure 4, 70 epochs": (256 / 60_000, 0.7, 16_406, 8.68, 0.04),
}


@pytest.mark.parametrize("what", PUBLISHED)
def test_published_figures(what: str) -> None:
    q, z, steps, published, tolerance = PUBLISHED[what]
    found = account([mechanism(q, z, steps)], 1e-5)
    assert found.moments == pytest.approx(published, rel=tolerance)
    assert found.pld is not None
    assert found.pld < found.rdp < found.moments


@pytest.mark.parametrize("q", [0.001, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("z", [0.7, 5.0])
@pytest.mark.parametrize("steps", [1, 300])
def test_pld_is_at_most_rdp_and_rdp_at_most_moments(q: float, z: float, steps: int) -> None:
    found = account([mechanism(q, z, steps)], 1e-6)
    assert found.pld is not None
    assert found.pld <= found.rdp <= found.moments * (1 + 1e-9)
    assert found.epsilon == found.pld
    assert found.accountant == "pld"


@pytest.mark.parametrize("q", [2.0**-32, 0.004, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("z", [0.5, 1.1, 8.0])
def test_the_agents_curve_is_dp_accountings(q: float, z: float) -> None:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    one = mechanism(q, z, 7)
    event = dp_accounting.PoissonSampledDpEvent(one.sampling_rate, dp_accounting.GaussianDpEvent(one.noise_multiplier))
    theirs = RdpAccountant(orders=[float(order) for order in ORDERS])
    theirs.compose(event, 7)
    for order, ours, reference in zip(ORDERS, curve(one), theirs._rdp, strict=True):
        # Theirs adds up all binomial terms to 1 + something; what is below 1e-13 of 1 drowns there.
        assert ours == pytest.approx(reference, rel=1e-8, abs=1e-12), order


@pytest.mark.parametrize("z", [0.9, 3.0])
def test_epsilon_of_several_kinds_is_the_agents(z: float) -> None:
    parts = [mechanism(0.01, z, 500), mechanism(1.0, 20.0, 2), mechanism(0.2, 2 * z, 40)]
    ours = epsilon_of(compose(curve(part) for part in parts), 1e-5)
    assert epsilon_rdp(parts, 1e-5) == pytest.approx(ours, rel=1e-8)
    assert epsilon_pld(parts, 1e-5) < ours


def gaussian_delta(mu: float, epsilon: float) -> float:
    """δ(ε) of N(0,1) against N(μ,1): Balle, Wang 2018, Theorem 8."""

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize(("z", "count"), [(1.0, 1), (5.0, 10), (30.0, 1000), (200.0, 1)])
def test_without_sampling_pld_is_the_exact_formula(z: float, count: int) -> None:
    mu = math.sqrt(count) / z
    found = epsilon_pld([mechanism(1.0, z, count)], 1e-5)
    assert gaussian_delta(mu, found) <= 1e-5 * (1 + 1e-6)
    assert gaussian_delta(mu, found * 0.995) > 1e-5


def lattice_delta(epsilon: float, shift: int, sigma_squared: int, q: float, *, twice: bool) -> float:
    """The larger of both hockey-stick divergences of the sampled discrete Gaussian, by sums over Z or Z²."""
    reach = int(9 * math.sqrt(sigma_squared)) + shift
    points = np.arange(-reach, reach + 1, dtype=float)
    zero = np.exp(-(points**2) / (2 * sigma_squared))
    moved = np.exp(-((points - shift) ** 2) / (2 * sigma_squared))
    zero, moved = zero / zero.sum(), moved / moved.sum()
    mixed = (1 - q) * zero + q * moved
    if twice:
        zero, mixed = np.outer(zero, zero), np.outer(mixed, mixed)
    one = np.maximum(0.0, mixed - math.exp(epsilon) * zero).sum()
    other = np.maximum(0.0, zero - math.exp(epsilon) * mixed).sum()
    return float(max(one, other))


@pytest.mark.parametrize("q", [1.0, 0.3])
@pytest.mark.parametrize(("shift", "sigma_squared"), [(32, 1024), (40, 1024), (50, 4096)])
@pytest.mark.parametrize("twice", [False, True])
def test_pld_holds_for_discrete_noise(q: float, shift: int, sigma_squared: int, *, twice: bool) -> None:
    """At the smallest σ² for which it is offered, against direct sums."""
    one = Mechanism(
        unit="record",
        sensitivity_squared=shift**2,
        sigma_squared=sigma_squared,
        sampling_threshold=threshold_of(q),
        count=2 if twice else 1,
    )
    for delta in (1e-3, 1e-5):
        epsilon = epsilon_pld([one], delta)
        assert lattice_delta(epsilon, shift, sigma_squared, one.sampling_rate, twice=twice) <= delta * (1 + 1e-9)
        if epsilon > 0.05:
            assert lattice_delta(epsilon * 0.95, shift, sigma_squared, one.sampling_rate, twice=twice) > delta


@pytest.mark.parametrize("t_squared", [0.15, 0.25, 0.5])
@pytest.mark.parametrize("centre", [0, 3])
def test_discrete_noise_is_nearly_a_post_processing_of_continuous_noise(t_squared: float, centre: int) -> None:
    """The argument of `accountant`, where its error is large enough to be seen: |log ratio| <= log((1+e)/(1-e))."""
    sigma_squared = 4.0
    x = np.linspace(centre - 25, centre + 25, 200_001)
    y = np.arange(-30, 37)
    density = np.exp(-((x - centre) ** 2) / (2 * (sigma_squared - t_squared)))
    density /= density.sum()
    kernel = np.exp(-((y[:, None] - x[None, :]) ** 2) / (2 * t_squared))
    found = (kernel / kernel.sum(axis=0)) @ density
    exact = np.exp(-((y - centre) ** 2) / (2 * sigma_squared))
    exact /= exact.sum()
    decay = math.exp(-2 * math.pi**2 * t_squared)
    e = 2 * decay / (1 - decay)
    allowed = math.log1p(e) - math.log1p(-e)
    worst = np.abs(np.log(found / exact))[np.abs(y - centre) <= 15].max()
    assert worst <= allowed
    assert worst >= 0.05 * allowed or t_squared > 0.2  # and not by much at the smallest t


def test_the_slack_is_added() -> None:
    assert 0.0 < accountant._log_factor() < 1e-135


def test_small_sigmas_go_by_rdp() -> None:
    coarse = Mechanism(unit="record", sensitivity_squared=100, sigma_squared=1023, count=3)
    found = account([coarse], 1e-5)
    assert (found.accountant, found.pld, found.epsilon) == ("rdp", None, found.rdp)
    with pytest.raises(LocalError, match=r"sigma_squared >= 1024, here it is 1023; use a finer grid, or rdp"):
        epsilon_pld([coarse], 1e-5)
    assert account([dataclasses.replace(coarse, sigma_squared=1024)], 1e-5).accountant == "pld"
    assert account([dataclasses.replace(coarse, sigma_squared=1024)], 1e-5, accountant="rdp").accountant == "rdp"


def test_nothing_spent_is_nothing() -> None:
    found = account([], 1e-5)
    assert (found.pld, found.rdp, found.moments) == (0.0, 0.0, 0.0)


def test_two_units_are_not_added_up() -> None:
    with pytest.raises(LocalError, match="one ε speaks of one unit; here are releases of device and record"):
        epsilon_moments([mechanism(1.0, 1.0, 1), mechanism(1.0, 1.0, 1, unit="device")], 1e-5)


def test_order_and_splitting_do_not_matter() -> None:
    whole = epsilon_pld([mechanism(0.1, 2.0, 60)], 1e-5)
    parts = [mechanism(0.1, 2.0, 20), mechanism(0.1, 2.0, 40)]
    assert epsilon_pld(parts, 1e-5) == pytest.approx(whole, rel=1e-3)
    assert epsilon_pld(parts[::-1], 1e-5) == pytest.approx(whole, rel=1e-3)


# --- calibration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "count", "epsilon", "by"),
    [
        (0.1, 60, 0.5, "pld"),
        (1.0, 200, 2.0, "pld"),
        (1.0, 200, 2.0, "rdp"),
        (0.01, 1000, 1.0, "rdp"),
        (1.0, 1, 80.0, "pld"),
    ],
)
def test_calibration_finds_the_least_noise(q: float, count: int, epsilon: float, by: accountant.Accountant) -> None:
    found = calibrate(mechanism(q, 1.0, count), epsilon=epsilon, delta=1e-5, accountant=by)
    assert accountant.epsilon_by([found], 1e-5, by) <= epsilon
    less = dataclasses.replace(found, sigma_squared=found.sigma_squared * 9997 // 10_000)
    assert accountant.epsilon_by([less], 1e-5, by) > epsilon
    assert (found.count, found.sampling_threshold) == (count, threshold_of(q))


def test_calibration_pays_for_what_is_spent() -> None:
    spent = [mechanism(1.0, 30.0, 1)]
    free = calibrate(mechanism(0.1, 1.0, 100), epsilon=1.0, delta=1e-5, accountant="rdp")
    dear = calibrate(mechanism(0.1, 1.0, 100), epsilon=1.0, delta=1e-5, spent=spent, accountant="rdp")
    assert dear.sigma_squared > free.sigma_squared
    assert epsilon_rdp([*spent, dear], 1e-5) <= 1.0


def test_targets_out_of_reach_are_refused_with_the_numbers() -> None:
    with pytest.raises(
        TargetOutOfReach, match=r"epsilon 0.5 at delta 1e-05 can't be kept: what is spent alr.* gives 1\.\d+"
    ):
        calibrate(mechanism(1.0, 1.0, 1), epsilon=0.5, delta=1e-5, spent=[mechanism(1.0, 3.0, 1)])
    with pytest.raises(
        TargetOutOfReach,
        match=r"over 100000000 releases of sampling rate 1: with a noise multiplier of 10000 it is 4\.\d+ by rdp; take",
    ):
        calibrate(mechanism(1.0, 1.0, 100_000_000), epsilon=0.01, delta=1e-5)
    assert TargetOutOfReach.exit_code == 2


def test_sigma_squared_is_never_below_the_multiplier() -> None:
    for z in (0.1, 1.1, 3.3333, 17.0):
        for sensitivity in (1, 97, GRID + 5):
            found = sigma_squared_for(z, sensitivity)
            assert found >= z * z * sensitivity * (1 - 1e-12)
            assert found == 1 or (found - 1) < z * z * sensitivity * (1 + 1e-12)
    with pytest.raises(LocalError, match="noise multiplier of 10000 needs sigma_squared above 2\\^80; lower grid_bits"):
        sigma_squared_for(1e4, 1 << 60)


def test_scipy_is_not_imported_with_the_command() -> None:
    code = (
        "import sys, sordino_server.cli, sordino_server.accounting.accountant, sordino_server.accounting.calibrate\n"
        "sys.exit(any(name in sys.modules for name in ('scipy', 'dp_accounting')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
