"""Gradients of rows that are outer products leave a Plan as their two factors: roles row-left and row-right.

For one row, the gradient of a linear layer's weight is the backward signal times the input: [m, 1] @ [1, n]. Over a
batch `vmap` makes it bmm([B, m, 1], [B, 1, n]), the largest operation of a small model's step and all of its memory.
The two factors say the same (`plan.gradients`), and the product is never made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sordino_common.plan.values import Output, Ref
from sordino_server.trace.draft import Draft
from sordino_server.trace.peephole import Peephole

Named = tuple[str, str, Ref]


def factored(draft: Draft, outputs: Sequence[Named]) -> list[Named]:
    """The outputs (name, role, value), each row-gradient that is an outer product as two."""
    result: list[Named] = []
    for name, role, value in outputs:
        factors = _factors(draft, value) if role == "row-gradient" else None
        if factors is None:
            result.append((name, role, value))
        else:
            result += [(name, "row-left", factors[0]), (name, "row-right", factors[1])]
    return result


def _factors(draft: Draft, value: Ref) -> tuple[Ref, Ref] | None:
    """[B, m] and [B, n] for a value [B, m, n] made as the products of their elements."""
    made = draft.maker(value)
    if made is not None and made[0] == "permute" and made[1][1] == (0, 2, 1) and isinstance(made[1][0], Ref):
        swapped = _factors(draft, made[1][0])
        return None if swapped is None else (swapped[1], swapped[0])
    shape = draft.spec(value).shape
    if made is None or made[0] not in ("bmm", "mul") or len(shape) != 3:
        return None
    rows, m, n = shape
    operands = [arg for arg in made[1] if isinstance(arg, Ref)]
    if len(operands) != 2:
        return None
    if made[0] == "mul" and draft.spec(operands[0]).shape == (rows, 1, n):
        operands.reverse()
    left, right = operands
    if (draft.spec(left).shape, draft.spec(right).shape) != ((rows, m, 1), (rows, 1, n)):
        return None
    peephole, origin = Peephole(draft), draft.origin(value)
    return peephole.view(left, (rows, m), origin), peephole.view(right, (rows, n), origin)


def multiplied(outputs: Sequence[Output], arrays: Sequence[NDArray[Any]]) -> Iterator[tuple[Output, NDArray[Any]]]:
    """What `factored` came from: each pair of factors as one array again."""
    for place, (output, array) in enumerate(zip(outputs, arrays, strict=True)):
        if output.role == "row-left":
            yield output, np.einsum("bm,bn->bmn", array, arrays[place + 1])
        elif output.role != "row-right":
            yield output, array
