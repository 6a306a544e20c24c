"""The `secure_aggregation:` block of a job: how many helpers, the smallest cohort, and the integers that are summed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from sordino_common.errors import ConfigError

if TYPE_CHECKING:
    from sordino_server.job import JobSpec


class SecureSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The server sees sums over at least `minimum` devices, and of single devices nothing but row counts and timing.

    `helpers`: how many parties with the role helper hold masks, each in a zone of its own in the roster; one honest one
    is enough. `bits`: of the words that are added; by default 32 if the sum fits, else 64. A number v is summed as
    round(v · 2^`fraction_bits`); `largest`: the largest entry that an update may have, where that of a device with few
    rows counts as much less (a device whose update is larger refuses by name)."""

    helpers: Annotated[int, Meta(ge=1, le=3)] = 2
    minimum: Annotated[int, Meta(ge=2, le=20_000)] = 5
    bits: Literal[32, 64] | None = None
    fraction_bits: Annotated[int, Meta(ge=1, le=32)] = 16
    largest: Annotated[float, Meta(gt=0.0, le=1e6)] = 64.0


def check_secure(spec: JobSpec, error: Callable[[str, str], ConfigError]) -> None:
    """Raise `ConfigError` at the first key that can't be right. `error(key, text)` makes it."""
    for key, text in _problems(spec):
        raise error(key, text)


def _problems(spec: JobSpec) -> Iterator[tuple[str, str]]:
    secure = spec.secure
    if secure is None or spec.mode != "federated":
        return
    if spec.privacy is None and "fleet" in (spec.data.standardize, spec.data.target_standardize):
        key = "standardize" if spec.data.standardize == "fleet" else "target_standardize"
        yield (
            f"data.{key}",
            (
                "fleet has every device send its columns' sums in the clear, which secure_aggregation is to prevent; "
                "say given (with offset and scale) or none"
            ),
        )
    if spec.limits.update_norm is not None:
        yield "limits.update_norm", "can't be checked with secure_aggregation: the server sees no single update"
    if isinstance(spec.train.agents, int) and spec.train.agents < secure.minimum:
        yield (
            "train.agents",
            f"{spec.train.agents} a round is fewer than secure_aggregation.minimum, {secure.minimum}",
        )
