"""A private job before anything runs: its releases, their ε, and what other noise would cost.

The noise is stated relative to the clip norm, so no model and no fleet is needed: mechanisms here have the nominal
sensitivity of the grid, 2^grid_bits. What a run reports comes from the mechanisms that it has drawn from, whose
sensitivity has the (computed) rounding of the grid in it, at the same noise multiplier.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

from sordino_common.errors import LocalError
from sordino_common.privacy.budget import Budget
from sordino_common.privacy.mechanism import FULL_SAMPLING, Mechanism, Unit, threshold_of
from sordino_common.privacy.rdp import ZERO, compose, curve
from sordino_common.privacy.zcdp import rho_of_epsilon
from sordino_server.accounting.accountant import Accounted, account, epsilon_by
from sordino_server.accounting.calibrate import TargetOutOfReach, calibrate, sigma_squared_for
from sordino_server.job import Job, JobSpec
from sordino_server.job_privacy import DevicePrivacySpec, PrivacySpec, scaled_by_fleet

_LEVELS: Final = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)  # of the planned noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """ε that another noise multiplier would give, everything else as planned."""

    noise_multiplier: float
    found: Accounted


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPlan:
    """Of one unit. `target`: the ε asked for, None if the job states its noise. `steps`: all noised releases of
    training; `scaling`: the release of scaling constants, if the job makes one. `ledger_epsilon`: the least
    budget of a device, unspent and at this δ, that affords all of it by the device's own (Rényi) reckoning."""

    unit: Unit
    target: float | None
    delta: float
    clip_norm: float
    steps: Mechanism
    scaling: Mechanism | None
    found: Accounted
    levels: tuple[Level, ...]
    ledger_epsilon: float

    @property
    def bound(self) -> str:
        """What the noise multiplier multiplies."""
        return f"the clip norm {self.clip_norm:g}" if self.clip_norm else "the most that a row can add"

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        return (self.steps,) if self.scaling is None else (self.scaling, self.steps)

    def to_json(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "epsilon": self.found.epsilon,
            "delta": self.delta,
            "accountant": self.found.accountant,
            "target_epsilon": self.target,
            "noise_multiplier": self.steps.noise_multiplier,
            "clip_norm": self.clip_norm or None,
            "sampling_rate": self.steps.sampling_rate if self.unit == "record" else None,
            "releases": self.steps.count,
            "pld_epsilon": self.found.pld,
            "rdp_epsilon": self.found.rdp,
            "moments_epsilon": self.found.moments,
            "scaling_noise_multiplier": None if self.scaling is None else self.scaling.noise_multiplier,
            "ledger_epsilon": self.ledger_epsilon,
            "levels": [
                {
                    "noise_multiplier": level.noise_multiplier,
                    "epsilon": level.found.epsilon,
                    "pld_epsilon": level.found.pld,
                    "rdp_epsilon": level.found.rdp,
                    "moments_epsilon": level.found.moments,
                }
                for level in self.levels
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyPlan:
    """`second`: of devices, for a job that protects records and devices. `helpers`: 0 without a secure sum."""

    job: str
    first: UnitPlan
    second: UnitPlan | None
    noise_at: str
    helpers: int
    rounds: int
    local_steps: int | None


def plan_privacy(job: Job) -> PrivacyPlan:
    """The plan of a job with a `privacy` block. Raises `ConfigError` at its line if there is none, or if no noise
    keeps the target."""
    spec = job.spec
    privacy = spec.privacy
    if privacy is None:
        raise job.error("mode", "this job has no privacy block: there is nothing to plan")
    try:
        first = _unit_plan(spec, privacy, privacy, privacy.unit)
    except TargetOutOfReach as error:
        raise job.error("privacy.epsilon", str(error)) from None
    second = None
    if privacy.device is not None:
        try:
            second = _unit_plan(spec, privacy, privacy.device, "device")
        except TargetOutOfReach as error:
            raise job.error("privacy.device.epsilon", str(error)) from None
    return PrivacyPlan(
        job=spec.job,
        first=first,
        second=second,
        noise_at="aggregate" if spec.mode == "statistics" else privacy.noise_at,
        helpers=0 if spec.secure is None else spec.secure.helpers,
        rounds=spec.train.rounds,
        local_steps=spec.train.local_steps if privacy.unit == "record" else None,
    )


def ledger_epsilon(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """The least ε (within 1 %) of a fresh device budget at `delta` that affords all of `mechanisms`."""
    cost = compose(curve(mechanism) for mechanism in mechanisms)
    high = 1e-3
    while not Budget(epsilon=high, delta=delta).affords(ZERO, cost):
        high *= 2.0
        if high > 1e6:
            raise LocalError("no budget affords these releases")
    low = high / 2.0
    while high > low * 1.01:
        middle = (low + high) / 2.0
        low, high = (low, middle) if Budget(epsilon=middle, delta=delta).affords(ZERO, cost) else (middle, high)
    return high


def _unit_plan(spec: JobSpec, privacy: PrivacySpec, block: PrivacySpec | DevicePrivacySpec, unit: Unit) -> UnitPlan:
    nominal = 1 << (2 * privacy.grid_bits)
    local_steps = spec.train.local_steps or 1
    template = Mechanism(
        unit=unit,
        sensitivity_squared=nominal,
        sigma_squared=nominal,
        sampling_threshold=threshold_of(privacy.sampling_rate or 1.0) if unit == "record" else FULL_SAMPLING,
        count=spec.train.rounds * (local_steps if unit == "record" else 1),
    )
    scales = block is privacy and scaled_by_fleet(spec)
    scaling: Mechanism | None = None
    if block.noise_multiplier is not None:
        steps = dataclasses.replace(template, sigma_squared=sigma_squared_for(block.noise_multiplier, nominal))
        if scales:
            # Training alone is worth ρ; it has the rest of the share.
            rho = rho_of_epsilon(epsilon_by([steps], privacy.delta, privacy.accountant), privacy.delta)
            scaling = _scaling(template, rho * privacy.standardize_share / (1.0 - privacy.standardize_share))
    else:
        assert block.epsilon is not None
        if scales:
            rho = rho_of_epsilon(block.epsilon, privacy.delta)
            scaling = _scaling(template, rho * privacy.standardize_share)
        steps = calibrate(
            template,
            epsilon=block.epsilon,
            delta=privacy.delta,
            spent=() if scaling is None else (scaling,),
            accountant=privacy.accountant,
        )
    mechanisms = (steps,) if scaling is None else (scaling, steps)
    return UnitPlan(
        unit=unit,
        target=block.epsilon,
        delta=privacy.delta,
        clip_norm=block.clip_norm,
        steps=steps,
        scaling=scaling,
        found=account(mechanisms, privacy.delta, accountant=privacy.accountant),
        levels=tuple(_level(steps, scaling, privacy, factor) for factor in _LEVELS),
        ledger_epsilon=ledger_epsilon(mechanisms, privacy.delta),
    )


def _scaling(template: Mechanism, rho: float) -> Mechanism:
    """One unsampled release worth ρ = Δ²/(2σ²)."""
    sigma_squared = max(1, round(template.sensitivity_squared / (2.0 * rho)))
    return dataclasses.replace(template, sigma_squared=sigma_squared, sampling_threshold=FULL_SAMPLING, count=1)


def _level(steps: Mechanism, scaling: Mechanism | None, privacy: PrivacySpec, factor: float) -> Level:
    other = dataclasses.replace(steps, sigma_squared=max(1, round(steps.sigma_squared * factor**2)))
    mechanisms = (other,) if scaling is None else (scaling, other)
    found = account(mechanisms, privacy.delta, accountant=privacy.accountant)
    return Level(noise_multiplier=other.noise_multiplier, found=found)
