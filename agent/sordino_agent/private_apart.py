"""Whether a row's gradient is the same, bit for bit, whatever the other rows of its batch hold.

That a row reaches no other row's gradient is proven for the Plan (`plan/separable`). In floats there is more to say.

- *Place.* A linear algebra library may add in another order for the last rows of a batch, or for every other block of
  six (OpenBLAS does, on an x86 CPU with AVX-512: two rows alike at two places of a batch differ in their last digits).
  So a row never changes its place: `private_sum.batches_of`.
- *Company.* At its place, a row must not feel what the others hold. No library that works by shapes alone lets it;
  whether the one at hand is such a one is tried out here, once for every Plan: half of a batch is exchanged, for other
  rows or for rows of NaN, and the other half must give the same bits, and the same integers on the grid. The halves are
  those by a bit of the place's number, so each two places are on different sides of one of them.

The rows tried are drawn by a fixed seed: the outcome tells nothing of a dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sordino_agent.errors import BadCommand
from sordino_agent.private_step import GradientLayout
from sordino_agent.private_sum import RowSum
from sordino_common.plan.executors import Program
from sordino_common.plan.gradients import OuterRows, RowGradients, WholeRows
from sordino_common.plan.spec import TensorSpec

Values = NDArray[Any]
Others = Callable[[np.random.Generator, TensorSpec, float], Values]
_SCALE: Final = 0.3  # of parameters: so small that activations are not saturated, where nothing would show


def require_apart(program: Program, layout: GradientLayout) -> None:
    """Raise `BadCommand` unless half of a batch gives the same whatever the other half is."""
    plan = program.plan
    draw = np.random.default_rng(20)
    total = RowSum(layout.gradients, clip_norm=1.0, grid_bits=16, most_rows=layout.gradients.rows)
    feeds: list[Values] = [np.empty(0)] * len(plan.inputs)
    for index in layout.params:
        feeds[index] = _drawn(draw, plan.inputs[index].spec, _SCALE)
    ours = [_drawn(draw, plan.inputs[index].spec, 1.0) for index in (layout.x, layout.y)]
    expected = _run(program, layout, feeds, ours, total)
    for keep, others in _halves(layout.gradients.rows):
        batch = [mine.copy() for mine in ours]
        for values, index in zip(batch, (layout.x, layout.y), strict=True):
            values[~keep] = others(draw, plan.inputs[index].spec, 1.0)[~keep]
        found = _run(program, layout, feeds, batch, total)
        if not all(_same(one[keep], two[keep]) for one, two in zip(expected, found, strict=True)):
            raise BadCommand(
                f"Plan {plan.name!r}: on this device a row's gradient differs in its last digits by what the other "
                "rows of the batch hold, so that one row could move all gradients: no bound holds exactly. Set "
                "executor: numpy, and report the device's linear algebra library"
            )


def _run(
    program: Program, layout: GradientLayout, feeds: list[Values], batch: list[Values], total: RowSum
) -> list[Values]:
    """What each row gives: the Plan's outputs, and integers on the grid."""
    feeds[layout.x], feeds[layout.y] = batch
    with np.errstate(all="ignore"):
        outs = program.run(feeds, own=False)
        total.clear()
        total.add(outs, np.ones(layout.gradients.rows, dtype=np.bool_))
    return [np.array(outs[place]) for place in _places(layout.gradients)] + total.integers()


def _halves(rows: int) -> Iterator[tuple[NDArray[np.bool_], Others]]:
    """Which places are kept, and what the others are exchanged for."""
    for bit in range((rows - 1).bit_length()):
        keep = (np.arange(rows) >> bit & 1).astype(np.bool_)
        yield keep, _drawn if bit % 2 else _nothing
        yield ~keep, _nothing if bit % 2 else _drawn


def _drawn(draw: np.random.Generator, spec: TensorSpec, scale: float) -> Values:
    """Normal numbers; zeros where integers are expected, as an index that is always in range."""
    if not spec.dtype.startswith("float"):
        return np.zeros(spec.shape, dtype=spec.dtype)
    return np.asarray(scale * draw.normal(size=spec.shape), dtype=spec.dtype)


def _nothing(_: np.random.Generator, spec: TensorSpec, _scale: float) -> Values:
    return np.full(spec.shape, np.nan if spec.dtype.startswith("float") else 0, dtype=spec.dtype)


def _places(gradients: RowGradients) -> list[int]:
    """The outputs that gradients are made of."""
    whole = {block.output for block in gradients.blocks if isinstance(block, WholeRows)}
    outer = ({block.left, block.right} for block in gradients.blocks if isinstance(block, OuterRows))
    return sorted(whole.union(*outer))


def _same(one: Values, two: Values) -> bool:
    return np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(two).tobytes()
