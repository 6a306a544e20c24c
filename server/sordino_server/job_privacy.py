"""The `privacy:` block of a job: whose privacy, how much of it, where the noise is added.

`check_privacy` refuses what can be known to be wrong without the fleet. What the numbers cost is
`sordino_server.accounting`; how vectors are clipped and noise is drawn, `sordino_common.privacy`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
from msgspec import Meta

from sordino_common.errors import ConfigError
from sordino_common.privacy.rows import MAX_ROW_GRID_BITS

if TYPE_CHECKING:
    from sordino_server.job import JobSpec

Epsilon = Annotated[float, Meta(gt=0.0, le=1000.0)]
NoiseMultiplier = Annotated[float, Meta(gt=0.0, le=1e4)]
LEAST_CLIP: Final = 1e-6
ClipNorm = Annotated[float, Meta(ge=LEAST_CLIP, le=1e6)]
Range = tuple[float, float]


NO_CLIP: Final = 0.0  # not given: mode statistics has none


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class DevicePrivacySpec(_Strict, frozen=True, kw_only=True):
    """The second unit of a job that protects records on the device and the device in the sum."""

    epsilon: Epsilon | None = None
    noise_multiplier: NoiseMultiplier | None = None
    clip_norm: ClipNorm


class PrivacySpec(_Strict, frozen=True, kw_only=True):
    """Differential privacy of the whole run, for one record or one device added or removed.

    Give `epsilon` (at `delta`; the noise is calibrated to it over rounds x local_steps) or `noise_multiplier` (noise's
    standard deviation / clip norm). `clip_norm`: of a row's gradient (record) or of a device's update (device).
    `sampling_rate`: record only; every row is in a step with this probability, independently (Poisson).
    `noise`: record only; `device`: every device adds full noise in each of its local steps; `aggregate`: the helpers
    and the server add it to the fleet's sum, one round is one step. `grid_bits`: the clip norm is 2^grid_bits steps of
    the integer grid."""

    unit: Literal["record", "device"]
    epsilon: Epsilon | None = None
    noise_multiplier: NoiseMultiplier | None = None
    delta: Annotated[float, Meta(gt=0.0, le=0.1)]
    clip_norm: Annotated[float, Meta(ge=0.0, le=1e6)] = NO_CLIP
    sampling_rate: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    noise: Literal["aggregate", "device"] | None = None
    grid_bits: Annotated[int, Meta(ge=8, le=24)] = 16
    device: DevicePrivacySpec | None = None
    accountant: Literal["pld", "rdp"] = "pld"

    @property
    def noise_at(self) -> Literal["aggregate", "device"]:
        """Who adds the noise: the aggregators of a sum, or each device by itself."""
        return self.noise or ("device" if self.unit == "record" else "aggregate")


class DataRangesSpec(_Strict, frozen=True, kw_only=True):
    """Public bounds [lo, hi] of what the columns hold; values outside are clipped to them. One pair for all features,
    or one for each. They bound what a row adds to the sums of a statistics job. Choose them from what is known of the
    quantity, not from the rows."""

    features: Annotated[tuple[float | Range, ...], Meta(min_length=1, max_length=4095)]
    target: Range | None = None

    def of_features(self, count: int) -> tuple[Range, ...] | None:
        """[lo, hi] of each of `count` features; None if they are not one pair or `count` pairs."""
        pairs = tuple(entry for entry in self.features if isinstance(entry, tuple))
        if len(pairs) == len(self.features) == count:
            return pairs
        numbers = [entry for entry in self.features if not isinstance(entry, tuple)]
        if len(numbers) == len(self.features) == 2:
            return ((numbers[0], numbers[1]),) * count
        return None


def check_privacy(spec: JobSpec, error: Callable[[str, str], ConfigError]) -> None:
    """Raise `ConfigError` at the first key that can't be right. `error(key, text)` makes it."""
    for key, text in _problems(spec):
        raise error(key, text)


def is_secure(spec: JobSpec) -> bool:
    """Whether `secure_aggregation` is asked for."""
    return spec.secure is not None


def _problems(spec: JobSpec) -> Iterator[tuple[str, str]]:
    if spec.validate is not None:
        yield (
            "validate",
            (
                f"{spec.validate} is not built yet: it needs updates secret-shared between two compute agents, and a "
                "test of their norm on the shares. Without it a device can send an update of any direction within the "
                "clip norm, or, in a secure sum, beyond it; leave the key out to accept that"
            ),
        )
    privacy = spec.privacy
    if spec.mode == "statistics":
        return  # `job_statistics` checks the block
    if spec.data.ranges is not None:
        yield "data.ranges", "is only used in mode statistics, to bound what a row adds to a sum"
    if privacy is None:
        return
    if spec.mode != "federated":
        yield "privacy", f"is offered in mode federated, not in {spec.mode}"
    yield from one_of("privacy", privacy)
    if privacy.clip_norm < LEAST_CLIP:
        yield "privacy.clip_norm", f"mode federated needs a clip norm, at least {LEAST_CLIP:g}"
    yield from (_record_problems(spec, privacy) if privacy.unit == "record" else _device_problems(spec, privacy))
    for key in ("standardize", "target_standardize"):
        if getattr(spec.data, key) == "fleet":
            yield (
                f"data.{key}",
                (
                    "fleet has every device send its columns' sums without noise, which no epsilon covers. Say given, "
                    "with figures that are known without looking at the rows, or with the `scaling` that a job of mode "
                    "statistics finds (statistics: {moments: {}}, with a privacy block and an epsilon of its own, paid "
                    "from the same budget on the devices); or say none"
                ),
            )


def one_of(key: str, block: PrivacySpec | DevicePrivacySpec) -> Iterator[tuple[str, str]]:
    if (block.epsilon is None) == (block.noise_multiplier is None):
        yield key, "give exactly one of epsilon (the noise is calibrated to it) and noise_multiplier"


def _record_problems(spec: JobSpec, privacy: PrivacySpec) -> Iterator[tuple[str, str]]:
    if privacy.sampling_rate is None:
        yield (
            "privacy",
            (
                "unit record needs sampling_rate: with which probability a row is in a step. Steps of a fixed batch "
                "size do not have the privacy that is accounted for"
            ),
        )
    if privacy.grid_bits > MAX_ROW_GRID_BITS:
        yield "privacy.grid_bits", f"of rows is at most {MAX_ROW_GRID_BITS}: sums of finer steps are not exact"
    if spec.train.local_steps is None:
        yield (
            "train.local_epochs",
            (
                "with privacy of records, say train.local_steps: the number of noised steps must be known beforehand "
                "(an epoch is about 1 / sampling_rate steps)"
            ),
        )
    if privacy.noise_at == "aggregate":
        if not is_secure(spec):
            yield (
                "privacy.noise",
                "aggregate means noise inside a secure sum: add secure_aggregation: true, or say noise: device",
            )
        if spec.train.local_steps != 1:
            yield (
                "privacy.noise",
                (
                    "aggregate makes one step of a round, so train.local_steps must be 1, not "
                    f"{spec.train.local_steps}; for more steps between rounds, say noise: device"
                ),
            )
    if privacy.device is not None:
        if privacy.noise_at != "device":
            yield "privacy.device", "both units at once need noise: device"
        if not is_secure(spec):
            yield "privacy.device", "noise for the device unit is added in a secure sum: add secure_aggregation: true"
        yield from one_of("privacy.device", privacy.device)


def _device_problems(spec: JobSpec, privacy: PrivacySpec) -> Iterator[tuple[str, str]]:
    if not is_secure(spec):
        yield "privacy.unit", "device needs secure_aggregation: true; without it the server sees each device's update"
    if privacy.sampling_rate is not None:
        yield (
            "privacy.sampling_rate",
            (
                "is of unit record. Devices are chosen by the server, so against the server there is no gain from "
                "sampling them: every round counts in full"
            ),
        )
    if privacy.noise == "device":
        yield "privacy.noise", "for unit device, noise is added by the aggregators of the sum; leave it out"
    if privacy.device is not None:
        yield "privacy.device", "is the second unit beside unit: record; here it is the first"
