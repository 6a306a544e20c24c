"""Matrix products."""

from __future__ import annotations

from typing import Any

import numpy as np

from sordino_common.plan.values import Node
from sordino_common.spdz.circuit import ProductKind
from sordino_common.spdz.lowering.lazy import Lazy, Pending, added, of_product, scaled, to_wire
from sordino_common.spdz.lowering.rules.base import Value, Walk, lifted, rule


def matrices(walk: Walk, kind: ProductKind, x: Any, y: Any) -> Lazy:
    """X·Y, pending; either may be public."""
    left = x if isinstance(x, Lazy) else lifted(walk, x, np.shape(x))
    right = y if isinstance(y, Lazy) else lifted(walk, y, np.shape(y))
    (c, a), (d, b) = to_wire(walk.sketch, left), to_wire(walk.sketch, right)
    shape = (*left.shape[:-1], right.shape[-1])
    return of_product(Pending(kind, a, b, (), shape), c * d)


@rule("mm", "bmm")
def _product(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    return [matrices(walk, "mm" if node.op == "mm" else "bmm", args[0], args[1])]


@rule("addmm")
def _addmm(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    bias, x, y, beta, alpha = args
    shape = node.outs[0].shape
    product: Lazy
    if isinstance(x, Lazy) or isinstance(y, Lazy):
        product = matrices(walk, "mm", x, y)
    else:
        product = lifted(walk, np.asarray(x, np.float64) @ np.asarray(y, np.float64), shape)
    return [added([scaled(lifted(walk, bias, shape), float(beta)), scaled(product, float(alpha))])]
