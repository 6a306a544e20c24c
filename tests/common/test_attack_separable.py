"""Programs made to deceive `require_separable` are refused by name, and what may not leave does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from helpers_plan import Builder, linear_step
from sordino_common.plan.interpreter import UNBOUNDED, NumpyProgram
from sordino_common.plan.separable import NotSeparable, require_separable
from sordino_common.plan.validation import validate_plan
from sordino_common.plan.values import Plan, Ref

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
