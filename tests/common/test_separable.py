"""`require_separable` never proves what isn't so: whatever it accepts is run, with one row changed.

The oracle: for every value whose rows the analysis claims to know, a run with another row j gives the same bits
wherever row j is not. All ops of the table over drawn shapes, drawn places of the rows, random programs, and programs
made to deceive.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from helpers_plan import CASES, Builder, Dice, Gen, linear_step
from sordino_common.errors import PlanError
from sordino_common.plan import separable
from sordino_common.plan.arrays import NdArray
from sordino_common.plan.interpreter import UNBOUNDED, NumpyProgram
from sordino_common.plan.ops import OPS
from sordino_common.plan.row_rules import RULES, Mixes, Rows
from sordino_common.plan.separable import Mixed, NotSeparable, require_separable, row_states
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


# --- programs made to deceive ------------------------------------------------------------------------------------

B, F = 4, 4  # as many features as rows: nothing can be told from the sizes


class Deceit:
    """x [4, 4], y [4], a weight [4, 4]; `leave` hands out a value as the rows of the weight's gradient."""

    def __init__(self, rows: int = B) -> None:
        self.b = Builder("deceit")
        self.w = self.b.input("w", "param", "float32", F, F)
        self.x = self.b.input("x", "x", "float32", rows, F)
        self.y = self.b.input("y", "y", "float32", rows)

    def node(self, op: str, *args: Any) -> Any:
        return self.b.node(op, *args)

    def leave(self, value: Ref, role: str = "row", name: str = "loss") -> Plan:
        self.b.output(name, role, value)
        return self.b.build()


def _sum_and_broadcast(d: Deceit) -> Ref:
    return d.node("add", d.x, d.node("sum", d.x, (0,), True), 1)


def _mean_of_all(d: Deceit) -> Ref:
    return d.node("sub", d.x, d.node("mean", d.x, (), False), 1)


def _batch_norm(d: Deceit) -> Ref:
    centred = d.node("sub", d.x, d.node("mean", d.x, (0,), True), 1)
    return d.node("mul", centred, d.node("rsqrt", d.node("add", d.node("var", d.x, (0,), 0, True), 1e-5, 1)))


def _shifted_view(d: Deceit) -> Ref:
    """[4, 4] -> 16 -> 15 and a zero in front: element i of a row is element i - 1, and the first the row before's."""
    flat = d.node("view", d.x, (B * F,))
    return d.node("view", d.node("pad", d.node("slice", flat, 0, 0, B * F - 1, 1), (1, 0), 0.0), (B, F))


def _transposed_view(d: Deceit) -> Ref:
    return d.node("view", d.node("permute", d.x, (1, 0)), (B, F))


def _transposed(d: Deceit) -> Ref:
    return d.node("permute", d.x, (1, 0))


def _flipped(d: Deceit) -> Ref:
    return d.node("flip", d.x, (0,))


def _rolled(d: Deceit) -> Ref:
    return d.node("cat", (d.node("slice", d.x, 0, 1, None, 1), d.node("slice", d.x, 0, 0, 1, 1)), 0)


def _indexed(d: Deceit) -> Ref:
    return d.node("index", d.x, (d.node("arange", 3, -1, -1, "int64"),))


def _picked(d: Deceit) -> Ref:
    return d.node("expand", d.node("select", d.x, 0, 0), (B, F))


def _softmax_over_rows(d: Deceit) -> Ref:
    return d.node("softmax", d.x, 0)


def _gram(d: Deceit) -> Ref:
    return d.node("mm", d.x, d.node("permute", d.x, (1, 0)))


def _rows_inside_a_product(d: Deceit) -> Ref:
    return d.node("mm", d.w, d.x)


def _summed_gradient(d: Deceit) -> Ref:
    return d.node("expand", d.node("mm", d.node("permute", d.x, (1, 0)), d.x), (B, F, F))


def _product_by_the_side(d: Deceit) -> Ref:
    x = d.node("view", d.x, (1, B, F))
    return d.node("view", d.node("bmm", x, d.node("permute", x, (0, 2, 1))), (B, B))


def _bias_of_other_rows(d: Deceit) -> Ref:
    return d.node("addmm", d.node("permute", d.x, (1, 0)), d.x, d.w, 1, 1)


def _condition_of_other_rows(d: Deceit) -> Ref:
    return d.node("where", d.node("gt", d.node("permute", d.x, (1, 0)), 0), d.x, 0.0)


def _running_sum(d: Deceit) -> Ref:
    """A cumulative sum over the rows, as the product with a triangle of ones."""
    table = d.node("arange", 0, B, 1, "int64")
    triangle = d.node("ge", d.node("view", table, (B, 1)), d.node("view", table, (1, B)))
    return d.node("mm", d.node("to", triangle, "float32"), d.x)


def _labels_across(d: Deceit) -> Ref:
    """y [4] against x [4, 4] broadcasts from the right: column i gets row i's label."""
    return d.node("mul", d.x, d.y)


def _reread_rows(d: Deceit) -> Ref:
    """Rows of x as rows of the result only for their number: [4, 4] -> [2, 8] -> transposed -> [4, 4]."""
    return d.node("view", d.node("permute", d.node("view", d.x, (2, 8)), (1, 0)), (B, F))


def _convolved_across(d: Deceit) -> Ref:
    """Rows as channels of one image, all in one group."""
    image = d.node("view", d.x, (1, B, F))
    kernel = d.node("view", d.w, (B, F, 1))
    return d.node("view", d.node("convolution", image, kernel, None, (1,), (0,), (1,), False, (0,), 1), (B, F))


def _convolved_in_wrong_groups(d: Deceit) -> Ref:
    """Two groups of two rows each."""
    image = d.node("view", d.x, (1, B, F))
    kernel = d.node("view", d.node("slice", d.w, 1, 0, 2, 1), (B, 2, 1))
    return d.node("view", d.node("convolution", image, kernel, None, (1,), (0,), (1,), False, (0,), 2), (B, F))


def _convolved_along(d: Deceit) -> Ref:
    """Rows as the places of one image."""
    image = d.node("view", d.node("permute", d.x, (1, 0)), (1, F, B))
    out = d.node("convolution", image, d.node("view", d.w, (2, F, 2)), None, (1,), (1,), (1,), False, (0,), 1)
    return d.node("slice", d.node("permute", d.node("view", out, (2, B + 1)), (1, 0)), 0, 0, B, 1)


def _kernel_gradient_over_images(d: Deceit) -> Ref:
    x = d.node("view", d.x, (B, F, 1))
    geometry = ((1,), (0,), (1,), False, (0,), 1)
    kernel = d.node("view", d.w, (F, F, 1))
    grad = d.node("convolution_backward", x, x, kernel, None, *geometry, (False, True, False))
    return d.node("view", grad, (F, F))


def _pooled_over_rows(d: Deceit) -> Ref:
    pooled = d.node("avg_pool2d", d.node("view", d.x, (1, B, F)), (2, 1), (1, 1), (1, 0), False, True, None)
    return d.node("slice", d.node("view", pooled, (B + 1, F)), 0, 0, B, 1)


def _scattered_onto_another(d: Deceit) -> Ref:
    index = d.node("expand", d.node("view", d.node("arange", 3, -1, -1, "int64"), (B, 1)), (B, F))
    return d.node("scatter", d.node("full", (B, F), 0.0, "float32"), 0, index, d.x)


def _written_into_a_part(d: Deceit) -> Ref:
    return d.node("slice_scatter", d.x, d.node("slice", d.x, 0, 0, 3, 1), 0, 1, None, 1)


def _put_by_index(d: Deceit) -> Ref:
    return d.node("index_put", d.x, (d.node("arange", 3, -1, -1, "int64"),), d.x, True)


def _argmax_of_all(d: Deceit) -> Ref:
    return d.node("expand", d.node("to", d.node("argmax", d.x, None, False), "float32"), (B,))


def _largest_row(d: Deceit) -> Ref:
    return d.node("sub", d.x, d.node("amax", d.x, (0,), True), 1)


DECEITS = {
    "sum": _sum_and_broadcast,
    "mean": _mean_of_all,
    "var|mean": _batch_norm,
    "slice|pad": _shifted_view,
    "rows in dimension 1": _transposed_view,
    "in dimension 1, expected": _transposed,
    "flip": _flipped,
    "slice": _rolled,
    "index": _indexed,
    "select": _picked,
    "softmax": _softmax_over_rows,
    "mm": _gram,
    "mm.*sums over dimension 0": _rows_inside_a_product,
    "mm.*sums over dimension 1": _summed_gradient,
    "bmm": _product_by_the_side,
    "addmm": _bias_of_other_rows,
    "where": _condition_of_other_rows,
    "mm.*sums over": _running_sum,
    "mul": _labels_across,
    "view|rows in dim": _reread_rows,
    "convolution.*several rows": _convolved_across,
    "convolution.*group": _convolved_in_wrong_groups,
    "convolution.*not in the channels": _convolved_along,
    "convolution_backward.*images": _kernel_gradient_over_images,
    "avg_pool2d": _pooled_over_rows,
    "scatter": _scattered_onto_another,
    "slice|slice_scatter": _written_into_a_part,
    "index_put.*no rule": _put_by_index,
    "argmax": _argmax_of_all,
    "amax": _largest_row,
}


@pytest.mark.parametrize("told", DECEITS)
def test_deceit_is_refused_by_name(told: str) -> None:
    deceit = Deceit()
    plan = deceit.leave(DECEITS[told](deceit))
    validate_plan(plan, UNBOUNDED)
    with pytest.raises(NotSeparable, match=told) as refused:
        require_separable(plan)
    if refused.value.node is not None:
        assert f"node {refused.value.node} ({plan.nodes[refused.value.node].op})" in str(refused.value)
    # What is refused deserves it: some other row's change shows. (Shapes [4] stand for a number a row.)
    program = NumpyProgram(plan)
    rng = np.random.default_rng(0)
    inputs = [np.asarray(rng.standard_normal(entry.spec.shape), np.float32) for entry in plan.inputs]
    (before,) = program.run(inputs)
    shows = False
    for row in range(B):
        changed = [inputs[0], inputs[1].copy(), inputs[2].copy()]
        changed[1][row] += 10
        changed[2][row] += 10
        (after,) = program.run(changed)
        shows |= not np.array_equal(np.delete(before, row, 0), np.delete(after, row, 0))
    assert shows


def test_of_one_row_everything_is_separate() -> None:
    """A batch of one has no other row: sums over it, views, and dimensions of size 1 prove nothing and need nothing."""
    d = Deceit(rows=1)
    assert require_separable(d.leave(d.node("sub", d.x, d.node("sum", d.x, (0,), True), 1))) == 1


def test_a_row_of_size_one_is_no_row_dimension() -> None:
    """[4, 1] against [1, 4] is [4, 4]: every row meets every other."""
    d = Deceit()
    column = d.node("view", d.y, (B, 1))
    with pytest.raises(NotSeparable, match="mul"):
        require_separable(d.leave(d.node("mul", column, d.node("view", d.y, (1, B)))))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("op", ["gather", "scatter", "scatter_add", "index", "index_put", "embedding", "max_pool"])
def test_an_index_that_may_be_out_of_range_is_refused(op: str, rows: int) -> None:
    """Whether a run ends with an error would tell whether some row has, say, x > 4. Not even unused is it allowed."""

    def build(clamped: bool) -> Plan:
        d = Deceit(rows)
        ones = d.node("full", (F,), 1.0, "float32")
        index = d.node("to", d.x, "int64")
        if clamped:
            index = d.node("clamp", index, 0, 3)
        if op == "gather":
            d.node("gather", d.x, 1, index)
        elif op == "scatter":
            d.node("scatter", d.x, 1, index, 0.0)
        elif op == "scatter_add":
            d.node("scatter_add", d.x, 1, index, d.x)
        elif op == "index":
            d.node("index", d.w, (index,))
        elif op == "index_put":
            d.node("index_put", d.w, (index,), ones, True)
        elif op == "embedding":
            d.node("embedding", d.w, index)
        else:
            square = d.node("view", d.x, (rows, 2, 2))
            pooled = ((1, 1), (1, 1), (0, 0), (1, 1), False)
            places = d.node("view", index, (rows, 2, 2))
            d.node("max_pool2d_with_indices_backward", square, square, *pooled, places)
        return d.leave(d.x)

    with pytest.raises(NotSeparable, match=r"may be outside \[0, 4\).*clamp it to 0\.\.3") as refused:
        require_separable(build(clamped=False))
    assert refused.value.node == (2 if op != "max_pool" else 4)
    assert require_separable(build(clamped=True)) == rows


def test_a_clamped_float_is_no_index() -> None:
    """NaN stays NaN in a clamp, and as an integer it is out of every range."""
    d = Deceit()
    index = d.node("to", d.node("clamp", d.x, 0, 3), "int64")
    d.node("embedding", d.w, index)
    with pytest.raises(NotSeparable, match="embedding"):
        require_separable(d.leave(d.x))


def test_an_index_of_parameters_is_not_private() -> None:
    d = Deceit()
    d.node("embedding", d.w, d.node("to", d.w, "int64"))
    assert require_separable(d.leave(d.x)) == B


@pytest.mark.parametrize("role", ["param", "state", "loss", "value"])
def test_nothing_but_rows_may_leave(role: str) -> None:
    d = Deceit()
    d.b.output("w", role, d.w)
    with pytest.raises(NotSeparable, match=f"role {role}, expected row, row-gradient, row-left, row-right"):
        require_separable(d.leave(d.x))


def test_inputs_are_parameters_and_one_batch() -> None:
    for wrong, told in (
        ([("s", "state", 4)], "role state, expected param, x or y"),
        ([("x2", "x", 4)], "two inputs of the role x"),
        ([("v", "value", 4)], "role value, expected"),
    ):
        b = Builder("inputs")
        x = b.input("x", "x", "float32", 4)
        b.input("y", "y", "float32", 4)
        for name, role, size in wrong:
            b.input(name, role, "float32", size)
        b.output("loss", "row", x)
        with pytest.raises(NotSeparable, match=told):
            require_separable(b.build())
    for shapes, told in (
        ({"x": (4,)}, "no input of the role y"),
        ({"y": (4,)}, "no input of the role x"),
        ({"x": (4,), "y": (3,)}, "x is float32.4., y is float32.3.; expected as many rows"),
        ({"x": (), "y": ()}, "expected as many rows"),
        ({"x": (0,), "y": (0,)}, "at least one"),
    ):
        b = Builder("inputs")
        refs = [b.input(role, role, "float32", *shape) for role, shape in shapes.items()]
        b.output("loss", "row", refs[0])
        with pytest.raises(NotSeparable, match=told):
            require_separable(b.build())


def test_an_output_has_a_row_for_each() -> None:
    d = Deceit()
    with pytest.raises(NotSeparable, match=r"is float32\[16\], expected \[4, ...\]"):
        require_separable(d.leave(d.node("view", d.x, (B * F,))))


def test_a_training_step_is_refused() -> None:
    with pytest.raises(NotSeparable, match="role param"):
        require_separable(linear_step())
