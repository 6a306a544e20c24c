"""Sums, scalings, products and powers of elements."""

from __future__ import annotations

from typing import Any

import numpy as np

from sordino_common.plan.values import Node
from sordino_common.spdz.lowering.lazy import (
    Lazy,
    Pending,
    added,
    of_product,
    of_wire,
    scaled,
    to_wire,
)
from sordino_common.spdz.lowering.rules.base import Value, Walk, broadcast, lifted, number, rule

_MOST: int = 16  # a power costs about log2 of it rounds


@rule("add", "sub")
def _sum(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    x, y, alpha = args
    shape = node.outs[0].shape
    sign = float(alpha) if node.op == "add" else -float(alpha)
    return [added([lifted(walk, x, shape), scaled(lifted(walk, y, shape), sign)])]


@rule("neg")
def _neg(_walk: Walk, _node: Node, args: tuple[Any, ...]) -> list[Value]:
    return [scaled(args[0], -1.0)]


@rule("clone", "to")
def _same(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    if node.outs[0].dtype not in ("float32", "float64"):
        walk.refuse(f"a secret value can't become {node.outs[0].dtype}; targets and inputs stay floats")
    return [args[0]]


@rule("mul")
def _mul(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    x, y = args
    shape = node.outs[0].shape
    for value, other in ((x, y), (y, x)):
        same = number(value)
        if same is not None and isinstance(other, Lazy):
            return [broadcast(walk, scaled(other, same), shape)]
    return [multiplied(walk, lifted(walk, x, shape), lifted(walk, y, shape))]


@rule("div")
def _div(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    x, y = args
    if isinstance(y, Lazy):
        walk.refuse("division by a secret value is not offered on secret shares yet; scale by a constant instead")
    shape = node.outs[0].shape
    same = number(y)
    if same is not None:
        if same == 0.0:
            walk.refuse("division by zero")
        return [broadcast(walk, scaled(x, 1.0 / same), shape)]
    divisor = np.asarray(y, np.float64)
    if bool((divisor == 0).any()):
        walk.refuse("division by zero")
    return [multiplied(walk, lifted(walk, x, shape), lifted(walk, 1.0 / divisor, shape))]


@rule("pow")
def _pow(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    x, exponent = args
    power = number(exponent)
    if not isinstance(x, Lazy) or power is None or power != int(power) or not 0 <= power <= _MOST:
        walk.refuse(f"on secret shares a power has a constant whole exponent, 0..{_MOST}")
    if power == 0:
        return [Lazy(shape=node.outs[0].shape, terms=(), constant=1.0)]
    if power == 1:
        return [x]
    c, wire = to_wire(walk.sketch, x)
    if power >= 3:
        walk.powers.setdefault((wire, abs(c)), walk.index)
        if walk.preactivations is not None and c:
            walk.sketch.cap(wire, walk.preactivations / abs(c))
    factor = 1.0
    for _ in range(int(power)):
        factor *= c
    return [scaled(_power(walk, wire, int(power)), factor)]


def _power(walk: Walk, wire: int, power: int) -> Lazy:
    """wire^power, the last product pending: halves are squared, so that even powers are shared with derivatives."""
    if power == 1:
        return of_wire(walk.sketch, wire)
    odd = power % 2
    left = wire if odd else to_wire(walk.sketch, _power(walk, wire, power // 2))[1]
    right = to_wire(walk.sketch, _power(walk, wire, power - 1))[1] if odd else left
    return of_product(Pending("mul", min(left, right), max(left, right), (), walk.sketch.shape(wire)), 1.0)


def multiplied(walk: Walk, x: Lazy, y: Lazy) -> Lazy:
    """x·y of two values of one shape, pending."""
    (c, a), (d, b) = to_wire(walk.sketch, x), to_wire(walk.sketch, y)
    return of_product(Pending("mul", min(a, b), max(a, b), (), x.shape), c * d)
