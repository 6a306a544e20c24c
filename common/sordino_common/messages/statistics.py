"""Statistics of columns: what is asked of the rows, in public terms that every device and the server read alike.

What each query's numbers are, and how far one row can move them: `sordino_common.privacy.row_queries`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec

from sordino_common.errors import CodecError
from sordino_common.messages.base import Count, Label, Message, Name, register
from sordino_common.messages.sums import SumTerms

QueryKind = Literal["count", "moments", "gram", "histogram", "dyadic"]


def half_width(low: float, high: float) -> float:
    """(high - low) / 2, where that passes no bound of floats. What is divided by it: 0 for bounds that are next to one
    another near 0, and then no column can be scaled by them."""
    return high / 2 - low / 2


class RangedColumn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A scalar column and its public bounds. Values outside are moved to the nearer bound."""

    name: Label
    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and half_width(self.low, self.high) > 0.0):
            raise CodecError(f"column {self.name!r}: bounds {self.low} and {self.high}; expected finite, low < high")


class RowQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A sum over rows of an integer vector that each row gives. `columns`: places in the list of columns.

    `weight` multiplies the vector: how much of the common noise's precision the query gets. `bits`: of a number
    (moments, gram), or depth: 2^bits bins (histogram, dyadic). For gram the last column is the target, and `row_norm`,
    `target_norm`, `bias` bound what one row can add (`privacy.row_queries.gram_bounds`); else they are 0."""

    kind: QueryKind
    columns: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, lt=4096)], ...], msgspec.Meta(max_length=4096)]
    bits: Annotated[int, msgspec.Meta(ge=0, le=16)]
    weight: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)] = 1
    row_norm: Annotated[float, msgspec.Meta(ge=0.0, le=64.0)] = 0.0
    target_norm: Annotated[float, msgspec.Meta(ge=0.0, le=64.0)] = 0.0
    bias: Annotated[float, msgspec.Meta(ge=0.0, le=64.0)] = 0.0

    def __post_init__(self) -> None:
        least, most = _COLUMNS[self.kind]
        if not least <= len(self.columns) <= most:
            raise CodecError(f"query {self.kind}: {len(self.columns)} columns; expected {least} to {most}")
        if len(set(self.columns)) != len(self.columns):
            raise CodecError(f"query {self.kind}: a column is named twice")
        if (self.kind == "gram") != (self.row_norm > 0.0 and self.target_norm > 0.0):
            raise CodecError("query gram, and no other, has a row_norm and a target_norm above 0")
        if self.kind != "gram" and self.bias != 0.0:
            raise CodecError("only the query gram has a bias")
        if (self.kind == "count") != (self.bits == 0):
            raise CodecError(f"query {self.kind}: bits is {self.bits}; count has 0, the others at least 1")


_COLUMNS: dict[str, tuple[int, int]] = {
    "count": (0, 0),
    "moments": (1, 4096),
    "gram": (2, 1024),
    "histogram": (1, 1),
    "dyadic": (1, 1),
}
Columns = Annotated[tuple[RangedColumn, ...], msgspec.Meta(max_length=4096)]
Queries = Annotated[tuple[RowQuery, ...], msgspec.Meta(min_length=1, max_length=256)]


@register("sum-statistics")
class SumStatistics(Message, frozen=True, kw_only=True):
    """Server: contribute Σ over the train rows of what each row gives to `queries` (`privacy.row_queries`).

    The vector: the answers, query after query, each times its weight. `terms.noise` is the noise that every aggregator
    adds; null: the sums are exact. `terms.bound` is at least `row_queries.entry_bound` for the device's train rows.
    Answered by `Contribution` or `Refused`."""

    terms: SumTerms
    round: Count
    dataset: Name
    columns: Columns
    queries: Queries

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        if len(set(names)) != len(names):
            raise CodecError("statistics: a column is named twice")
        if any(place >= len(names) for query in self.queries for place in query.columns):
            raise CodecError(f"statistics: a query names a column beyond the {len(names)} given")
