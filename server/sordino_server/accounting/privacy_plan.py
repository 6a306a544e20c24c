"""A private job before anything runs: what its guarantee says, and what other noise would cost.

The figures are those of the `Guarantee` that the run itself is given (`sordino_server.guarantee`). It is made here for
a model of one parameter, as no model and no fleet is needed: the noise multiplier and ε are the same for any other,
only the grid's rounding and σ² grow with the model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

from sordino_common.errors import LocalError
from sordino_common.privacy.budget import Budget
from sordino_common.privacy.mechanism import Mechanism, Unit
from sordino_common.privacy.rdp import ZERO, compose, curve
from sordino_server.accounting.accountant import Accountant, Accounted, account
from sordino_server.guarantee import Guarantee, Promise, guarantee_of
from sordino_server.job import Job

_LEVELS: Final = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)  # of the planned noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """ε that another noise multiplier would give, everything else as planned."""

    noise_multiplier: float
    found: Accounted


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPlan:
    """Of one unit. `steps`: all noised releases. `ledger_epsilon`: the least budget of a device, unspent and at this δ,
    that affords all of it by the device's own (Rényi) reckoning."""

    promise: Promise
    delta: float
    steps: Mechanism
    found: Accounted
    levels: tuple[Level, ...]
    ledger_epsilon: float

    @property
    def unit(self) -> Unit:
        return self.steps.unit

    @property
    def target(self) -> float | None:
        """The ε asked for; None if the job states its noise."""
        return self.promise.target

    @property
    def bound(self) -> str:
        """What the noise multiplier multiplies."""
        clip = self.promise.clip_norm
        return "the most that a row can add" if clip is None else f"the clip norm {clip:g}"

    def to_json(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "epsilon": self.found.epsilon,
            "delta": self.delta,
            "accountant": self.found.accountant,
            "target_epsilon": self.target,
            "noise_multiplier": self.steps.noise_multiplier,
            "clip_norm": self.promise.clip_norm,
            "sampling_rate": self.steps.sampling_rate if self.unit == "record" else None,
            "releases": self.steps.count,
            "pld_epsilon": self.found.pld,
            "rdp_epsilon": self.found.rdp,
            "moments_epsilon": self.found.moments,
            "adversary": self.promise.adversary,
            "noise_from": self.promise.noise_from,
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
    guarantee = guarantee_of(job)
    return PrivacyPlan(
        job=spec.job,
        first=_unit_plan(guarantee, guarantee.first),
        second=None if guarantee.second is None else _unit_plan(guarantee, guarantee.second),
        noise_at="aggregate" if spec.mode == "statistics" else privacy.noise_at,
        helpers=0 if spec.secure is None else spec.secure.helpers,
        rounds=spec.train.rounds,
        local_steps=spec.train.local_steps if privacy.unit == "record" else None,
    )


def ledger_epsilon(mechanism: Mechanism, delta: float) -> float:
    """The least ε (within 1 %) of a fresh device budget at `delta` that affords `mechanism`."""
    cost = compose([curve(mechanism)])
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


def _unit_plan(guarantee: Guarantee, promise: Promise) -> UnitPlan:
    delta, accountant = guarantee.delta, guarantee.accountant
    (steps,) = promise.spent(promise.releases)
    return UnitPlan(
        promise=promise,
        delta=delta,
        steps=steps,
        found=account([steps], delta, accountant=accountant),
        levels=tuple(_level(steps, delta, accountant, factor) for factor in _LEVELS),
        ledger_epsilon=ledger_epsilon(steps, delta),
    )


def _level(steps: Mechanism, delta: float, accountant: Accountant, factor: float) -> Level:
    other = dataclasses.replace(steps, sigma_squared=max(1, round(steps.sigma_squared * factor**2)))
    found = account([other], delta, accountant=accountant)
    return Level(noise_multiplier=other.noise_multiplier, found=found)
