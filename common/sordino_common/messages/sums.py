"""Secure sums: the terms that all parties of one sum agree on, masked vectors, sealed seeds, and helpers' shares.

server -> contributor   sum-update | sum-metrics | ...      a command with the terms
contributor -> server   contribution                        masked vector, a sealed seed for every helper
server -> helper        sum-seeds      -> sum-seeds-checked
server -> helper        sum-cut        -> sum-share
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Annotated, Final, Literal

import msgspec

from sordino_common.errors import CodecError
from sordino_common.messages.array import Array
from sordino_common.messages.base import Count, Digest, Message, Name, RunId, Text, least_minor, register, to_plain
from sordino_common.messages.codec import encode
from sordino_common.messages.jobs import Arrays, DataRef, RecordTerms

SEEDS_AT_ONCE: Final = 64  # sealed seeds in one `sum-seeds`
MOST_CONTRIBUTORS: Final = 20_000  # as many as a roster lists
MOST_ENTRIES: Final = 1 << 28
BOX_BYTES: Final = 512  # a sealed seed takes about 210

SumSession = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Purpose = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9 -]{0,79}\Z")]
Box = Annotated[bytes, msgspec.Meta(min_length=1, max_length=BOX_BYTES)]
_Big = Annotated[int, msgspec.Meta(ge=1, le=1 << 62)]


class SumNoise(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every aggregator adds N_Z(0, `sigma_squared`), the discrete Gaussian over the integers, to every entry."""

    sigma_squared: _Big


class SumTerms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one sum is. Entries are integers of at most `bound` in size, `length` of them, from `minimum` to `most`
    contributors, added in Z_2^`bits`. `session` is drawn anew for every sum; `index` grows with every sum of `run`,
    whatever it is for. `helpers` hold the masks; each of them and the leader add the noise."""

    session: SumSession
    run: RunId
    index: Count
    purpose: Purpose
    bits: Literal[32, 64]
    length: Annotated[int, msgspec.Meta(ge=1, le=MOST_ENTRIES)]
    bound: _Big
    helpers: Annotated[tuple[Name, ...], msgspec.Meta(min_length=1, max_length=3)]
    minimum: Annotated[int, msgspec.Meta(ge=2, le=MOST_CONTRIBUTORS)]
    most: Annotated[int, msgspec.Meta(ge=2, le=MOST_CONTRIBUTORS)]
    noise: SumNoise | None

    def __post_init__(self) -> None:
        if len(set(self.helpers)) != len(self.helpers):
            raise CodecError("a helper is named twice in the terms of a sum")
        if self.most < self.minimum:
            raise CodecError(f"a sum of at least {self.minimum} and at most {self.most} contributors")

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical CBOR: what seeds are sealed under."""
        return hashlib.sha256(encode(["sordino-sum", 1, to_plain(self, minor=least_minor(self))])).digest()

    @property
    def word_bytes(self) -> int:
        return self.bits // 8


def members_digest(members: tuple[str, ...]) -> bytes:
    """SHA-256 of the canonical CBOR of the contributors' names, ascending: names the set U."""
    return hashlib.sha256(encode(["sordino-sum-members", 1, list(members)])).digest()


@register("contribution")
class Contribution(Message, frozen=True, kw_only=True):
    """Contributor: `masked` = x - Σ_j PRG(seed_j) mod 2^bits (uint32 or uint64); `boxes[j]` seals seed_j to
    `terms.helpers[j]`. `seconds` is the device's time for the task."""

    session: SumSession
    masked: Array
    boxes: Annotated[tuple[Box, ...], msgspec.Meta(min_length=1, max_length=3)]
    seconds: float


class SealedSeed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The box of contributor `name` for the helper that gets this."""

    name: Name
    box: Box


@register("sum-seeds")
class SumSeeds(Message, frozen=True, kw_only=True):
    """Server: seeds for the helper, and the terms that they are sealed under. Answered by `SumSeedsChecked`."""

    terms: SumTerms
    seeds: Annotated[tuple[SealedSeed, ...], msgspec.Meta(min_length=1, max_length=SEEDS_AT_ONCE)]


class RejectedSeed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Name
    reason: Text


@register("sum-seeds-checked")
class SumSeedsChecked(Message, frozen=True, kw_only=True):
    """Helper: whose seeds it holds now, and whose it does not take, with the reason."""

    session: SumSession
    accepted: Annotated[tuple[Name, ...], msgspec.Meta(max_length=SEEDS_AT_ONCE)]
    rejected: Annotated[tuple[RejectedSeed, ...], msgspec.Meta(max_length=SEEDS_AT_ONCE)]


@register("sum-cut")
class SumCut(Message, frozen=True, kw_only=True):
    """Server: the set U of contributors, ascending. Answered by `SumShare`, once for a session."""

    session: SumSession
    members: Annotated[tuple[Name, ...], msgspec.Meta(min_length=2, max_length=MOST_CONTRIBUTORS)]

    def __post_init__(self) -> None:
        if any(a >= b for a, b in pairwise(self.members)):
            raise CodecError("the members of a sum are not in ascending order, each once")


@register("sum-share")
class SumShare(Message, frozen=True, kw_only=True):
    """Helper: `share` = Σ_{i in U} PRG(seed_i) + noise mod 2^bits. `members`: `members_digest` of the U it is of."""

    session: SumSession
    members: Digest
    share: Array


class SumClip(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole update is clipped to L2 norm `norm`; one integer step is norm / 2^`grid_bits`."""

    norm: Annotated[float, msgspec.Meta(gt=0.0, le=1e12)]
    grid_bits: Annotated[int, msgspec.Meta(ge=1, le=28)]


@register("sum-update")
class SumUpdate(Message, frozen=True, kw_only=True):
    """Server: train as `Train` says, and contribute the update to a sum. Answered by `Contribution` or `Refused`.

    `weight` "rows": the vector is round(update · rows / `weight_unit` · 2^`fraction_bits`), then `EXTRAS` entries that
    hold rows and rows · mean loss (`aggregate.wide`). "one": the update alone, on the grid of `clip` if there is one,
    else round(update · 2^`fraction_bits`). With `privacy` the training is DP-SGD with its own noise, as in `Train`."""

    terms: SumTerms
    round: Count
    attempt: Count
    plan_id: Digest
    data: DataRef
    params: Arrays
    batch_rows: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    steps: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
    epochs: Annotated[float, msgspec.Meta(ge=0.0, le=1e6)]
    seed: Count
    weight: Literal["rows", "one"]
    weight_unit: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
    fraction_bits: Annotated[int, msgspec.Meta(ge=0, le=40)]
    clip: SumClip | None
    privacy: RecordTerms | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and self.weight != "one":
            raise CodecError("a clipped update is not weighted by rows: whoever has many would count for more than one")


@register("sum-metrics")
class SumMetrics(Message, frozen=True, kw_only=True):
    """Server: evaluate as `Evaluate` says, and contribute the sums. Answered by `Contribution` or `Refused`.

    The vector: rows, then round(sum · 2^`fraction_bits`) for every output of role `row` in the Plan's order."""

    terms: SumTerms
    round: Count
    plan_id: Digest
    data: DataRef
    params: Arrays
    batch_rows: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    fraction_bits: Annotated[int, msgspec.Meta(ge=0, le=40)]
