"""What passes between the daemon and whoever computes, for secure sums. Without NumPy."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from sordino_common.messages import Array, SumGradient, SumMetrics, SumStatistics, SumTerms, SumUpdate
from sordino_common.privacy.mechanism import Mechanism


class _Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kind: ClassVar[str]


class SumUpdateTask(_Value, frozen=True, kw_only=True):
    """Local training; the update comes back masked. `agent` enters the row stream's seed and the masks' labels.
    `apply`: the second Plan of private training."""

    kind = "sum-update"
    command: SumUpdate
    plan: bytes
    agent: str
    min_rows: int
    apply: bytes | None = None


class SumGradientTask(_Value, frozen=True, kw_only=True):
    """The clipped sum of one step of DP-SGD; it comes back masked."""

    kind = "sum-gradient"
    command: SumGradient
    plan: bytes
    agent: str
    min_rows: int


class SumMetricsTask(_Value, frozen=True, kw_only=True):
    """Sums of a Plan's row outputs; they come back masked."""

    kind = "sum-metrics"
    command: SumMetrics
    plan: bytes
    agent: str
    min_rows: int


class SumStatisticsTask(_Value, frozen=True, kw_only=True):
    """Sums of bounded integer vectors of the train rows; they come back masked."""

    kind = "sum-statistics"
    command: SumStatistics
    agent: str
    min_rows: int


class ShareTask(_Value, frozen=True, kw_only=True):
    """A helper's share for `members`, whose seeds are `seeds`, noise included."""

    kind = "share"
    terms: SumTerms
    helper: str
    members: tuple[str, ...]
    seeds: tuple[bytes, ...]

    def __repr__(self) -> str:
        return f"ShareTask({len(self.members)} members, hidden)"


class SumFacts(_Value, frozen=True, kw_only=True):
    """A masked vector, the seeds of its masks by helper, and what it costs in privacy, by unit (none: it has no
    noise). The plain vector stays where it was computed."""

    kind = "sum-facts"
    masked: Array
    seeds: tuple[bytes, ...]
    mechanisms: tuple[Mechanism, ...] = ()

    def __repr__(self) -> str:
        return f"SumFacts({self.masked}, {len(self.seeds)} seeds, hidden)"


class ShareFacts(_Value, frozen=True, kw_only=True):
    kind = "share-facts"
    share: Array
