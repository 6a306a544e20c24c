"""What a device takes for gradients of rows, and for a step on their sum; all else is refused by name."""

from __future__ import annotations

import pytest

from helpers_plan import Builder
from sordino_common.errors import PlanError
from sordino_common.plan.gradients import OuterRows, RowGradients, WholeRows, require_apply, row_gradients
from sordino_common.plan.values import Plan, Ref

B = 5


def gradients(*outputs: tuple[str, str, str], loss: str = "loss") -> Plan:
    """Parameters w [3, 2], v [3], frozen [4]; values to hand out by name."""
    b = Builder("gradients")
    b.input("w", "param", "float32", 3, 2)
    b.input("v", "param", "float32", 3)
    b.input("frozen", "param", "float32", 4)
    values: dict[str, Ref] = {
        "x": b.input("x", "x", "float32", B, 3),
        "y": b.input("y", "y", "float32", B),
        "pair": b.node("full", (B, 2), 0.5, "float32"),
        "square": b.node("full", (B, 3, 2), 0.5, "float32"),
        "double": b.node("full", (B, 3), 0.5, "float64"),
        "four": b.node("full", (B, 4), 0.5, "float32"),
    }
    values["loss"] = b.node("sum", values["x"], (1,), False)
    for name, role, value in outputs:
        b.output(name, role, values[value])
    if loss:
        b.output("loss", "row", values[loss])
    return b.build()


def test_the_layout_says_which_output_is_what() -> None:
    plan = gradients(("w", "row-left", "x"), ("w", "row-right", "pair"), ("v", "row-gradient", "x"))
    assert row_gradients(plan) == RowGradients(
        rows=B,
        blocks=(
            OuterRows(name="w", shape=(3, 2), left=0, right=1),
            WholeRows(name="v", shape=(3,), output=2, rides=0),  # the very value of the left factor
        ),
        loss=3,
    )
    whole = row_gradients(gradients(("w", "row-gradient", "square"), ("frozen", "row-gradient", "four")))
    assert [(block.name, block.shape) for block in whole.blocks] == [("w", (3, 2)), ("frozen", (4,))]


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (gradients(), "no gradients: expected outputs of the role row-gradient"),
        (gradients(("u", "row-gradient", "x")), "'u' .row-gradient. is of no parameter"),
        (gradients(("v", "row-gradient", "pair")), r"is float32\[5, 2\], expected float32\[5, 3\]"),
        (gradients(("v", "row-gradient", "double")), r"is float64\[5, 3\], expected float32\[5, 3\]"),
        (gradients(("v", "row-gradient", "x"), ("w", "row-gradient", "square")), "'w' .row-gradient. is out of order"),
        (gradients(("w", "row-gradient", "square"), ("w", "row-left", "x")), "'w' .row-left. is out of order"),
        (gradients(("w", "row-left", "x")), "expected row-left and then row-right of one parameter"),
        (gradients(("w", "row-right", "pair"), ("w", "row-left", "x")), "expected row-left and then row-right"),
        (gradients(("w", "row-left", "x"), ("v", "row-right", "x")), "expected row-left and then row-right of one"),
        (gradients(("w", "row-left", "x"), ("w", "row-right", "x")), r"float32\[5, 3\], expected float32\[5, 2\]"),
        (
            gradients(("v", "row-left", "x"), ("v", "row-right", "x")),
            r"the parameter is float32\[3\], expected a matrix",
        ),
        (gradients(("v", "row-gradient", "x"), loss=""), "expected one output of the role row, float32.5."),
        (gradients(("v", "row-gradient", "x"), ("other", "row", "loss")), "got 2 such roles"),
        (gradients(("v", "row-gradient", "x"), loss="pair"), "expected one output of the role row, float32.5."),
    ],
)
def test_other_outputs_are_refused(plan: Plan, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        row_gradients(plan)


def step(*, gradient: tuple[str, ...] = ("v",), data: bool = False, keep: bool = True, size: int = 3) -> Plan:
    b = Builder("apply")
    w, v = b.input("w", "param", "float32", 3, 2), b.input("v", "param", "float32", 3)
    momentum = b.input("m", "state", "float32", 3)
    taken = [b.input(name, "gradient", "float32", size) for name in gradient]
    if data:
        b.input("x", "x", "float32", B, 3)
    moved = b.node("sub", v, taken[0], 0.5) if taken and size == 3 else v
    b.output("w", "param", w)
    b.output("v", "param", moved)
    if keep:
        b.output("m", "state", momentum)
    return b.build()


def test_a_step_takes_just_these_gradients() -> None:
    layout = row_gradients(gradients(("v", "row-gradient", "x")))
    require_apply(step(), layout)
    for plan, told in (
        (step(gradient=()), "takes the gradients none, expected v float32.3."),
        (step(gradient=("v", "w")), "takes the gradients v float32.3., w float32.3., expected v float32.3."),
        (step(size=2), "takes the gradients v float32.2., expected v float32.3."),
        (step(data=True), "input 'x' has the role x, expected param, state or gradient"),
        (step(keep=False), "does not give back just the parameters and states"),
    ):
        with pytest.raises(PlanError, match=told):
            require_apply(plan, layout)
