"""What a private job promises, and what its run has spent: from the very mechanisms that devices and helpers use.

A release of the unit *record* is a step's sum over a Poisson sample, on the grid: Δ² = `privacy.rows.row_bound`. Of the
unit *device* it is a clipped update on the grid: Δ² = `privacy.grid_bound`. Both follow from the number of
parameters and grid_bits alone, so server and device compute them each for themselves, and a device charges its own
ledger with its own. σ² is one party's noise: in a secure sum every helper and the server add it, of which one honest
party's counts; so the sum holds (helpers + 1) times as much. The guarantee composes every release that was begun
(`rounds.releases`), void ones included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sordino_common.errors import LocalError
from sordino_common.messages import RecordTerms
from sordino_common.privacy.grid_bound import grid_bound
from sordino_common.privacy.mechanism import Mechanism, Unit, threshold_of
from sordino_common.privacy.rows import row_bound
from sordino_server.accounting.accountant import Accountant, account
from sordino_server.accounting.calibrate import calibrate, sigma_squared_for
from sordino_server.job import JobSpec
from sordino_server.job_privacy import DevicePrivacySpec, PrivacySpec

NOT_COVERED: Final = (
    "held-out rows, over which exact sums are formed for the metrics",
    "how many rows each device has, who takes part, and when",
    "the choice of settings after looking at earlier runs on the same rows",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """Of one unit. `one`: the mechanism of one release, of which `releases` are planned. `target`: the ε asked for,
    None if the job states the noise."""

    one: Mechanism
    releases: int
    target: float | None
    clip_norm: float
    noise_from: str

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
    adversary: str
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
            clip_norm=self.first.clip_norm,
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
            "adversary": self.adversary,
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
            "noise_from": promise.noise_from,
            "sigma_squared": one.sigma_squared,
            "sensitivity_squared": one.sensitivity_squared,
        }


def guarantee_of(
    spec: JobSpec, *, gradient_length: int, update_length: int, spent: Sequence[Mechanism] = ()
) -> Guarantee:
    """The guarantee of a job whose trained parameters have `gradient_length` entries, all its parameters
    `update_length`. `spent`: what is released besides, of the job's unit. Raises `TargetOutOfReach`."""
    privacy, secure = spec.privacy, spec.secure
    if privacy is None:
        raise LocalError("guarantee_of: the job has no privacy block")
    helpers = 0 if secure is None else secure.helpers
    added = f"each of {helpers} helper{'s' if helpers != 1 else ''} and the server"
    local = privacy.unit == "record" and privacy.noise_at == "device"
    if privacy.unit == "record":
        assert privacy.sampling_rate is not None
        assert spec.train.local_steps is not None
        template = Mechanism(
            unit="record",
            sensitivity_squared=row_bound(gradient_length, privacy.grid_bits),
            sigma_squared=1,
            sampling_threshold=threshold_of(privacy.sampling_rate),
            count=spec.train.local_steps if local else 1,
        )
        noise_from = "the device, in each of its steps" if local else added
    else:
        template = _device(update_length, privacy)
        noise_from = added
    first = _promise(template, privacy, privacy, spec.train.rounds, noise_from=noise_from, spent=spent)
    second = None
    if privacy.device is not None:
        second = _promise(
            _device(update_length, privacy), privacy, privacy.device, spec.train.rounds, noise_from=added, spent=()
        )
    return Guarantee(
        first=first,
        second=second,
        delta=privacy.delta,
        accountant=privacy.accountant,
        adversary=_adversary(privacy, helpers, local=local),
        grid_bits=privacy.grid_bits,
    )


def _device(length: int, privacy: PrivacySpec) -> Mechanism:
    unit: Unit = "device"
    return Mechanism(unit=unit, sensitivity_squared=grid_bound(length, privacy.grid_bits), sigma_squared=1)


def _promise(
    template: Mechanism,
    privacy: PrivacySpec,
    block: PrivacySpec | DevicePrivacySpec,
    rounds: int,
    *,
    noise_from: str,
    spent: Sequence[Mechanism],
) -> Promise:
    """With the noise that is stated, or that the target takes over all rounds."""
    if block.noise_multiplier is not None:
        sigma_squared = sigma_squared_for(block.noise_multiplier, template.sensitivity_squared)
    else:
        assert block.epsilon is not None
        whole = replace(template, count=template.count * rounds)
        found = calibrate(whole, epsilon=block.epsilon, delta=privacy.delta, spent=spent, accountant=privacy.accountant)
        sigma_squared = found.sigma_squared
    return Promise(
        one=replace(template, sigma_squared=sigma_squared),
        releases=rounds,
        target=block.epsilon,
        clip_norm=block.clip_norm,
        noise_from=noise_from,
    )


def _adversary(privacy: PrivacySpec, helpers: int, *, local: bool) -> str:
    after = "and whoever sees the model or these figures afterwards"
    if local:
        also = "" if helpers == 0 else " Single devices' noised updates are hidden in secure sums besides."
        return f"Holds against the server, the helpers, the broker, {after}: every device adds its noise itself.{also}"
    if helpers == 1:
        return (
            f"Holds against the server as long as the helper is honest, against the helper, the broker, {after}: each "
            "of helper and server adds the whole noise."
        )
    return (
        f"Holds against the server together with all but one of the {helpers} helpers, against the broker, {after}: "
        "each of helpers and server adds the whole noise, so one honest party is enough."
    )
