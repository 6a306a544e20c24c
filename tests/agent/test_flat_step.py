"""An optimizer's Plan on one lane: the same bits as parameter by parameter; what is not such a Plan is left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sordino_agent import flat_step
from sordino_agent.flat_step import FlatStep
from sordino_agent.private_step import Applier, gradient_layout
from sordino_common.messages.array import Array
from sordino_common.plan.interpreter import NumpyProgram
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.torch_executor import TorchProgram
from sordino_common.plan.values import Input, Node, Output, Plan, Ref

# --- Plans of the server's optimizers ------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": ({"lr": 0.1}, 1),
    "momentum": ({"lr": 0.1, "momentum": 0.9}, 2),
    "nesterov, decay": ({"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, 4),
    "adam": ({"lr": 0.01, "weight_decay": 0.01}, None),
}


def traced(name: str) -> tuple[Plan, Plan]:
    """(gradient Plan, apply Plan) of a perceptron of three layers."""
    from torch import nn

    from sordino_server.trace.optimizers import Adam, Sgd
    from sordino_server.trace.row_gradients import apply_plan, gradient_plan

    model = nn.Sequential(nn.Linear(5, 7), nn.Sigmoid(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))
    optimizer = (Adam if name == "adam" else Sgd)(**OPTIMIZERS[name][0])  # type: ignore[arg-type]
    x, y = TensorSpec("float32", (5,)), TensorSpec("float32", ())
    gradient = gradient_plan(model, loss="mse", x=x, y=y, batch_rows=4).plan
    return gradient, apply_plan(model, optimizer=optimizer).plan


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_bits_as_parameter_by_parameter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient, apply = traced(name)
    layout = gradient_layout(gradient)
    flat = Applier(NumpyProgram(apply), gradient, layout)
    assert len(flat._program.plan.nodes) < len(apply.nodes) / 3
    if (nodes := OPTIMIZERS[name][1]) is not None:
        assert len(flat._program.plan.nodes) == nodes
    monkeypatch.setattr(FlatStep, "of", FlatStep.unchanged)
    plain = Applier(NumpyProgram(apply), gradient, layout)
    assert plain._program.plan is apply
    draw = np.random.default_rng(3)
    params = [draw.normal(size=gradient.inputs[at].spec.shape).astype(np.float32) for at in layout.params]
    before = [value.copy() for value in params]
    length = sum(value.size for value in params)
    ours, theirs = list(params), list(params)
    for step in range(4):
        total = draw.integers(-(1 << 40), 1 << 40, size=length)
        if step == 2:
            ours, theirs = list(ours), list(theirs)  # a list that the applier has not made itself
        ours, theirs = flat.step(ours, total, 2.0**-36), plain.step(theirs, total, 2.0**-36)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.shape == other.shape and mine.dtype == other.dtype
            assert np.array_equal(mine.view(np.int32), other.view(np.int32))
    assert all(np.array_equal(value, old) for value, old in zip(params, before, strict=True))


def test_other_executors_and_large_models_are_stepped_as_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient, apply = traced("sgd")
    program = TorchProgram(apply)
    assert Applier(program, gradient, gradient_layout(gradient))._program is program
    monkeypatch.setattr(flat_step, "MOST_ENTRIES", 60)
    assert FlatStep.of(apply).plan is apply


# --- Plans that are not lanes --------------------------------------------------------------------------------------

Change = Callable[[Plan], Plan]
A, B, C = Ref(2), Ref(3), Ref(4)


def two(shape: tuple[int, ...] = (3,), other: tuple[int, ...] = (2, 2)) -> Plan:
    """w - 0.5 g for two parameters."""
    specs = [TensorSpec("float32", shape), TensorSpec("float32", other)]
    return Plan(
        name="apply",
        inputs=(
            *(Input(name=name, role="param", spec=spec) for name, spec in zip("vw", specs, strict=True)),
            *(Input(name=name, role="gradient", spec=spec) for name, spec in zip("vw", specs, strict=True)),
        ),
        constants=(),
        nodes=tuple(Node(op="sub", args=(Ref(at), Ref(at + 2), 0.5), outs=(specs[at],)) for at in (0, 1)),
        outputs=tuple(Output(name=name, role="param", value=4 + at) for at, name in enumerate("vw")),
    )


def node(plan: Plan, at: int, **changes: Any) -> Plan:
    nodes = list(plan.nodes)
    nodes[at] = replace(nodes[at], **changes)
    return replace(plan, nodes=tuple(nodes))


def outputs(plan: Plan, *values: int) -> Plan:
    given = zip(plan.outputs, values, strict=True)
    return replace(plan, outputs=tuple(replace(entry, value=value) for entry, value in given))


def constant(plan: Plan) -> Plan:
    """w - c g with a vector c."""
    made = replace(plan, constants=(Array("float32", (3,), bytes(12)),))
    return replace(made, nodes=(Node(op="mul", args=(Ref(2), Ref(4)), outs=(plan.inputs[0].spec,)), *plan.nodes[1:]))


UNLIKE: dict[str, tuple[Plan, Change]] = {
    "another rate": (two(), lambda plan: node(plan, 1, args=(Ref(1), Ref(3), 0.25))),
    "a zero of another sign": (
        node(two(), 0, args=(Ref(0), Ref(2), 0.0)),
        lambda plan: node(plan, 1, args=(Ref(1), Ref(3), -0.0)),
    ),
    "another op": (two(), lambda plan: node(plan, 1, op="add")),
    "operands the other way round": (two(), lambda plan: node(plan, 1, args=(Ref(3), Ref(1), 0.5))),
    "the other's gradient": (two((3,), (3,)), lambda plan: node(plan, 1, args=(Ref(1), Ref(2), 0.5))),
    "the other's parameter": (two((3,), (3,)), lambda plan: outputs(plan, 5, 4)),
    "one for both": (two((3,), (3,)), lambda plan: outputs(plan, 4, 4)),
    "one that stays": (two(), lambda plan: outputs(plan, 4, 1)),
    "one gradient is given back": (two(), lambda plan: outputs(plan, 4, 3)),
    "scalars": (two((), ()), lambda plan: plan),
    "ops that may round by place": (two(), lambda plan: node(node(plan, 0, op="pow"), 1, op="pow")),
    "a vector of constants": (two(), constant),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_is_not_lanes_is_left_alone(name: str) -> None:
    alike, change = UNLIKE[name]
    plan = change(alike)
    assert FlatStep.of(plan) == FlatStep.unchanged(plan)


def test_lanes_are_found_whatever_their_shapes() -> None:
    made = FlatStep.of(two())
    assert made.inputs == ((0, 1), (2, 3))
    assert [entry.spec.shape for entry in made.plan.inputs] == [(7,), (7,)]
    assert made.plan.nodes == (Node(op="sub", args=(Ref(0), Ref(1), 0.5), outs=(TensorSpec("float32", (7,)),)),)
    assert made.plan.outputs == (Output(name="v", role="param", value=2),)
