"""The `statistics:` block of a job: what one noised sum asks of the fleet's rows, and how the noise is shared.

A job of mode `statistics` names columns and their public ranges, and no model, optimizer or rounds: one secure sum
answers everything. Its `ridge` is a linear model that is then evaluated as any other. What each question's numbers are:
`sordino_common.privacy.row_queries`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta

from sordino_common.errors import ConfigError
from sordino_common.messages.base import Label
from sordino_common.messages.statistics import QueryKind, RangedColumn, RowQuery, half_width
from sordino_common.privacy.row_queries import norm_squared
from sordino_server.job_privacy import NO_CLIP, one_of

if TYPE_CHECKING:
    from sordino_server.job import JobSpec

Share = Annotated[float, Meta(gt=0.0, le=1000.0)]
Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
# Every question is scaled to a sensitivity of about 2^22·√share before the common noise: weights are whole numbers, and
# on this scale rounding them changes no share by more than a few per cent, while sums and noise stay far below 2^62.
_SCALE_BITS: Final = 22
MODEL_FILE: Final = Path(__file__).parent / "statistics" / "linear_model.py"


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class RidgeSpec(_Strict, frozen=True, kw_only=True):
    """Linear regression of the target. Features and target are moved to [-1, 1] by their ranges.

    `row_norm`: the features' Euclidean norm is cut to this (√features changes nothing; half of that by default: less
    noise for rows that are not extreme). `target_norm`: the same for the target. `bias`: the constant feature's value;
    0 leaves the intercept at the middle of the target's range. `bits`: of a number. `share` of the precision."""

    row_norm: Annotated[float, Meta(gt=0.0, le=64.0)] | None = None
    target_norm: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    bias: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    bits: Annotated[int, Meta(ge=4, le=14)] = 10
    share: Share = 1.0


class MomentsSpec(_Strict, frozen=True, kw_only=True):
    """Mean and variance of every feature and of the target."""

    bits: Annotated[int, Meta(ge=4, le=14)] = 10
    share: Share = 1.0


class HistogramSpec(_Strict, frozen=True, kw_only=True):
    """Counts of `column` in 2^`bits` equal bins of its range."""

    column: Label
    bits: Annotated[int, Meta(ge=1, le=10)] = 4
    share: Share = 1.0


class QuantilesSpec(_Strict, frozen=True, kw_only=True):
    """Quantiles of `column` from a dyadic histogram with 2^`bits` finest bins."""

    column: Label
    probabilities: Annotated[tuple[Probability, ...], Meta(min_length=1, max_length=100)] = (0.25, 0.5, 0.75)
    bits: Annotated[int, Meta(ge=1, le=12)] = 8
    share: Share = 1.0


class CountSpec(_Strict, frozen=True, kw_only=True):
    """How many rows there are."""

    share: Share = 1.0


class StatisticsSpec(_Strict, frozen=True, kw_only=True):
    """The questions. All are answered by one release, whose noise they share: question k of sensitivity Δ_k gets the
    precision share_k / Σ share, as 1/σ²."""

    ridge: RidgeSpec | None = None
    moments: MomentsSpec | None = None
    count: CountSpec | None = None
    histograms: Annotated[tuple[HistogramSpec, ...], Meta(max_length=64)] = ()
    quantiles: Annotated[tuple[QuantilesSpec, ...], Meta(max_length=64)] = ()

    @property
    def empty(self) -> bool:
        return self.ridge is None and self.moments is None and self.count is None and not self.shapes

    @property
    def shapes(self) -> tuple[HistogramSpec | QuantilesSpec, ...]:
        return (*self.histograms, *self.quantiles)


def columns_of(spec: JobSpec) -> tuple[RangedColumn, ...]:
    """Features, then the target, with their ranges."""
    data = spec.data
    ranges = None if data.ranges is None else data.ranges.of_features(len(data.features))
    if ranges is None or data.ranges is None or data.ranges.target is None:
        raise ConfigError("data.ranges: statistics need the range of every feature and of the target")
    pairs = (*zip(data.features, ranges, strict=True), (data.target, data.ranges.target))
    return tuple(RangedColumn(name=name, low=float(low), high=float(high)) for name, (low, high) in pairs)


def queries_of(spec: JobSpec) -> tuple[RowQuery, ...]:
    """The questions in the order ridge, moments, count, histograms, quantiles, each with its weight."""
    asked, names = spec.statistics, [*spec.data.features, spec.data.target]
    everything = tuple(range(len(names)))
    found: list[tuple[RowQuery, float]] = []
    kind: QueryKind
    if asked.ridge is not None:
        ridge = asked.ridge
        query = RowQuery(
            kind="gram",
            columns=everything,
            bits=ridge.bits,
            row_norm=ridge.row_norm or math.sqrt(len(spec.data.features)) / 2,
            target_norm=ridge.target_norm,
            bias=ridge.bias,
        )
        found.append((query, ridge.share))
    if asked.moments is not None:
        found.append((RowQuery(kind="moments", columns=everything, bits=asked.moments.bits), asked.moments.share))
    if asked.count is not None:
        found.append((RowQuery(kind="count", columns=(), bits=0), asked.count.share))
    for shape in asked.shapes:
        kind = "histogram" if isinstance(shape, HistogramSpec) else "dyadic"
        column = names.index(shape.column)
        found.append((RowQuery(kind=kind, columns=(column,), bits=shape.bits), shape.share))
    return tuple(msgspec.structs.replace(query, weight=_weight(query, share)) for query, share in found)


def _weight(query: RowQuery, share: float) -> int:
    return max(1, round(2.0**_SCALE_BITS * math.sqrt(share) / math.sqrt(norm_squared(query))))


def check_statistics(spec: JobSpec, error: Callable[[str, str], ConfigError]) -> None:
    """Raise `ConfigError` at the first key that can't be right. `error(key, text)` makes it."""
    for key, text in _problems(spec):
        raise error(key, text)


def _problems(spec: JobSpec) -> Iterator[tuple[str, str]]:
    data, asked, privacy = spec.data, spec.statistics, spec.privacy
    if asked.empty:
        yield "statistics", "asks for nothing; name at least one of ridge, moments, count, histograms, quantiles"
    if spec.secure is None:
        yield "secure_aggregation", "mode statistics needs it: without it the server would see each device's sums"
    if data.task != "regression":
        yield "data.task", f"mode statistics takes regression (numbers in columns), not {data.task}"
    if data.shape is not None:
        yield "data.shape", "statistics are of columns of single numbers"
    if data.ranges is None or data.ranges.target is None:
        yield "data.ranges", "statistics need public bounds [lo, hi] of every feature and of the target"
    elif data.ranges.of_features(len(data.features)) is None:
        yield (
            "data.ranges.features",
            f"expected one [lo, hi] for all, or a list of {len(data.features)}, one for each feature",
        )
    else:
        pairs = (*(data.ranges.of_features(len(data.features)) or ()), data.ranges.target)
        for place, (low, high) in enumerate(pairs):
            if not (math.isfinite(low) and math.isfinite(high) and half_width(low, high) > 0.0):
                name = "target" if place == len(data.features) else f"features.{place}"
                yield f"data.ranges.{name}", f"expected [lo, hi] with lo < hi, got [{low:g}, {high:g}]"
    known = {*data.features, data.target}
    for kind in ("histograms", "quantiles"):
        for place, shape in enumerate(getattr(asked, kind)):
            if shape.column not in known:
                yield (
                    f"statistics.{kind}.{place}.column",
                    f"{shape.column} is neither a feature nor the target of this job",
                )
    if privacy is not None:
        if privacy.unit != "record":
            yield "privacy.unit", "mode statistics protects records; say unit: record"
        yield from one_of("privacy", privacy)
        if privacy.clip_norm != NO_CLIP:
            yield "privacy.clip_norm", "has no place in mode statistics: data.ranges bound what a row adds"
        if privacy.sampling_rate is not None:
            yield "privacy.sampling_rate", "mode statistics asks all rows once; leave it out"
        if privacy.noise == "device":
            yield "privacy.noise", "in mode statistics the aggregators add the noise; leave it out"
        if privacy.device is not None:
            yield "privacy.device", "mode statistics protects records only"
