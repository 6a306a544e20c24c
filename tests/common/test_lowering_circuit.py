"""What the lowering makes of whole Plans: shared openings, coefficients carried on, rounds, bounds, room, digests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from helpers_lowering import PLAN_ID, F, fixed, lowered, run_float64, secret_op
from helpers_plan import Builder, linear_step
from sordino_common.errors import ConfigError
from sordino_common.plan.values import Plan
from sordino_common.spdz.circuit import BOUND_BITS_MAX, Gate, Linear
from sordino_common.spdz.lowering import (
    Lowered,
    LoweringError,
    Ranges,
    Settings,
    circuit_digest,
    encode_circuit,
    lower,
)
from sordino_common.spdz.reference import Masked, error_bounds, evaluate, masked, trace


def gates(low: Lowered) -> list[Gate]:
    nodes = [low.circuit.node(number) for number in low.circuit.gates]
    return [node for node in nodes if isinstance(node, Gate)]


def built(*outputs: str, rows: int = 3, features: int = 4) -> tuple[Builder, dict[str, object]]:
    b = Builder("toy")
    values: dict[str, object] = {
        "x": b.input("x", "x", "float32", rows, features),
        "y": b.input("y", "y", "float32", rows, features),
    }
    return b, values


def test_a_product_that_several_values_need_is_opened_once() -> None:
    b, v = built()
    square = b.node("mul", v["x"], v["x"])
    b.output("cube", "value", b.node("pow", v["x"], 3))
    b.output("double", "value", b.node("mul", square, 2.0))
    b.output("thrice", "value", b.node("mul", b.node("mul", v["x"], v["x"]), 3.0))
    low = lowered(b.build())
    assert [len(gate.products) for gate in gates(low)] == [1, 1]  # x·x once, x·x² once
    assert low.circuit.opened_elements == (12, 12)


def test_a_sum_of_squares_opens_one_element_and_a_polynomial_one_tensor() -> None:
    b, v = built()
    error = b.node("sub", v["x"], v["y"], 1)
    b.output("loss", "loss", b.node("mean", b.node("mul", error, error), (), False))
    low = lowered(b.build(), x=2, y=2)
    assert low.circuit.opened_elements == (1,)
    assert gates(low)[0].products[0].reduce == (0, 1)

    b, v = built()
    square = b.node("mul", v["x"], v["x"])
    p = b.node("add", b.node("add", b.node("mul", square, 0.25), b.node("mul", v["x"], -0.5), 1), 1.0, 1)
    b.output("p", "value", p)
    low = lowered(b.build())
    (gate,) = gates(low)
    assert (len(gate.products), len(gate.terms), bool(gate.addend)) == (1, 1, True)


def test_coefficients_are_carried_to_the_truncation_that_is_due() -> None:
    """mean, a scaling and a learning rate cost no gate of their own."""
    low = lower(linear_step(rows=8), plan_id=PLAN_ID, settings=Settings(ranges=Ranges(x=4, y=4, params=2, values=16)))
    circuit = low.circuit
    # prediction; new weight, new bias, loss
    assert circuit.opened_elements == (8, 3 + 1 + 1)
    assert len(circuit.rounds) == 2
    assert max(note.error for note in low.notes) == 0.0  # 2/8 and 1/8 are powers of two
    assert {note.output for note in low.notes} == {"", "param weight", "param bias", "loss"}


def test_permuted_and_viewed_products_open_once_and_stay_products() -> None:
    b = Builder("toy")
    w = b.input("w", "param", "float32", 5, 2, 2)
    x, y = b.input("x", "x", "float32", 3, 4), b.input("y", "y", "float32", 3, 5)
    gradient = b.node("mm", b.node("permute", x, (1, 0)), y)  # [4, 5]
    step = b.node("view", b.node("permute", gradient, (1, 0)), (5, 2, 2))
    b.output("w", "param", b.node("sub", w, step, 0.5))
    low = lowered(b.build())
    assert low.circuit.opened_elements == (20,)
    rng = np.random.default_rng(0)
    inputs = {
        ("w", "param"): fixed(rng.uniform(-1, 1, (5, 2, 2))),
        ("x", "x"): fixed(rng.uniform(-1, 1, (3, 4))),
        ("y", "y"): fixed(rng.uniform(-1, 1, (3, 5))),
    }
    found = evaluate(low.circuit, inputs)["w", "param"] * 2.0**-F
    np.testing.assert_allclose(found, run_float64(b.build(), inputs)["w", "param"], atol=3 * 2.0**-F)


def test_row_sums_and_sums_of_matrix_products_are_local() -> None:
    b = Builder("toy")
    x, y = b.input("x", "x", "float32", 6, 4), b.input("y", "y", "float32", 4, 5)
    b.output("columns", "value", b.node("sum", b.node("mm", x, y), (0,), False))
    b.output("rows", "value", b.node("sum", x, (1,), False))
    low = lowered(b.build())
    assert low.circuit.opened_elements == (5,)  # the rows of x are summed before the product


def test_public_operands_are_computed_now_or_become_unmasked_wires() -> None:
    b = Builder("toy")
    x = b.input("x", "x", "float32", 2, 3)
    scale = b.constant(np.array([[1.0, 2.0, 0.5], [0.25, -1.0, 3.0]], np.float32))
    shift = b.node("mul", b.node("full", (2, 3), 2.0, "float32"), scale)
    b.output("out", "value", b.node("add", b.node("mul", x, scale), shift, 1))
    low = lowered(b.build())
    assert low.circuit.opened_elements == (6,)
    publics = [node for node in low.circuit.nodes if isinstance(node, Linear) and not node.terms]
    assert len(publics) == 1
    values = fixed(np.arange(6.0).reshape(2, 3) / 4)
    found = evaluate(low.circuit, {("x", "x"): values})["out", "value"] * 2.0**-F
    expected = run_float64(b.build(), {("x", "x"): values})["out", "value"]
    np.testing.assert_allclose(found, expected, atol=2 * 2.0**-F)


def test_an_output_may_be_an_input_a_constant_or_a_scaled_wire() -> None:
    b = Builder("toy")
    w = b.input("w", "param", "float32", 2)
    b.output("w", "param", w)
    b.output("twice", "value", b.node("mul", w, 2.0))
    b.output("tenth", "value", b.node("mul", w, 0.1))
    b.output("five", "value", b.node("full", (2,), 5.0, "float32"))
    low = lowered(b.build())
    assert low.circuit.opened_elements == (2,)  # a tenth: a product by a constant that has to be truncated
    found = evaluate(low.circuit, {("w", "param"): fixed([1.0, -3.0])})
    assert low.circuit.outputs[0].wire == 0
    np.testing.assert_array_equal(found["twice", "value"], fixed([2.0, -6.0]))
    np.testing.assert_array_equal(found["five", "value"], fixed([5.0, 5.0]))
    np.testing.assert_allclose(found["tenth", "value"], fixed([0.1, -0.3]), atol=2)


def training(steps: int = 1 << 16) -> tuple[Plan, Lowered]:
    plan = linear_step(rows=4)
    ranges = Ranges(x=2, y=2, params=2, values=16, updates=1)
    return plan, lower(plan, plan_id=PLAN_ID, settings=Settings(ranges=ranges, steps=steps))


def test_parameters_are_carried_from_step_to_step_under_masks() -> None:
    """After 300 steps the masks are where the room says, and the parameters where float64 has them."""
    plan, low = training()
    rng = np.random.default_rng(1)
    params = {("weight", "param"): fixed(rng.uniform(-1, 1, (1, 3))), ("bias", "param"): fixed([0.5])}
    exact = {key: value * 2.0**-F for key, value in params.items()}
    state: dict[tuple[str, str], Masked] | None = None
    slope = rng.uniform(-1, 1, (3, 1))
    for _ in range(300):
        x = fixed(rng.uniform(-1, 1, (4, 3)))
        y = fixed(x * 2.0**-F @ slope)
        inputs = {**params, ("x", "x"): x, ("y", "y"): y}
        wires = masked(low.circuit, inputs, rng, state)
        state = {(o.name, o.role): wires[o.wire] for o in low.circuit.outputs if o.role == "param"}
        rows = {key: value for key, value in inputs.items() if key[1] != "param"}
        wide = {**{key: value * 2.0**F for key, value in exact.items()}, **rows}
        exact = {key: v for key, v in run_float64(plan, wide).items() if key[1] == "param"}
    assert state is not None
    for key, value in state.items():
        assert np.abs(value.x * 2.0**-F - exact[key]).max() < 8 * 2.0**-F
    assert np.abs(exact["weight", "param"] - slope.T).max() < 0.2
    room = low.circuit.inputs[0].wire.room
    largest = max(int(np.abs(value.mask).max()) for value in state.values())
    assert room / 2**12 < largest * (1 << 16) / 300 < room * 2**6


def test_mask_room_bounds_the_number_of_steps() -> None:
    _, low = training()
    assert low.max_steps > 1 << 16
    _, longer = training(steps=low.max_steps)
    assert longer.max_steps == low.max_steps
    assert longer.circuit.gate_elements == low.circuit.gate_elements
    _, beyond = training(steps=low.max_steps * 8)  # fresh masks for the parameters, every step
    assert beyond.max_steps >= low.max_steps * 8
    assert beyond.circuit.gate_elements > low.circuit.gate_elements


def test_a_sum_whose_masks_would_not_fit_gets_fresh_ones() -> None:
    b = Builder("toy")
    x = b.input("x", "x", "float32", 2, 2)
    total = b.node("view", b.node("mul", x, x), (4,))
    for _ in range(2):
        wide = b.node("expand", b.node("view", total, (1, 4)), (1 << 11, 4))
        total = b.node("sum", wide, (0,), False)
    b.output("sum", "value", b.node("mul", total, 2.0**-22))
    low = lower(b.build(), plan_id=PLAN_ID, settings=Settings(ranges=Ranges(x=1)))
    assert [note.text for note in low.notes] == ["mul", "fresh mask", "term"]
    wires = masked(low.circuit, {("x", "x"): fixed([[0.5, 1], [-1, 0.25]])}, np.random.default_rng(0))
    np.testing.assert_allclose(wires[low.circuit.outputs[0].wire].x * 2.0**-F, [0.25, 1, 1, 0.0625], atol=2.0**-12)


def test_small_coefficients_take_bits_from_operands_before_they_raise_the_bound() -> None:
    """A product of tiny coefficient: its operand's own gate gives fewer fraction bits, the bound stays at 2^40."""

    def product_of(coefficient: float, updates: float) -> Lowered:
        b = Builder("toy")
        w = b.input("w", "param", "float32", 4, 4)
        x, y = b.input("x", "x", "float32", 4, 4), b.input("y", "y", "float32", 4, 4)
        b.output("w", "param", b.node("sub", w, b.node("mm", b.node("mm", x, y), y), coefficient))
        ranges = Ranges(x=2, y=2, params=4, updates=updates)
        return lower(b.build(), plan_id=PLAN_ID, settings=Settings(ranges=ranges))

    usual = product_of(0.5, 4.0)
    assert usual.circuit.wire(usual.notes[0].wire).fraction_bits == 14
    small = product_of(0.0003, 0.5)
    first, last = small.notes
    assert small.circuit.wire(first.wire).fraction_bits < 14
    assert small.circuit.wire(last.wire).fraction_bits == 14
    assert last.error < 2.0**-6
    assert last.bound_bits <= 42


def test_a_coefficient_that_one_gate_can_not_have_gets_a_gate_of_its_own() -> None:
    """The mean of 20 squares of up to 24²: 1/20 beside a scale of 2^28 leaves no bits, beside 2^14 it does."""
    b = Builder("toy")
    x, y = b.input("x", "x", "float32", 20), b.input("y", "y", "float32", 20)
    error = b.node("sub", x, y, 1)
    b.output("loss", "loss", b.node("mean", b.node("mul", error, error), (), False))
    low = lowered(b.build(), y=8)
    assert [(note.text, note.elements) for note in low.notes] == [("mul+sum", 1), ("term", 1)]
    assert low.notes[0].error == 0.0
    assert low.notes[1].error < 2.0**-9
    rng = np.random.default_rng(0)
    inputs = {("x", "x"): fixed(rng.uniform(-16, 16, 20)), ("y", "y"): fixed(rng.uniform(-8, 8, 20))}
    found = evaluate(low.circuit, inputs)["loss", "loss"] * 2.0**-F
    assert found == pytest.approx(run_float64(b.build(), inputs)["loss", "loss"], rel=1e-3)


def test_what_may_leave_the_fit_is_refused_with_its_node() -> None:
    plan, _ = secret_op("pow", np.ones((2, 2), np.float32), 3)
    settings = Settings(ranges=Ranges(x=10), interval=6.0)
    with pytest.raises(
        LoweringError, match=r"node 0 \(pow\): what goes into a polynomial activation may reach 10"
    ) as e:
        lower(plan, plan_id=PLAN_ID, settings=settings)
    assert e.value.node == 0
    stated = replace(settings, ranges=Ranges(x=10, preactivations=6))
    assert lower(plan, plan_id=PLAN_ID, settings=stated).circuit.gates


def test_the_fit_is_asked_of_what_is_raised_not_of_the_product_that_it_is_a_multiple_of() -> None:
    def cubed(factor: float) -> Plan:
        """(factor (x y))^3: the product is opened, the factor comes with the powers."""
        b, v = built()
        product = b.node("mul", v["x"], v["y"])
        b.output("product", "value", product)
        b.output("cube", "value", b.node("pow", b.node("mul", product, factor), 3))
        return b.build()

    settings = Settings(ranges=Ranges(x=3, y=4), interval=6.0)
    assert lower(cubed(0.5), plan_id=PLAN_ID, settings=settings).circuit.gates  # 12 / 2
    for factor, reach in ((0.75, 9), (-2.0, 24)):
        with pytest.raises(LoweringError, match=rf"what goes into a polynomial activation may reach {reach} by"):
            lower(cubed(factor), plan_id=PLAN_ID, settings=settings)
    small = replace(settings, ranges=Ranges(x=1, y=2))
    with pytest.raises(LoweringError, match=r"may reach 8 by"):  # the product itself stays within 2
        lower(cubed(4.0), plan_id=PLAN_ID, settings=small)


def test_bounds_are_refused_beyond_44_bits_and_hold_for_what_is_accepted() -> None:
    b, v = built()
    b.output("p", "value", b.node("mul", b.node("mul", v["x"], v["y"]), b.node("mul", v["x"], v["x"])))
    with pytest.raises(
        LoweringError, match=r"^node 2 \(mul, for value p\): a value of up to .* at most 44 are allowed"
    ):
        lower(b.build(), plan_id=PLAN_ID, settings=Settings(ranges=Ranges(x=60.0, y=60.0)))
    for reach in (2.0, 16.0):
        low = lower(b.build(), plan_id=PLAN_ID, settings=Settings(ranges=Ranges(x=reach, y=reach)))
        assert max(note.bound_bits for note in low.notes) <= BOUND_BITS_MAX
        corner = np.full((3, 4), reach)
        inputs = {("x", "x"): fixed(corner), ("y", "y"): fixed(-corner)}
        values = trace(low.circuit, inputs)  # raises if a gate's value leaves its bound
        got = values[low.circuit.outputs[0].wire] * 2.0**-F
        bound = error_bounds(low, values)[low.circuit.outputs[0].wire]
        assert (np.abs(got + reach**4) <= bound).all()


def test_out_of_range_values_are_found_by_the_oracle() -> None:
    b, v = built()
    b.output("p", "value", b.node("mul", v["x"], v["y"]))
    low = lower(b.build(), plan_id=PLAN_ID, settings=Settings(ranges=Ranges(x=1, y=1)))
    far = {("x", "x"): fixed(np.full((3, 4), 500.0)), ("y", "y"): fixed(np.full((3, 4), 500.0))}
    with pytest.raises(Exception, match="something has left its stated range"):
        trace(low.circuit, far)


def test_integer_inputs_are_refused() -> None:
    b = Builder("toy")
    y = b.input("y", "y", "int64", 3)
    b.output("y", "value", y)
    with pytest.raises(LoweringError, match=r"input 'y' is int64\[3\]: on secret shares inputs are floats; give class"):
        lowered(b.build())


def test_lowering_twice_gives_the_same_bytes_and_any_change_another_digest() -> None:
    plan, low = training()
    _, again = training()
    assert low.digest == again.digest == circuit_digest(low.circuit)
    assert encode_circuit(low.circuit) == encode_circuit(again.circuit)
    others = [
        lower(plan, plan_id=PLAN_ID, settings=Settings(ranges=Ranges(x=2.5, y=2, params=2, values=16, updates=1))),
        lower(plan, plan_id=b"\x08" * 32, settings=Settings(ranges=Ranges(x=2, y=2, params=2, values=16, updates=1))),
    ]
    assert len({low.digest, *(other.digest for other in others)}) == 3
    node = low.circuit.nodes[-1]
    changed = replace(low.circuit, nodes=(*low.circuit.nodes[:-1], replace(node, wire=replace(node.wire, room=1))))
    assert circuit_digest(changed) != low.digest


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"fraction_bits is 3, expected 4\.\.24"):
        Settings(fraction_bits=3)
    with pytest.raises(ConfigError, match="finite numbers above 0"):
        Settings(ranges=Ranges(x=0.0))
    with pytest.raises(ConfigError, match="numbers above 0"):
        Settings(ranges=Ranges(updates=-1.0))
    with pytest.raises(ConfigError, match="steps is 0"):
        Settings(steps=0)
    b = Builder("toy")
    x = b.input("x", "x", "float32", 1)
    b.output("x", "value", b.node("mul", x, x))
    with pytest.raises(LoweringError, match=r"input 'x': a range of 1e\+06 leaves no room for a mask at 24 fraction"):
        lower(b.build(), plan_id=PLAN_ID, settings=Settings(fraction_bits=24, ranges=Ranges(x=1e6)))


def test_the_retry_chance_is_what_the_bounds_imply() -> None:
    _, low = training()
    chance = sum(n.elements * 2.0 ** (n.bound_bits - 63) for n in low.notes)
    chance += sum(e.wire.numel * 2.0 ** (e.bound_bits - 63) for e in low.circuit.inputs)
    assert low.retry_chance == pytest.approx(chance)
    assert 0 < low.retry_chance < 1e-3
