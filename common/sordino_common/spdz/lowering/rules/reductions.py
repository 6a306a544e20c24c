"""Sums and means."""

from __future__ import annotations

import math
from typing import Any

from sordino_common.plan.ops.rules import dims_of
from sordino_common.plan.values import Node
from sordino_common.spdz.lowering.lazy import Lazy, scaled, stepped, summed
from sordino_common.spdz.lowering.rules.base import Value, Walk, rule


@rule("sum", "mean")
def _sum(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    x, dims, keepdim = args
    assert isinstance(x, Lazy)
    over = dims_of(dims, len(x.shape))
    total = summed(walk.sketch, x, over)
    if node.op == "mean":
        count = math.prod(x.shape[dim] for dim in over)
        if count == 0:
            walk.refuse("the mean of nothing")
        total = scaled(total, 1.0 / count)
    return [stepped(walk.sketch, total, "view", node.outs[0].shape) if keepdim else total]
