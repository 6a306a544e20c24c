"""Integers of a Plan that can be no index out of range, known without running it.

An index out of range ends a run with an error. If the index comes with a row of private data, that the run ended says
something of this row to whoever sees it, and no noise hides it. So an index has to be in range for certain: it comes
out of an op that makes nothing else (the places that max pooling finds, argmax), or it is clamped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sordino_common.plan.ops.rules import dim_of, is_integer
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import Node, Ref

# Ops whose result has no elements but those of their first operand.
_REARRANGE: Final = frozenset({"view", "permute", "expand", "slice", "select", "flip", "repeat", "clone"})


def bounds_of(node: Node, specs: Sequence[TensorSpec], bounds: Sequence[int | None]) -> list[int | None]:
    """For each result of `node` a number that all its elements are below, while none is negative; None if unknown.

    `specs` and `bounds` are those of the values before it."""
    known: list[int | None] = [None] * len(node.outs)
    first: Any = node.args[0] if node.args else None
    if node.op in _REARRANGE:
        known[0] = bounds[first.value]
    elif node.op == "max_pool2d_with_indices":
        known[1] = specs[first.value].shape[-2] * specs[first.value].shape[-1]
    elif node.op in ("argmax", "argmin"):
        spec, dim = specs[first.value], node.args[1]
        known[0] = spec.shape[dim_of(dim, spec.rank)] if isinstance(dim, int) and spec.rank else spec.numel
    elif node.op == "clamp" and is_integer(node.outs[0].dtype):  # a float may be NaN, which is clamped to NaN
        low, high = node.args[1:]
        if isinstance(low, int | float) and isinstance(high, int | float) and 0 <= low <= high:
            known[0] = int(high) + 1
    return known


def index_operands(node: Node, specs: Sequence[TensorSpec]) -> list[tuple[Ref, int]]:
    """The operands for which the kernel raises if an element is not an index below the given size."""
    args: tuple[Any, ...] = node.args
    if node.op in ("gather", "scatter", "scatter_add"):
        spec = specs[args[0].value]
        return [(args[2], spec.shape[dim_of(args[1], spec.rank)] if spec.rank else 1)]
    if node.op in ("index", "index_put"):
        sizes = specs[args[0].value].shape
        return [(index, size) for index, size in zip(args[1], sizes, strict=False) if index is not None]
    if node.op == "embedding":
        return [(args[1], specs[args[0].value].shape[0])]
    if node.op == "max_pool2d_with_indices_backward":
        shape = specs[args[1].value].shape
        return [(args[-1], shape[-2] * shape[-1])]
    return []
