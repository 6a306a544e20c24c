"""Operations on positions: an op's own kernel, run on numbered positions, says where each entry comes from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sordino_common.plan.ops import OPS, resolve
from sordino_common.plan.values import Node
from sordino_common.spdz.lowering.lazy import Lazy, moved, of_wire, stepped, to_output, to_wire
from sordino_common.spdz.lowering.rules.base import Array, Value, Walk, broadcast, lifted, rule


@rule("view")
def _view(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    return [stepped(walk.sketch, args[0], "view", node.outs[0].shape)]


@rule("permute")
def _permute(walk: Walk, _node: Node, args: tuple[Any, ...]) -> list[Value]:
    x, dims = args
    return [stepped(walk.sketch, x, "permute", tuple(dim % len(x.shape) for dim in dims))]


@rule("expand")
def _expand(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    return [broadcast(walk, args[0], node.outs[0].shape)]


@rule("slice", "select", "flip", "repeat", "pad", "gather", "index", "embedding")
def _positions(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    x = args[0]
    tables = [item for arg in args[1:] for item in (arg if isinstance(arg, tuple) else (arg,))]
    if not isinstance(x, Lazy) or any(isinstance(item, Lazy) for item in tables):
        walk.refuse("on secret shares the positions must be public: a secret can't be used as an index")
    arrays = [item for item in tables if isinstance(item, np.ndarray)]
    plain = list(resolve(node.args, walk.specs))
    fill = 0.0
    if node.op == "pad":
        fill, plain[2] = float(plain[2]), 0
    specs = tuple(type(out)("int64", out.shape) for out in node.outs)
    plain[0] = type(plain[0])("int64", x.shape)
    kernel = OPS[node.op].kernel(specs, *plain)
    count = math.prod(x.shape)
    numbered = np.asarray(kernel(np.arange(1, count + 1, dtype=np.int64).reshape(x.shape), *arrays))
    index = np.where(numbered == 0, count, numbered - 1)
    return [placed(walk, x, index, fill)]


def placed(walk: Walk, x: Lazy, index: Array, fill: float = 0.0) -> Lazy:
    """x's entries at flat positions `index`, `fill` where the position is x's element count."""
    count = math.prod(x.shape)

    def move(array: Array) -> Array:
        return np.append(array.ravel(), fill)[index]

    filled = fill != 0.0 and bool((index == count).any())
    constant = isinstance(x.constant, np.ndarray) or x.constant != 0.0 or filled
    return moved(walk.sketch, x, lambda wire: walk.sketch.gather(wire, index), index.shape, move if constant else None)


@rule("cat")
def _cat(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    parts, dim = args
    rank = len(node.outs[0].shape)
    axis = dim % rank
    used = (
        [part for part in parts if np.shape(part) != (0,) or rank == 1]
        if not any(isinstance(part, Lazy) for part in parts)
        else [part for part in parts if (part.shape if isinstance(part, Lazy) else np.shape(part)) != (0,) or rank == 1]
    )
    lazies = [part if isinstance(part, Lazy) else lifted(walk, part, np.shape(part)) for part in used]
    lazies = [lazy for lazy in lazies if lazy.shape[axis]] or lazies[:1]
    wires = [to_wire(walk.sketch, lazy) for lazy in lazies]
    bases = {base for base, _ in wires}
    if len(bases) == 1:
        base = bases.pop()
        return [of_wire(walk.sketch, walk.sketch.joined(tuple(wire for _, wire in wires), axis), base)]
    exact = tuple(to_output(walk.sketch, lazy, carried=False) for lazy in lazies)
    return [of_wire(walk.sketch, walk.sketch.joined(exact, axis))]


@rule("slice_scatter", "select_scatter")
def _written(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    """x with some entries replaced: entries of x and src side by side, taken from where each belongs."""
    x, src = args[0], args[1]
    shape = node.outs[0].shape
    left = x if isinstance(x, Lazy) else lifted(walk, x, shape)
    right = src if isinstance(src, Lazy) else lifted(walk, src, np.shape(src))
    plain = list(resolve(node.args, walk.specs))
    plain[0], plain[1] = (type(plain[k])("int64", plain[k].shape) for k in (0, 1))
    kernel = OPS[node.op].kernel(tuple(type(out)("int64", out.shape) for out in node.outs), *plain)
    first, second = math.prod(left.shape), math.prod(right.shape)
    index = kernel(np.arange(first).reshape(left.shape), np.arange(first, first + second).reshape(right.shape))
    return [_chosen(walk, left, right, np.asarray(index))]


@rule("where")
def _where(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    condition, x, y = args
    if isinstance(condition, Lazy):
        walk.refuse("on secret shares the condition must be public: it would need a comparison of secrets")
    shape = node.outs[0].shape
    left, right = (broadcast(walk, lifted(walk, part, np.shape(part)) if not isinstance(part, Lazy) else part, shape)
                   for part in (x, y))  # fmt: skip
    count = math.prod(shape)
    numbered = np.arange(count).reshape(shape)
    return [_chosen(walk, left, right, np.where(np.broadcast_to(condition, shape), numbered, numbered + count))]


def _chosen(walk: Walk, left: Lazy, right: Lazy, index: Array) -> Lazy:
    """Entries of two values side by side, taken at flat positions `index`."""
    flat = [stepped(walk.sketch, part, "view", (math.prod(part.shape),)) for part in (left, right)]
    wires = [to_wire(walk.sketch, part) for part in flat]
    if wires[0][0] == wires[1][0]:
        both = of_wire(walk.sketch, walk.sketch.joined((wires[0][1], wires[1][1]), 0), wires[0][0])
    else:
        exact = tuple(to_output(walk.sketch, part, carried=False) for part in flat)
        both = of_wire(walk.sketch, walk.sketch.joined(exact, 0))
    return placed(walk, both, index)
