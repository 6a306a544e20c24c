"""What is known here of a value that a committee keeps: its mask, its name, how large it can be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from sordino_common.spdz.lowering.settings import Ranges
from sordino_server.tensors.values import Cell, Value

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """`origin`: see `spdz.spec.origin_of`. `masks`: λ. |real value| <= `limit`; |m| and |λ| <= `room`. `ranges`: what
    was stated of all that it came of. The mask is a secret of this process: who has m and λ has the value."""

    origin: bytes
    masks: I64 = field(repr=False)
    limit: float
    room: int
    ranges: Ranges


class SharedCell(Cell):
    """Memory on shares. `limit`: what was stated not to be passed by whatever is written into it, None if nothing was.
    `base`: what was in it when it was last kept, if something else has been written since."""

    base: Value | None = None
    limit: float | None = None


def merged(stated: Iterable[Ranges]) -> Ranges:
    """What holds of a program whose operands came with these statements: of each, the tightest."""
    result = Ranges(state=math.inf)
    for one in stated:
        result = replace(
            result,
            state=min(result.state, one.state),
            values=min(result.values, one.values),
            updates=_least(result.updates, one.updates),
            preactivations=_least(result.preactivations, one.preactivations),
        )
    return replace(result, state=result.state if math.isfinite(result.state) else Ranges().state)


def _least(a: float | None, b: float | None) -> float | None:
    return a if b is None else b if a is None else min(a, b)


def rounded_up(limit: float) -> float:
    """The least power of two that is no smaller: programs of nearly the same ranges are then the same."""
    if not 0 < limit < math.inf:
        return limit or 2.0**-14
    mantissa, exponent = math.frexp(limit)
    return math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)
