"""What was lowered, computed by a committee with its MAC check: every op against float64, within the error bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from helpers_lowering import PLAN_ID, F, fixed, run_float64, secret_op
from helpers_plan import CASES, Builder, Gen
from helpers_spdz import Committee
from sordino_common.plan.values import Input, Plan
from sordino_common.spdz.lowering import Lowered, LoweringError, Ranges, Settings, lower
from sordino_common.spdz.lowering.rules import RULES
from sordino_common.spdz.reference import error_bounds, trace
from sordino_common.spdz.spec import Schedule, SessionSpec

LARGEST = 4.0


def spec_of(low: Lowered, *, parties: int, rows: int = 0) -> SessionSpec:
    return SessionSpec(
        session=b"lowered-circuits",
        circuit=low.circuit,
        circuit_digest=low.digest,
        parties=tuple(f"party-{k}" for k in range(parties)),
        security="active",
        steps=1,
        check_every=1,
        retries=3,
        schedule=Schedule(rows=(("ada", rows),), batch_rows=rows, seed=0) if rows else None,
    )


def as_state(plan: Plan) -> Plan:
    """Its inputs as parameters, whose first dimension is no number of rows."""
    inputs = tuple(Input(entry.name, "param", entry.spec) for entry in plan.inputs)
    return Plan(plan.name, inputs, plan.constants, plan.nodes, plan.outputs)


def opened(low: Lowered, inputs: dict[tuple[str, str], Any], *, parties: int, seed: int) -> dict[str, Any]:
    """What the committee opens: x = m - λ of every output."""
    state = {name: value for (name, _), value in inputs.items()}
    committee = Committee(spec_of(low, parties=parties), {}, state, seed=seed)
    committee.run()
    return committee.outputs(0)


# "where" takes a condition, and no constant is bool: `test_where_takes_entries_by_a_public_condition` has one.
@pytest.mark.parametrize("op", sorted(set(RULES) - {"where"}))
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_a_committee_computes_every_op(op: str, data: st.DataObject) -> None:
    gen = Gen(data)
    if op in ("add", "sub", "mul", "div"):
        x, y = gen.pair(("float32",))
        case: tuple[Any, ...] = (x, y, 1) if op in ("add", "sub") else (x, y)
    else:
        case = (gen.array(gen.shape()), gen.pick(1, 2, 3)) if op == "pow" else CASES[op](gen)

    def limited(arg: Any) -> Any:
        if isinstance(arg, np.ndarray) and arg.dtype.kind == "f":
            return np.asarray(np.clip(arg, -LARGEST, LARGEST), np.float32)
        return [limited(item) for item in arg] if isinstance(arg, list) else arg

    plan, arrays = secret_op(op, *map(limited, case))
    assume(plan.inputs)
    plan = as_state(plan)
    try:
        low = lower(plan, plan_id=PLAN_ID, settings=Settings(ranges=Ranges(params=LARGEST)))
    except LoweringError:
        assume(False)
    circuit = low.circuit
    wires = [circuit.wire(number) for number in range(len(circuit.inputs) + len(circuit.nodes))]
    assume(all(wire.shape and wire.numel for wire in wires))  # see below
    inputs = {(entry.name, "param"): fixed(array) for entry, array in zip(plan.inputs, arrays, strict=True)}
    found = opened(low, inputs, parties=gen.pick(2, 3), seed=gen.int(0, 1000))
    bounds, expected = error_bounds(low, trace(low.circuit, inputs)), run_float64(plan, inputs)
    for output in low.circuit.outputs:
        error = np.abs(found[output.name] * 2.0**-F - expected[output.name, output.role])
        # The bound is of a run that rounds down everywhere; one that rounds up may have values an ulp larger.
        assert (error <= 1.01 * bounds[output.wire] + 2.0**-F * (bounds[output.wire] > 0) + 1e-9).all()


def test_public_wires_and_fresh_masks_in_a_committee() -> None:
    b = Builder("toy")
    x = b.input("x", "param", "float32", 2, 2)
    scale = b.constant(np.array([[1.5, -2.0], [0.25, 3.0]], np.float32))
    b.output("scaled", "value", b.node("mul", x, scale))
    b.output("product", "value", b.node("mm", scale, x))
    total = b.node("view", b.node("mul", x, x), (4,))
    for _ in range(2):
        wide = b.node("expand", b.node("view", total, (1, 4)), (1 << 11, 4))
        total = b.node("sum", wide, (0,), False)
    b.output("total", "value", b.node("mul", total, 2.0**-22))
    low = lower(b.build(), plan_id=PLAN_ID, settings=Settings(ranges=Ranges(params=1)))
    assert "fresh mask" in {note.text for note in low.notes}
    inputs = {("x", "param"): fixed([[0.5, -1.0], [0.75, 0.125]])}
    found, expected = opened(low, inputs, parties=4, seed=1), run_float64(b.build(), inputs)
    for (name, _), want in expected.items():
        np.testing.assert_allclose(found[name] * 2.0**-F, want, atol=2.0**-10)


def test_inputs_without_dimensions() -> None:
    b = Builder("toy")
    x = b.input("x", "param", "float32")
    b.output("square", "value", b.node("mul", x, x))
    low = lower(b.build(), plan_id=PLAN_ID, settings=Settings(ranges=Ranges(params=1)))
    found = opened(low, {("x", "param"): fixed(0.5)}, parties=2, seed=0)
    assert found["square"] * 2.0**-F == pytest.approx(0.25, abs=2 * 2.0**-F)


def test_products_without_elements() -> None:
    b = Builder("toy")
    x, y = b.input("x", "param", "float32", 2, 3), b.input("y", "param", "float32", 3, 0)
    b.output("product", "value", b.node("mm", x, y))
    low = lower(b.build(), plan_id=PLAN_ID, settings=Settings(ranges=Ranges(params=1)))
    inputs = {("x", "param"): fixed(np.ones((2, 3))), ("y", "param"): fixed(np.ones((3, 0)))}
    assert opened(low, inputs, parties=2, seed=0)["product"].shape == (2, 0)


def test_terms_without_dimensions() -> None:
    """A loss of one element, to which a sum of wires is added."""
    b = Builder("toy")
    x = b.input("x", "param", "float32", 4)
    squares = b.node("sum", b.node("mul", x, x), (), False)
    b.output("loss", "loss", b.node("add", squares, b.node("sum", x, (), False), 0.5))
    low = lower(b.build(), plan_id=PLAN_ID, settings=Settings(ranges=Ranges(params=1)))
    found = opened(low, {("x", "param"): fixed([0.5, 1.0, -1.0, 0.25])}, parties=2, seed=0)
    assert found["loss"] * 2.0**-F == pytest.approx(2.3125 + 0.375, abs=2 * 2.0**-F)
