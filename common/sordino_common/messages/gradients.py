"""One step of DP-SGD over the fleet: every device contributes its clipped sum, and the aggregators add the noise."""

from __future__ import annotations

from typing import Annotated

import msgspec

from sordino_common.errors import CodecError
from sordino_common.messages.base import Count, Digest, Message, register
from sordino_common.messages.jobs import Arrays, DataRef
from sordino_common.messages.sums import SumTerms


@register("sum-gradient")
class SumGradient(Message, frozen=True, kw_only=True):
    """Server: contribute Σ clip(g_b) at `params` over a fresh Poisson sample of the train rows.

    `plan_id`: a gradient Plan (`plan.gradients`) for batches of `batch_rows` rows. Each row is in the sample with
    probability `sampling_threshold` / 2^32, its gradient is clipped to L2 norm `clip_norm`. The vector: int64 in units
    of clip_norm / 2^`grid_bits`, the gradients in the Plan's order, each flattened; nothing else, and no loss. The
    noise is that of the terms, added by every aggregator; without it the command is none. `terms.bound` is at least
    2^grid_bits times the device's train rows. Answered by `Contribution` or `Refused`."""

    terms: SumTerms
    round: Count
    attempt: Count
    plan_id: Digest
    data: DataRef
    params: Arrays
    batch_rows: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    clip_norm: Annotated[float, msgspec.Meta(gt=0.0, le=1e12)]
    grid_bits: Annotated[int, msgspec.Meta(ge=1, le=20)]
    sampling_threshold: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]

    def __post_init__(self) -> None:
        if self.terms.noise is None:
            raise CodecError("a sum of gradients without noise")
