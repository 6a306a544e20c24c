"""`require_separable` never proves what isn't so: whatever it accepts is run, with one row changed.

The oracle: for every value whose rows the analysis claims to know, a run with another row j gives the same bits
wherever row j is not. All ops of the table over drawn shapes, drawn places of the rows, and random programs;
programs made to deceive are in `test_attack_separable.py`.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from helpers_plan import CASES, Builder, Dice, Gen
from sordino_common.errors import PlanError
from sordino_common.plan import separable
from sordino_common.plan.arrays import NdArray
from sordino_common.plan.interpreter import UNBOUNDED, NumpyProgram
from sordino_common.plan.ops import OPS
from sordino_common.plan.row_rules import RULES, Mixes, Rows
from sordino_common.plan.separable import Mixed, NotSeparable, row_states
from sordino_common.plan.validation import validate_plan
from sordino_common.plan.values import Output, Plan, Ref

TRIALS = 5_000 if os.environ.get("SORDINO_SOAK") else 120
_STRANGE = (0.0, 1e30, -1e30, float("nan"), float("inf"), float("-inf"))


def every_value(plan: Plan) -> Plan:
    """The Plan with all its values as outputs."""
    count = len(plan.specs())
    return replace(plan, outputs=tuple(Output(f"v{number}", "value", number) for number in range(count)))


def elements_of_row(shape: tuple[int, ...], place: Rows, rows: int, row: int) -> NdArray:
    """A mask [*shape] of the elements that belong to the row."""
    mask = (np.arange(shape[place.dim]) // place.inner) % rows == row
    return np.broadcast_to(mask.reshape([-1 if d == place.dim else 1 for d in range(len(shape))]), shape)


def assert_claims_hold(plan: Plan, inputs: list[NdArray], changed: list[NdArray], row: int) -> list[Any]:
    """Run on inputs that differ in `row` alone, and compare what the analysis says with what came out."""
    rows, states = row_states(plan)
    program = NumpyProgram(every_value(plan))
    before, after = program.run(inputs), program.run(changed)  # neither may raise: the second claim
    for number, (state, a, b) in enumerate(zip(states, before, after, strict=True)):
        if isinstance(state, Mixed):
            continue
        if state is None:
            same: Any = np.ones(a.shape, bool)
        else:
            assert a.shape[state.dim] % (rows * state.inner) == 0
            same = ~elements_of_row(a.shape, state, rows, row)
        np.testing.assert_array_equal(a[same], b[same], err_msg=f"value {number}: {state}")
    return states


def other_row(gen: Gen, x: NdArray, row: int) -> NdArray:
    """x with another row `row`: noise, or what breaks arithmetic. The layout stays: NumPy sums in memory order."""
    changed = x.copy(order="K")
    if gen.pick(True, True, False):
        changed[row] = gen.rng.standard_normal(x.shape[1:]) * 3
    else:
        changed[row] = gen.rng.choice(np.array(_STRANGE, np.float32), x.shape[1:])
    return changed


# --- every op ----------------------------------------------------------------------------------------------------


class Spread:
    """A Plan of one drawn op whose operands are made of parameters, or of rows of x that lie in some dimension."""

    def __init__(self, gen: Gen, op: str, args: tuple[Any, ...]) -> None:
        self.gen = gen
        operands = list(self._arrays(args))
        sizes = [size for operand in operands for size in operand.shape if size > 1]
        self.rows = gen.pick(2, 2, 3, *(sizes[:3]))
        self.usual: Rows | None = None  # often all operands have their rows in one place
        self.places = [self._place(operand.shape) for operand in operands]
        width = sum(a.size // self.rows for a, place in zip(operands, self.places, strict=True) if place is not None)
        self.b = Builder(op)
        self.params = [a for a, place in zip(operands, self.places, strict=True) if place is None]
        given = [self.b.input(f"p{k}", "param", a.dtype.name, *a.shape) for k, a in enumerate(self.params)]
        self.x = self.b.input("x", "x", "float32", self.rows, max(width, 1))
        self.b.input("y", "y", "float32", self.rows)
        refs = []
        start, free = 0, iter(given)
        indices = index_places(op, args)
        for k, (operand, place) in enumerate(zip(operands, self.places, strict=True)):
            if place is None:
                refs.append(next(free))
                continue
            end = start + operand.size // self.rows
            value = self._laid_out(self.b.node("slice", self.x, 1, start, end, 1), operand, place)
            if k in indices and gen.pick(True, True, True, False):
                value = self.b.node("clamp", value, 0, max(indices[k] - 1, 0))
            refs.append(value)
            start = end
        left = iter(refs)
        self.b.node(op, *self._lifted(args, left))
        self.plan = replace(self.b.build(), outputs=(Output("x", "row", self.x.value),))

    def _arrays(self, arg: Any) -> Any:
        if isinstance(arg, np.ndarray):
            yield arg
        elif isinstance(arg, list | tuple):
            for item in arg:
                yield from self._arrays(item)

    def _lifted(self, arg: Any, refs: Any) -> Any:
        if isinstance(arg, np.ndarray):
            return next(refs)
        return tuple(self._lifted(item, refs) for item in arg) if isinstance(arg, list | tuple) else arg

    def _place(self, shape: tuple[int, ...]) -> Rows | None:
        found = [
            Rows(dim, inner)
            for dim, size in enumerate(shape)
            for inner in range(1, size + 1)
            if 0 not in shape and size % (inner * self.rows) == 0
        ]
        if self.usual in found and self.gen.pick(True, True, False):
            return self.usual
        place = self.gen.pick(*found, *found, None) if found else None
        self.usual = self.usual or place
        return place

    def _laid_out(self, part: Ref, operand: NdArray, place: Rows) -> Ref:
        """[B, numel / B] -> the operand's shape, its rows where `place` says; its dtype."""
        size = operand.shape[place.dim]
        before = int(np.prod(operand.shape[: place.dim], dtype=int))
        after = int(np.prod(operand.shape[place.dim + 1 :], dtype=int))
        outer = size // (self.rows * place.inner)
        value = self.b.node("view", part, (self.rows, before, outer, place.inner, after))
        value = self.b.node("view", self.b.node("permute", value, (1, 2, 0, 3, 4)), operand.shape)
        if operand.dtype != np.float32:
            value = self.b.node("to", value, operand.dtype.name)
        return value


def index_places(op: str, args: tuple[Any, ...]) -> dict[int, int]:
    """Number of the operand -> size that it indexes, for operands that are indices."""
    if op in ("gather", "scatter", "scatter_add"):
        return {1: args[0].shape[args[1]] if args[0].ndim else 1}
    if op in ("index", "index_put"):
        places = [place for place, index in enumerate(args[1]) if index is not None]
        return {1 + k: args[0].shape[place] for k, place in enumerate(places)}
    if op == "embedding":
        return {1: args[0].shape[0]}
    if op == "max_pool2d_with_indices_backward":
        return {2: args[1].shape[-1] * args[1].shape[-2]}
    return {}


_WITHOUT_ROWS = {"full", "arange", "index_put"}  # no operand; no rule


def check_op(op: str) -> Counter[str]:
    """What became of `TRIALS` Plans; raises where a claim does not hold."""
    seen: Counter[str] = Counter()
    for trial in range(TRIALS):
        gen = Dice(trial)
        spread = Spread(gen, op, CASES[op](gen))
        validate_plan(spread.plan, UNBOUNDED)
        x = gen.array(spread.b.specs[spread.x.value].shape)
        row = gen.int(0, spread.rows - 1)
        y = np.zeros(spread.rows, np.float32)
        try:
            row_states(spread.plan)
        except NotSeparable as refused:
            if "clamp it to" not in str(refused):
                raise
            seen["open index"] += 1
            continue
        inputs = [*spread.params, x, y]
        changed = [*spread.params, other_row(gen, x, row), y]
        states = assert_claims_hold(spread.plan, inputs, changed, row)
        seen["proven" if isinstance(states[-1], Rows) else "mixed" if states[-1] is not None else "free"] += 1
    return seen


@pytest.mark.parametrize("op", sorted(OPS))
def test_what_is_proven_of_an_op_is_so(op: str) -> None:
    seen = check_op(op)
    assert set(RULES) == set(OPS) - _WITHOUT_ROWS
    # The rule is neither idle nor a blanket yes.
    if op in RULES:
        assert seen["proven"]
    if op == "index_put":
        assert not seen["proven"]
        assert seen["mixed"]


def _pass_through(_rows: int, outs: Any, *args: Any) -> tuple[Any, ...]:
    """A rule that is wrong nearly everywhere: the rows stay where they are in the first operand that has any."""
    for value in args:
        for part in value if isinstance(value, tuple) else (value,):
            tag = getattr(part, "tag", None)
            if tag is not None and tag.dim < outs[0].rank and outs[0].shape[tag.dim] == part.shape[tag.dim]:
                return (tag,) * len(outs)
    raise Mixes("elsewhere")


@pytest.mark.parametrize(
    "op",
    ["mm", "bmm", "addmm", "softmax", "flip", "view", "permute", "gather", "scatter", "convolution", "slice_scatter"],
)
def test_a_wrong_rule_is_found_out(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separable, "RULES", {**RULES, op: _pass_through})
    with pytest.raises(AssertionError):
        check_op(op)


# --- random programs ---------------------------------------------------------------------------------------------


def _steps(gen: Gen, b: Builder, value: Ref) -> tuple[str, tuple[Any, ...]]:
    """A random op on a value, mostly one that moves rows about."""
    shape = b.specs[value.value].shape
    rank = len(shape)
    dim = gen.int(0, max(rank - 1, 0))
    numel = b.specs[value.value].numel
    other = Ref(gen.int(0, len(b.specs) - 1))
    sizes = [(numel,), shape[::-1], (*shape, 1), (1, *shape), (2, numel // 2), (numel // 2, 2), (2, 2, numel // 4)]
    return gen.pick(
        ("view", (value, gen.pick(*sizes))),
        ("permute", (value, gen.permutation(rank))),
        ("flip", (value, (dim,))),
        ("sum", (value, (dim,), gen.pick(True, False))),
        ("softmax", (value, dim)),
        ("cat", ((value, value), dim)),
        ("cat", ((value, other), dim)),
        ("slice", (value, dim, gen.pick(None, 1), None, gen.pick(1, 2))),
        ("select", (value, dim, 0)),
        ("repeat", (value, tuple(gen.pick(1, 2) for _ in range(rank + gen.int(0, 1))))),
        ("expand", (value, (gen.int(1, 3), *shape))),
        ("sub", (value, other, 1)),
        ("mul", (value, other)),
        ("mm", (value, other)),
        ("bmm", (value, other)),
        ("pad", (value, (1, 0))),
        ("amax", (value, (dim,), True)),
        ("where", (b.node("gt", value, other), value, 0.0) if b.specs[other.value].rank <= rank else (value, 0, 0)),
    )


def test_what_is_proven_of_a_random_program_is_so() -> None:
    proven: Counter[bool] = Counter()
    for trial in range(10 * TRIALS):
        states = _random_program(Dice(trial))
        proven[isinstance(states[-1], Rows)] += 1
    assert min(proven[True], proven[False]) > TRIALS


def _random_program(gen: Gen) -> list[Any]:
    rows = gen.pick(2, 2, 3, 4)
    b = Builder("random")
    shapes = [gen.pick((rows, rows), (rows, 2), (rows, 4), (2, 2), (4, rows), (rows, 2, 2)) for _ in range(2)]
    params = [b.input(f"p{k}", "param", "float32", *shape) for k, shape in enumerate(shapes)]
    x_shape = (rows, *gen.pick((2,), (4,), (rows,), (2, 2), (rows, 2), ()))
    x, y = b.input("x", "x", "float32", *x_shape), b.input("y", "y", "float32", rows, gen.pick(1, rows))
    values = [*params, x, y]
    for _ in range(gen.int(1, 8)):
        try:
            op, args = _steps(gen, b, gen.pick(*values[-3:], x))
            result = b.node(op, *args)
        except PlanError:
            continue
        if b.specs[result.value].numel < 4096:
            values.append(result)
    plan = b.build()
    arrays = [gen.array(b.specs[value.value].shape) for value in [*params, x, y]]
    row = gen.int(0, rows - 1)
    changed = [*arrays[:2], other_row(gen, arrays[2], row), other_row(gen, arrays[3], row)]
    return assert_claims_hold(replace(plan, outputs=(Output("x", "row", x.value),)), arrays, changed, row)
