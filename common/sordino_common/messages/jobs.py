"""Training, evaluation and column moments on a device's own rows."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from sordino_common.messages.array import Array
from sordino_common.messages.base import Count, Digest, Label, Message, Name, RunId, register

Arrays = Annotated[tuple[Array, ...], msgspec.Meta(max_length=10_000)]
Columns = Annotated[tuple[Label, ...], msgspec.Meta(min_length=1, max_length=4096)]


class DataRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which rows and columns of a device's dataset feed a Plan, and how they are scaled before they do.

    `features` are joined along the last axis into x of shape [rows, D] (or, if there is a single column whose entries
    are tensors, x has that column's shape). x is fed as (x - offset) / scale, the target as (y - target_offset) /
    target_scale. `offset` and `scale` are float64 vectors with an entry per scalar feature, or a single entry for all
    elements of a single tensor-valued column, or empty: no scaling."""

    dataset: Name
    features: Columns
    target: Label
    split: Literal["train", "test"]
    offset: Annotated[tuple[float, ...], msgspec.Meta(max_length=4096)] = ()
    scale: Annotated[tuple[float, ...], msgspec.Meta(max_length=4096)] = ()
    target_offset: float = 0.0
    target_scale: float = 1.0


@register("moments")
class Moments(Message, frozen=True, kw_only=True):
    """Server: count, sums and sums of squares of these columns over the train rows. Answered by `MomentsResult`."""

    dataset: Name
    columns: Columns


@register("moments-result")
class MomentsResult(Message, frozen=True, kw_only=True):
    """Agent: `sums[j]`, `squares[j]` (float64) over `rows` train rows, a pair per column asked for."""

    rows: Count
    sums: Array
    squares: Array


class RecordTerms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """DP-SGD with full noise on the device: in every local step each row is in with probability q =
    `sampling_threshold` / 2^32, its gradient is clipped to L2 norm `clip_norm` on a grid of clip_norm /
    2^`grid_bits`, and N_Z(0, `sigma_squared`) is added to every entry of the sum, in units of the grid.

    The sum is divided by q · rows and handed to the Plan `apply_plan`, a step of the optimizer."""

    clip_norm: Annotated[float, msgspec.Meta(gt=0.0, le=1e12)]
    grid_bits: Annotated[int, msgspec.Meta(ge=1, le=20)]
    sampling_threshold: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
    sigma_squared: Annotated[int, msgspec.Meta(ge=1, le=1 << 62)]
    apply_plan: Digest


@register("train")
class Train(Message, frozen=True, kw_only=True):
    """Server: start from `params`, take `steps` local optimizer steps of the Plan on batches of `batch_rows` rows.

    Rows come in a stream of shuffled passes over the train rows (an epoch's leftover rows begin the next batch), from
    a generator seeded by (`seed`, `round`, the agent's name): the same command gives the same bytes. `steps` = 0 means
    `epochs` passes: max(1, round(epochs * rows / batch_rows)) steps. Optimizer state starts at zero.
    Answered by `Trained` or `Refused`. The same (run, round, attempt) is computed once; a repeat is answered again.

    With `privacy`, `plan_id` is a gradient Plan (`plan.gradients`), rows are sampled by the device's own generator,
    whatever `seed` is, and `epochs` means max(1, round(epochs / q)) steps. No loss is told: `loss_sum` is 0."""

    run: RunId
    round: Count
    attempt: Count
    plan_id: Digest
    data: DataRef
    params: Arrays
    batch_rows: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    steps: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
    epochs: Annotated[float, msgspec.Meta(ge=0.0, le=1e6)]
    seed: Count
    privacy: RecordTerms | None = None


@register("trained")
class Trained(Message, frozen=True, kw_only=True):
    """Agent: `update[k]` = params after minus params before (same dtypes and shapes), over `rows` train rows.

    `loss_sum` is the sum of the Plan's loss over `steps` steps; `seconds` is the device's time for the task."""

    run: RunId
    round: Count
    attempt: Count
    rows: Count
    steps: Count
    update: Arrays
    loss_sum: float
    seconds: float


@register("evaluate")
class Evaluate(Message, frozen=True, kw_only=True):
    """Server: run the Plan on the rows of `data`, `batch_rows` at a time. Answered by `Evaluated` or `Refused`."""

    run: RunId
    round: Count
    plan_id: Digest
    data: DataRef
    params: Arrays
    batch_rows: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


@register("evaluated")
class Evaluated(Message, frozen=True, kw_only=True):
    """Agent: for every output of role `row`, its float64 sum over `rows` rows, in the Plan's order. Only sums."""

    run: RunId
    round: Count
    rows: Count
    names: Annotated[tuple[Label, ...], msgspec.Meta(max_length=256)]
    sums: Annotated[tuple[float, ...], msgspec.Meta(max_length=256)]
    seconds: float


@register("cancel")
class Cancel(Message, frozen=True, kw_only=True):
    """Server: stop what is still running for this run and round, or for the whole run if `round` is null.

    No answer beyond the acknowledgement; cancelling what is not there does nothing."""

    run: RunId
    round: Count | None
