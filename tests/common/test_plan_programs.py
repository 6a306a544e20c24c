"""Programs: both executors agree on whole Plans, memory stays below what was computed before, errors are named."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers_plan import CASES, Builder, Gen, fill, image_step, linear_step, one_op
from sordino_common.errors import ConfigError, LocalError, PlanError
from sordino_common.messages.array import Array
from sordino_common.plan.analysis import BUFFER_BYTES, analyse
from sordino_common.plan.arrays import from_numpy, to_numpy
from sordino_common.plan.executors import load_program
from sordino_common.plan.interpreter import NumpyProgram
from sordino_common.plan.ops import OPS
from sordino_common.plan.values import Plan

EXECUTORS = ("numpy", "torch")


@pytest.mark.parametrize("make", [linear_step, image_step])
def test_executors_agree(make: Any) -> None:
    plan = make(rows=5)
    inputs = fill(plan, seed=3)
    for ours, theirs in zip(*(load_program(plan, name).run(inputs) for name in EXECUTORS), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_linear_step_equals_autograd() -> None:
    plan = linear_step(rows=6, features=2)
    w, b, x, y = (torch.tensor(array) for array in fill(plan, seed=5))
    w.requires_grad_()
    b.requires_grad_()
    loss = torch.nn.functional.mse_loss(torch.nn.functional.linear(x, w, b), y)
    loss.backward()
    expected = [w - 0.125 * w.grad, b - 0.125 * b.grad, loss]
    for output, value in zip(NumpyProgram(plan).run(fill(plan, seed=5)), expected, strict=True):
        np.testing.assert_allclose(output, value.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_image_step_equals_autograd() -> None:
    plan = image_step(rows=4)
    inputs = fill(plan, seed=6)
    w, x, y = (torch.tensor(array) for array in inputs)
    w.requires_grad_()
    functional = torch.nn.functional
    hidden = functional.conv2d(x, w, torch.tensor([0.5, -0.5, 0.25]), padding=1).relu()
    logits = functional.avg_pool2d(functional.max_pool2d(hidden, 2), 2).sum((2, 3))
    loss = functional.cross_entropy(logits, y, reduction="none")
    loss.sum().backward()
    rows, weight = NumpyProgram(plan).run(inputs)
    np.testing.assert_allclose(rows, loss.detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weight, (w - 0.5 * w.grad).detach().numpy(), rtol=1e-4, atol=1e-4)


# --- memory ------------------------------------------------------------------------------------------------------


def _measured(program: NumpyProgram, inputs: list[Any]) -> int:
    """Most bytes that a run holds at a time, its inputs included. NumPy reports its buffers to tracemalloc."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        results = program.run(inputs)
        return tracemalloc.get_traced_memory()[1] - before + sum(array.nbytes for array in inputs)
    finally:
        del results
        tracemalloc.stop()


@pytest.mark.parametrize("make", [linear_step, image_step])
def test_peak_is_a_bound_and_not_far_off(make: Any) -> None:
    plan = make(rows=3000) if make is image_step else make(rows=40_000, features=30)
    program = NumpyProgram(plan)
    measured = _measured(program, fill(plan))
    assert measured <= program.cost.peak_bytes <= 2.5 * measured


@pytest.mark.parametrize("op", sorted(OPS))
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_peak_of_every_op_is_a_bound(op: str, data: st.DataObject) -> None:
    """The drawn operands made larger, so that arrays outweigh the fixed allowance for buffers and objects."""
    args = _Larger(CASES[op](Gen(data))).args
    try:
        plan, arrays = one_op(op, *args)
    except PlanError:
        plan, arrays = one_op(op, *CASES[op](Gen(data)))
    program = NumpyProgram(plan)
    assert _measured(program, arrays) <= program.cost.peak_bytes


class _Larger:
    """Operands with 400 times as many rows: for most ops they fit each other still."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = tuple(self._grow(arg) for arg in args)

    def _grow(self, arg: Any) -> Any:
        if isinstance(arg, np.ndarray) and arg.ndim and arg.shape[0] > 1:
            return np.repeat(arg, 400, axis=0)
        return [self._grow(item) for item in arg] if isinstance(arg, list | tuple) else arg


def test_dead_values_are_freed() -> None:
    """A chain of a hundred steps holds two values at a time, not a hundred."""
    b = Builder("chain")
    value = b.input("x", "x", "float32", 1 << 18)
    for _ in range(100):
        value = b.node("add", value, 1.0, 1)
    b.output("y", "value", value)
    plan = b.build()
    program = NumpyProgram(plan)
    assert program.cost.peak_bytes < 3 * (1 << 20) + BUFFER_BYTES + 256 * 102
    assert _measured(program, fill(plan)) <= program.cost.peak_bytes


def test_a_view_keeps_its_base_alive_and_unused_results_die_at_once() -> None:
    b = Builder("views")
    x = b.input("x", "x", "float32", 8, 8)
    doubled = b.node("mul", x, 2.0)
    row = b.node("select", b.node("permute", doubled, (1, 0)), 0, 0)
    b.node("exp", x)  # nobody wants it
    total = b.node("sum", row, (), False)
    b.output("sum", "value", total)
    cost = analyse(b.build())
    assert cost.last_use[doubled.value] == 4
    assert cost.dead_after[3] == (4,)
    assert cost.dead_after[2] == (2,)  # the view in between is an object only: its base holds the storage
    assert set(cost.dead_after[4]) == {1, 3}


# --- what goes in and out ----------------------------------------------------------------------------------------


def _passing() -> Plan:
    """Outputs that share storage with an input, with a constant and with one another."""
    b = Builder("passing")
    x = b.input("x", "param", "float32", 2, 3)
    c = b.constant(np.ones((2, 3), np.float32))
    total = b.node("add", x, c, 1)
    b.output("x", "param", x)
    b.output("c", "value", c)
    b.output("t", "value", b.node("permute", x, (1, 0)))
    b.output("sum", "value", total)
    b.output("again", "value", total)
    b.output("row", "value", b.node("select", total, 0, 1))
    b.output("wide", "value", b.node("expand", b.node("full", (), 2.0, "float32"), (2, 2)))
    return b.build()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_outputs_are_arrays_of_their_own(executor: str) -> None:
    program = load_program(_passing(), executor)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    x.setflags(write=False)  # as arrays from messages are
    first = program.run([x])
    kept = [output.copy() for output in first]
    for output in first:
        assert output.flags.writeable
        output[...] = -1
    for output, expected in zip(program.run([x]), kept, strict=True):
        np.testing.assert_array_equal(output, expected)
    np.testing.assert_array_equal(x, np.arange(6).reshape(2, 3))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_wrong_inputs_are_named(executor: str) -> None:
    plan = linear_step()
    program = load_program(plan, executor)
    good = fill(plan)
    with pytest.raises(PlanError, match="takes 4 inputs, got 3"):
        program.run(good[:3])
    with pytest.raises(PlanError, match=r"'x': expected float32\[4, 3\], got float64\[4, 3\]"):
        program.run([*good[:2], good[2].astype(np.float64), good[3]])
    with pytest.raises(PlanError, match=r"'y': expected float32\[4, 1\], got float32\[4\]"):
        program.run([*good[:3], good[3].reshape(4)])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_check_is_called_before_every_node_and_may_stop(executor: str) -> None:
    class Stopped(Exception):
        pass

    plan = linear_step()
    program = load_program(plan, executor)
    calls: list[int] = []
    program.run(fill(plan), check=lambda: calls.append(1))
    assert len(calls) == len(plan.nodes)

    def stop() -> None:
        calls.pop()
        if not calls:
            raise Stopped

    calls = [1, 1, 1]
    with pytest.raises(Stopped):
        program.run(fill(plan), check=stop)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("gather", (np.ones((2, 3), np.float32), 1, np.array([[3]]))),
        ("gather", (np.ones((2, 3), np.float32), -1, np.array([[-1]]))),
        ("gather", (np.ones((), np.float32), 0, np.array(1))),
        ("scatter", (np.ones((2, 3), np.float32), 0, np.array([[2]]), 1.0)),
        ("scatter", (np.ones((2, 3), np.float32), 0, np.array([[1 << 62]]), np.ones((1, 1), np.float32))),
        ("scatter_add", (np.ones((2, 3), np.float32), 1, np.array([[-4]]), np.ones((1, 1), np.float32))),
        ("index", (np.ones((2, 3), np.float32), [None, np.array([3])])),
        ("index", (np.ones((2, 3), np.float32), [np.array([-3])])),
        ("index_put", (np.ones((2, 3), np.float32), [np.array([2])], np.ones((3,), np.float32), True)),
        ("index_put", (np.ones((2, 3), np.float32), [None, np.array([-4])], np.ones((), np.float32), False)),
        ("embedding", (np.ones((2, 3), np.float32), np.array([2]))),
        ("embedding", (np.ones((2, 3), np.float32), np.array([-(1 << 63)]))),
        (
            "max_pool2d_with_indices_backward",
            (
                np.ones((1, 1, 1), np.float32),
                np.ones((1, 2, 2), np.float32),
                [2],
                [2],
                [0],
                [1],
                False,
                np.array([[[4]]]),
            ),
        ),
    ],
)
def test_an_index_out_of_range_is_a_named_error(executor: str, op: str, args: tuple[Any, ...]) -> None:
    plan, arrays = one_op(op, *args)
    with pytest.raises(PlanError, match=f"node 0: {op}: an index is outside"):
        load_program(plan, executor).run(arrays)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_arithmetic_follows_ieee(executor: str) -> None:
    """Divergence is a value that the job sees in its loss, not a crash; and no warning either."""
    x = np.array([0.0, -1.0, np.inf, np.nan, 1e38], np.float32)
    expected = {"log": [-np.inf, np.nan, np.inf, np.nan, 87.49823], "exp": [1.0, 0.36787945, np.inf, np.nan, np.inf]}
    for op, values in expected.items():
        plan, arrays = one_op(op, x)
        np.testing.assert_allclose(load_program(plan, executor).run(arrays)[0], values, rtol=1e-6)
    for op, args in (("div", (x, 0.0)), ("mul", (x, 1e30)), ("to", (x, "int32")), ("pow", (x, 400))):
        plan, arrays = one_op(op, *args)
        load_program(plan, executor).run(arrays)


def test_extreme_values_as_in_torch() -> None:
    """NaN, infinities and signed zeros through the kernels that have short cuts of their own."""
    special = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1.0, -1.0, 1e-40], np.float32)
    grid = np.stack([np.roll(special, shift) for shift in range(8)])
    mask = np.arange(64).reshape(8, 8) % 3 == 0
    pool = ([2, 2], [2, 2], [1, 1], [1, 1], False)
    cases: list[tuple[str, tuple[Any, ...]]] = [
        *((op, (grid,)) for op in ("relu", "sigmoid", "tanh", "erf", "sign", "round", "reciprocal", "sqrt", "abs")),
        *(("pow", (grid, exponent)) for exponent in (2, 3, 0.5, -1, 0, 1.5)),
        ("where", (mask, 0.0, grid)),
        ("where", (mask, grid, 0)),
        ("where", (mask, grid, -0.0)),
        ("maximum", (grid, 0.5)),
        ("clamp", (grid, 0, 1)),
        ("argmax", (grid, 1, False)),
        ("amax", (grid, (1,), False)),
        ("softmax", (np.where(np.isfinite(grid), grid * 1e4, 0).astype(np.float32), 1)),
        ("max_pool2d_with_indices", (grid[None], *pool)),
        ("max_pool2d_with_indices", (np.full((1, 4, 4), -np.inf, np.float32), *pool)),
    ]
    for op, args in cases:
        plan, arrays = one_op(op, *args)
        for ours, theirs in zip(*(load_program(plan, name).run(arrays) for name in EXECUTORS), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=f"{op}{args[1:]}")


def test_executors_by_name() -> None:
    with pytest.raises(ConfigError, match="not one of numpy, torch"):
        load_program(linear_step(), "jax")


def test_programs_refuse_invalid_plans() -> None:
    plan = linear_step()
    broken = Plan(plan.name, plan.inputs[:3], plan.constants, plan.nodes, plan.outputs)
    for executor in EXECUTORS:
        with pytest.raises(PlanError):
            load_program(broken, executor)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64", "uint8", "uint64"])
def test_arrays_round_trip(dtype: str) -> None:
    for values in (np.arange(6).reshape(2, 3), np.arange(6).reshape(3, 2).T, np.zeros((0, 4)), np.array(7)):
        values = values.astype(dtype)
        array = from_numpy(values)
        back = to_numpy(array)
        np.testing.assert_array_equal(back, values, strict=True)
        assert not back.flags.writeable
        assert from_numpy(back) == array
        assert from_numpy(values.astype(values.dtype.newbyteorder(">"))) == array
    assert from_numpy(np.array([True, False])) == Array("uint8", (2,), b"\x01\x00")
    with pytest.raises(LocalError, match="complex64"):
        from_numpy(np.zeros(1, np.complex64))
