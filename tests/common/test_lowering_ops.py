"""Law of the lowering, op by op: the Plan over float64 = its circuit on integers, within the circuit's own error bound;
and the same under masks, within one unit in the last place a gate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from helpers_lowering import F, fixed, lowered, run_float64, secret_op
from helpers_plan import CASES, Gen
from sordino_common.errors import PlanError
from sordino_common.plan.arrays import from_numpy
from sordino_common.plan.ops import OPS
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import Input, Node, Output, Plan, Ref
from sordino_common.spdz.lowering import LoweringError
from sordino_common.spdz.lowering.rules import REFUSED, RULES
from sordino_common.spdz.reference import error_bounds, masked, trace

PUBLIC = {"full", "arange"}  # nothing secret goes in
MASKED = ("mul", "mm", "convolution", "convolution_backward", "avg_pool2d", "pow", "sum", "cat", "addmm")


def _limited(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The case's floats as float32 and within the stated range."""

    def mend(arg: Any) -> Any:
        if isinstance(arg, np.ndarray) and arg.dtype.kind == "f":
            return np.asarray(np.clip(arg, -16, 16), np.float32)
        return [mend(item) for item in arg] if isinstance(arg, list) else arg

    return tuple(mend(arg) for arg in args)


def case_of(op: str, data: st.DataObject) -> tuple[Any, ...]:
    gen = Gen(data)
    if op in ("mul", "add", "sub", "div"):
        x, y = gen.pair(("float32",))
        return (x, y) if op in ("mul", "div") else (x, y, gen.pick(1, 2, 0.25, -0.3))
    if op == "pow":
        return gen.array(gen.shape(), scale=1.0), gen.pick(0, 1, 2, 3, 4, 5)
    return CASES[op](gen)


def test_every_op_is_lowered_or_refused_by_name() -> None:
    assert set(RULES) | set(REFUSED) | PUBLIC == set(OPS)
    assert not set(RULES) & set(REFUSED)


@pytest.mark.parametrize("op", sorted(set(RULES) - {"where"}))  # its condition is public, and computed
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_the_circuit_computes_what_the_plan_does(op: str, data: st.DataObject) -> None:
    plan, arrays = secret_op(op, *_limited(case_of(op, data)))
    assume(plan.inputs)
    inputs = {(entry.name, entry.role): fixed(array) for entry, array in zip(plan.inputs, arrays, strict=True)}
    try:
        low = lowered(plan)
    except LoweringError as error:
        event(f"refused: {str(error)[:60]}")
        assume(f"node 0 ({op})" not in str(error))  # no case if it is refused by name, a failure if not
        raise
    values = trace(low.circuit, inputs)
    bounds = error_bounds(low, values)
    expected = run_float64(plan, inputs)
    for output in low.circuit.outputs:
        wire = low.circuit.wire(output.wire)
        want = expected[output.name, output.role]
        got = values[output.wire] * 2.0**-F
        assert wire.fraction_bits == F
        assert got.shape == want.shape == wire.shape
        assert (np.abs(got - want) <= bounds[output.wire] + 1e-9).all()
        if want.size:
            assert np.abs(bounds[output.wire]).max() < 0.05 * (1 + np.abs(want).max())
            assert np.abs(got).max() <= wire.magnitude


@pytest.mark.parametrize("op", MASKED)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_under_masks_it_computes_the_same(op: str, data: st.DataObject) -> None:
    plan, arrays = secret_op(op, *_limited(case_of(op, data)))
    assume(plan.inputs)
    inputs = {(entry.name, entry.role): fixed(array) for entry, array in zip(plan.inputs, arrays, strict=True)}
    try:
        low = lowered(plan)
    except LoweringError:
        assume(False)
    wires = masked(low.circuit, inputs, np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))))
    bounds = error_bounds(low, {number: wire.x for number, wire in wires.items()})
    expected = run_float64(plan, inputs)
    for output in low.circuit.outputs:
        got = wires[output.wire].x * 2.0**-F
        assert (np.abs(got - expected[output.name, output.role]) <= bounds[output.wire] + 1e-9).all()


@pytest.mark.parametrize("op", sorted(REFUSED))
def test_what_has_no_rule_is_refused_by_name(op: str) -> None:
    rng = np.random.default_rng(0)
    x = np.abs(rng.standard_normal((2, 3))).astype(np.float32)
    image = rng.standard_normal((1, 1, 4, 4)).astype(np.float32)
    arguments: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or"), (x, 1.0)),
        **dict.fromkeys(("maximum", "minimum"), (x, 1.0)),
        "clamp": (x, 0.0, 1.0),
        "gelu": (x, "none"),
        "leaky_relu": (x, 0.1),
        "elu": (x, 1.0, 1.0, 1.0),
        "hardtanh": (x, -1.0, 1.0),
        **dict.fromkeys(("amax", "amin"), (x, (), False)),
        **dict.fromkeys(("argmax", "argmin"), (x, None, False)),
        **dict.fromkeys(("softmax", "log_softmax"), (x, 1)),
        "var": (x, (), 1, False),
        "vector_norm": (x, 2, (), False),
        "max_pool2d_with_indices": (image, [2, 2], [2, 2], [0, 0], [1, 1], False),
        "max_pool2d_with_indices_backward": (
            image[..., :2, :2].copy(), image, [2, 2], [2, 2], [0, 0], [1, 1], False, np.zeros((1, 1, 2, 2), np.int64)
        ),
        "scatter": (x, 0, np.zeros((1, 3), np.int64), x),
        "scatter_add": (x, 0, np.zeros((1, 3), np.int64), x),
        "index_put": (x, [np.zeros(1, np.int64)], x[:1].copy(), False),
    }  # fmt: skip
    if op.startswith("bitwise") or op == "logical_not":
        pytest.skip("takes bool, which no secret is")
    plan, _ = secret_op(op, *arguments.get(op, (x,)))
    with pytest.raises(PlanError, match=rf"^node 0 \({op}\): not offered on secret shares yet: "):
        lowered(plan)


def test_where_takes_entries_by_a_public_condition() -> None:
    mask = np.array([[1, 0, 1], [0, 0, 1]])
    x, y = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([-1.0, -2.0, -3.0], np.float32)
    specs = TensorSpec("bool", (2, 3)), TensorSpec("float32", (2, 3))
    plan = Plan(
        name="where",
        inputs=(Input("x", "x", TensorSpec("float32", (2, 3))), Input("y", "x", TensorSpec("float32", (3,)))),
        constants=(from_numpy(mask),),
        nodes=(Node("eq", (Ref(2), 1), specs[:1]), Node("where", (Ref(3), Ref(0), Ref(1)), specs[1:])),
        outputs=(Output("z", "value", 4),),
    )
    low = lowered(plan)
    values = trace(low.circuit, {("x", "x"): fixed(x), ("y", "x"): fixed(y)})
    assert np.array_equal(values[low.circuit.outputs[0].wire] * 2.0**-F, np.where(mask == 1, x, y))
    assert low.circuit.gates == ()


def test_an_output_that_is_public_has_the_scale_of_all_outputs() -> None:
    spec = TensorSpec("float32", (3,))
    plan = Plan(
        name="constant",
        inputs=(Input("x", "x", spec),),
        constants=(from_numpy(np.array([1 / 3, 1e-3, -1e-4], np.float32) / 8),),
        nodes=(Node("mul", (Ref(1), 0.5), (spec,)),),
        outputs=(Output("z", "value", 2),),
    )
    low = lowered(plan)
    wire = low.circuit.outputs[0].wire
    values = trace(low.circuit, {("x", "x"): fixed(np.zeros(3, np.float32))})
    assert low.circuit.wire(wire).fraction_bits == F
    assert np.allclose(values[wire] * 2.0**-F, np.array([1 / 3, 1e-3, -1e-4]) / 16, atol=2.0**-F)


def test_division_by_a_secret_and_odd_powers_are_refused() -> None:
    x = np.ones((2,), np.float32)
    with pytest.raises(LoweringError, match=r"node 0 \(div\): division by a secret value"):
        lowered(secret_op("div", x, x.copy())[0])
    with pytest.raises(LoweringError, match=r"node 0 \(div\): division by zero"):
        lowered(secret_op("div", x, 0.0)[0])
    with pytest.raises(LoweringError, match=r"constant whole exponent"):
        lowered(secret_op("pow", x, 0.5)[0])
    with pytest.raises(LoweringError, match=r"adaptive pooling of \[5, 5\] to \[2, 2\] has windows of different sizes"):
        lowered(secret_op("adaptive_avg_pool2d", np.ones((1, 1, 5, 5), np.float32), [2, 2])[0])
