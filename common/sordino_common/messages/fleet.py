"""Who is there and what a device offers: description, health, refusals."""

from __future__ import annotations

from typing import Annotated

import msgspec

from sordino_common.messages.base import Bytes, Count, Digest, Label, Message, Name, Text, register

# Shown to people as it is: no spaces, markup or control characters.
Word = Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z.+_-]{1,64}\Z")]


class ColumnInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One column of a dataset: its name, dtype and the shape of one row's entry (`[]` for a scalar). No values."""

    name: Label
    dtype: Label
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=8)]


class DatasetInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a device says of a dataset: never a row. Row counts are part of the offer (they weigh the average)."""

    name: Name
    tags: Annotated[tuple[Label, ...], msgspec.Meta(max_length=32)]
    train_rows: Count
    test_rows: Count
    columns: Annotated[tuple[ColumnInfo, ...], msgspec.Meta(max_length=4096)]


@register("describe")
class Describe(Message, frozen=True, kw_only=True):
    """Server: what do you offer? Answered by `Described`."""


@register("described")
class Described(Message, frozen=True, kw_only=True):
    """Agent: version, datasets and limits, as its own policy lets the server see them."""

    version: Word
    executor: Word
    memory_bytes: Bytes
    store_bytes: Bytes
    payload_bytes: Bytes
    plan_seconds: float
    datasets: Annotated[tuple[DatasetInfo, ...], msgspec.Meta(max_length=256)]


@register("health")
class Health(Message, frozen=True, kw_only=True):
    """Server: how are you? Answered by `HealthReport`."""


@register("health-report")
class HealthReport(Message, frozen=True, kw_only=True):
    """Agent: counters since it started, and what it holds now. `wall_s`: its clock, seconds since 1970."""

    uptime_s: float
    wall_s: float
    resident_bytes: Bytes
    store_used_bytes: Bytes
    store_tensors: Count
    plans: Count
    tasks_done: Count
    tasks_failed: Count
    refusals: Count
    running: Annotated[tuple[Label, ...], msgspec.Meta(max_length=64)]


@register("plan-put")
class PlanPut(Message, frozen=True, kw_only=True):
    """Server: keep this Plan (canonical CBOR). Answered by `PlanReady` under its SHA-256, or `Refused`."""

    plan: Annotated[bytes, msgspec.Meta(max_length=16 * 1024 * 1024)]


@register("plan-ready")
class PlanReady(Message, frozen=True, kw_only=True):
    """Agent: the Plan is valid here. Peak memory and work are those that the agent computed itself."""

    plan_id: Digest
    peak_bytes: Bytes
    flops: Count


@register("refused")
class Refused(Message, frozen=True, kw_only=True):
    """The command was not carried out, and why. `code` is an error's stable name (`sordino_common.errors`)."""

    command: Label
    code: Label
    reason: Text
