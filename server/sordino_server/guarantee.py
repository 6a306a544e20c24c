"""What a private job promises, and what its run has spent: from the very mechanisms that devices and helpers use.

A release of the unit *record* is a step's sum over a Poisson sample, on the grid: Δ² = `privacy.rows.row_bound`. Of the
unit *device* it is a clipped update on the grid: Δ² = `privacy.grid_bound`. Both follow from the number of
parameters and grid_bits alone, so server and device compute them each for themselves, and a device charges its own
ledger with its own. Of a statistics job it is the one sum of all answers: Δ² = `privacy.row_queries`. σ² is one
party's noise: in a secure sum every helper and the server add it, of which one honest party's counts; so the sum holds
(helpers + 1) times as much. The guarantee composes every release that was begun (`rounds.releases`), void ones
included. `sordino privacy plan` prints this same object's figures, before there is a model (`accounting.privacy_plan`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sordino_common.errors import LocalError
from sordino_common.messages import RecordTerms
from sordino_common.privacy.grid_bound import grid_bound
from sordino_common.privacy.mechanism import Mechanism, Unit, threshold_of
from sordino_common.privacy.row_queries import sensitivity_squared
from sordino_common.privacy.rows import row_bound
from sordino_server.accounting.accountant import Accountant, account
from sordino_server.accounting.adversary import NOT_COVERED, adversary
from sordino_server.accounting.calibrate import TargetOutOfReach, calibrate, sigma_squared_for
from sordino_server.job import Job, JobSpec
from sordino_server.job_privacy import DevicePrivacySpec, PrivacySpec
from sordino_server.job_statistics import queries_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """Of one unit. `one`: the mechanism of one release, of which `releases` are planned. `target`: the ε asked for,
    None if the job states the noise. `clip_norm`: None where public ranges bound what a row adds. `adversary`: whom it
    holds against."""

    one: Mechanism
    releases: int
    target: float | None
    clip_norm: float | None
    noise_from: str
    adversary: str

    @property
    def clip(self) -> float:
        """The clip norm of a promise that has one."""
        if self.clip_norm is None:
            raise LocalError("this promise has no clip norm: ranges bound what a row adds")
        return self.clip_norm

    def spent(self, begun: int) -> tuple[Mechanism, ...]:
        """All of `begun` releases."""
        return (replace(self.one, count=self.one.count * begun),) if begun else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarantee:
    """`first`: of the job's unit. `second`: of devices, where a job protects records and devices."""

    first: Promise
    second: Promise | None
    delta: float
    accountant: Accountant
    grid_bits: int

    @property
    def label(self) -> str:
        """For people: unit, ε and δ as planned."""
        epsilon = self.first.target
        if epsilon is None:
            epsilon = account(self.first.spent(self.first.releases), self.delta, accountant=self.accountant).epsilon
        also = "" if self.second is None else ", and of devices"
        return f"{self.first.one.unit}-level differential privacy, epsilon {epsilon:.4g} at delta {self.delta:g}{also}"

    def record_terms(self, apply_plan: bytes) -> RecordTerms:
        """What devices are told that add the noise themselves."""
        one = self.first.one
        if one.unit != "record":
            raise LocalError("record_terms: the job protects no records")
        return RecordTerms(
            clip_norm=self.first.clip,
            grid_bits=self.grid_bits,
            sampling_threshold=one.sampling_threshold,
            sigma_squared=one.sigma_squared,
            apply_plan=apply_plan,
        )

    def summary(self, *, begun: int, rounds: int) -> dict[str, Any]:
        """The summary's `privacy` object: what has been spent by `begun` releases."""
        second = None if self.second is None else self._figures(self.second, begun)
        return {
            **self._figures(self.first, begun),
            "rounds": rounds,
            "not_covered": list(NOT_COVERED),
            "device": second,
        }

    def _figures(self, promise: Promise, begun: int) -> dict[str, Any]:
        one = promise.one
        found = account(promise.spent(begun), self.delta, accountant=self.accountant)
        return {
            "unit": one.unit,
            "epsilon": found.epsilon,
            "delta": self.delta,
            "accountant": found.accountant,
            "noise_multiplier": one.noise_multiplier,
            "clip_norm": promise.clip_norm,
            "sampling_rate": one.sampling_rate if one.unit == "record" else None,
            "moments_epsilon": found.moments,
            "rdp_epsilon": found.rdp,
            "pld_epsilon": found.pld,
            "target_epsilon": promise.target,
            "releases": one.count * begun,
            "adversary": promise.adversary,
            "noise_from": promise.noise_from,
            "sigma_squared": one.sigma_squared,
            "sensitivity_squared": one.sensitivity_squared,
        }


def guarantee_of(job: Job, *, gradient_length: int = 1, update_length: int = 1) -> Guarantee:
    """The guarantee of a job whose trained parameters have `gradient_length` entries, all its parameters
    `update_length`; ε depends on σ/Δ alone, so the lengths move Δ and σ, not ε. A statistics job has neither. Raises
    `ConfigError` at the line of a target that no noise keeps."""
    privacy, mode = job.spec.privacy, job.spec.mode
    if privacy is None:
        raise LocalError("guarantee_of: the job has no privacy block")
    try:
        if mode == "statistics":
            first = _statistics(job.spec, privacy)
        else:
            first = _first(job.spec, privacy, gradient_length=gradient_length, update_length=update_length)
    except TargetOutOfReach as error:
        raise job.error("privacy.epsilon", str(error)) from None
    second = None
    if privacy.device is not None:
        try:
            second = _promise(_device(update_length, privacy), job.spec, privacy.device, local=False)
        except TargetOutOfReach as error:
            raise job.error("privacy.device.epsilon", str(error)) from None
    return Guarantee(
        first=first, second=second, delta=privacy.delta, accountant=privacy.accountant, grid_bits=privacy.grid_bits
    )


def _statistics(spec: JobSpec, privacy: PrivacySpec) -> Promise:
    """One release, of all rows."""
    template = Mechanism(unit="record", sensitivity_squared=sensitivity_squared(queries_of(spec)), sigma_squared=1)
    return replace(_promise(template, spec, privacy, local=False, releases=1), clip_norm=None)


def _first(spec: JobSpec, privacy: PrivacySpec, *, gradient_length: int, update_length: int) -> Promise:
    if privacy.unit == "device":
        return _promise(_device(update_length, privacy), spec, privacy, local=False)
    local = privacy.noise_at == "device"
    assert privacy.sampling_rate is not None
    assert spec.train.local_steps is not None
    template = Mechanism(
        unit="record",
        sensitivity_squared=row_bound(gradient_length, privacy.grid_bits),
        sigma_squared=1,
        sampling_threshold=threshold_of(privacy.sampling_rate),
        count=spec.train.local_steps if local else 1,
    )
    return _promise(template, spec, privacy, local=local)


def _device(length: int, privacy: PrivacySpec) -> Mechanism:
    unit: Unit = "device"
    return Mechanism(unit=unit, sensitivity_squared=grid_bound(length, privacy.grid_bits), sigma_squared=1)


def _promise(
    template: Mechanism,
    spec: JobSpec,
    block: PrivacySpec | DevicePrivacySpec,
    *,
    local: bool,
    releases: int | None = None,
) -> Promise:
    """With the noise that is stated, or that the target takes over all releases (by default one a round)."""
    privacy = spec.privacy
    assert privacy is not None
    planned = spec.train.rounds if releases is None else releases
    if block.noise_multiplier is not None:
        sigma_squared = sigma_squared_for(block.noise_multiplier, template.sensitivity_squared)
    else:
        assert block.epsilon is not None
        whole = replace(template, count=template.count * planned)
        found = calibrate(whole, epsilon=block.epsilon, delta=privacy.delta, accountant=privacy.accountant)
        sigma_squared = found.sigma_squared
    helpers = 0 if spec.secure is None else spec.secure.helpers
    added = f"each of {helpers} helper{'s' if helpers != 1 else ''} and the server"
    return Promise(
        one=replace(template, sigma_squared=sigma_squared),
        releases=planned,
        target=block.epsilon,
        clip_norm=block.clip_norm,
        noise_from="the device, in each of its steps" if local else added,
        adversary=adversary(helpers=helpers, local=local),
    )
