"""Tensors that live on a device under names: put, compute with a Plan, fetch (policy decides), drop."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from sordino_common.messages.array import Array
from sordino_common.messages.base import Bytes, Count, Digest, Label, Message, Name, register

TensorId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
TensorIds = Annotated[tuple[TensorId, ...], msgspec.Meta(max_length=4096)]


@register("tensor-put")
class TensorPut(Message, frozen=True, kw_only=True):
    """Server: keep `value` under `tensor_id` for `lease_s` seconds. Answered by `TensorStored` or `Refused`."""

    tensor_id: TensorId
    value: Array
    lease_s: Annotated[float, msgspec.Meta(gt=0.0, le=86_400.0)]


@register("tensor-load")
class TensorLoad(Message, frozen=True, kw_only=True):
    """Server: keep these columns of a dataset's split under `tensor_id`, as numbers of `dtype`: one column as it is,
    several joined along the last axis. Answered by `TensorStored` or `Refused`.

    What is loaded never leaves the device, and what Plans make of it leaves only if the device's policy names every
    one of these Plans."""

    tensor_id: TensorId
    dataset: Name
    columns: Annotated[tuple[Label, ...], msgspec.Meta(min_length=1, max_length=4096)]
    split: Literal["train", "test"]
    dtype: Literal["float32", "float64", "int64"]
    lease_s: Annotated[float, msgspec.Meta(gt=0.0, le=86_400.0)]


@register("tensor-renew")
class TensorRenew(Message, frozen=True, kw_only=True):
    """Server: keep these tensors for `lease_s` seconds from now. Answered by `TensorStored` with those that are there;
    unknown ids are no error."""

    tensor_ids: TensorIds
    lease_s: Annotated[float, msgspec.Meta(gt=0.0, le=86_400.0)]


@register("tensor-run")
class TensorRun(Message, frozen=True, kw_only=True):
    """Server: run a Plan; its outputs are stored under `outputs`. Answered by `TensorStored`.

    The Plan's first inputs are the stored tensors `inputs`, the last ones are `values`: numbers that change from run to
    run (a step size, say), which have no name. Once the Plan has run, and before its outputs are stored, `drops` are
    forgotten; unknown ids are no error there. `Cancel` of the run `task_of(outputs[0])` stops it."""

    plan_id: Digest
    inputs: TensorIds
    outputs: TensorIds
    values: Annotated[tuple[Array, ...], msgspec.Meta(max_length=4096)] = ()
    drops: TensorIds = ()
    lease_s: Annotated[float, msgspec.Meta(gt=0.0, le=86_400.0)]


def task_of(tensor_id: bytes) -> str:
    """The name by which a `Cancel` finds the task that makes this tensor: a load, or the run whose first output it
    is."""
    return f"tensor-{tensor_id.hex()}"


@register("tensor-stored")
class TensorStored(Message, frozen=True, kw_only=True):
    """Agent: the tensors are there. What the store holds and may hold, in bytes."""

    tensor_ids: TensorIds
    used_bytes: Bytes
    budget_bytes: Bytes


@register("tensor-get")
class TensorGet(Message, frozen=True, kw_only=True):
    """Server: send me this tensor. The device's policy decides. Answered by `TensorValue` or `Refused`: at once, or
    when the task `task_of(tensor_id)` is over, if it is under way."""

    tensor_id: TensorId


@register("tensor-value")
class TensorValue(Message, frozen=True, kw_only=True):
    """Agent: the tensor's value."""

    tensor_id: TensorId
    value: Array


@register("tensor-drop")
class TensorDrop(Message, frozen=True, kw_only=True):
    """Server: forget these tensors. Answered by `TensorDropped`; unknown ids are no error."""

    tensor_ids: TensorIds


@register("tensor-dropped")
class TensorDropped(Message, frozen=True, kw_only=True):
    """Agent: how many of them were there."""

    dropped: Count
