"""`trace` of any function: equal to the function, short, deterministic."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers_models import CASES
from sordino_common.errors import PlanError
from sordino_common.plan.interpreter import NumpyProgram
from sordino_common.plan.plan import PlanLimits, decode_plan
from sordino_common.plan.torch_executor import TorchProgram
from sordino_server.trace.optimizers import Adam
from sordino_server.trace.row_gradients import apply_plan, gradient_plan
from sordino_server.trace.steps import evaluation_plan, training_plan
from sordino_server.trace.tracing import TracedPlan, trace

Function = Callable[..., Tensor]


def traced(fn: Function, *examples: Tensor) -> TracedPlan:
    return trace(
        lambda *tensors: [fn(*tensors)],
        examples,
        inputs=[(f"in{index}", "value") for index in range(len(examples))],
        outputs=[("out", "value")],
        name="function",
    )


def check(fn: Function, *examples: Tensor) -> TracedPlan:
    """Trace, and compare both executors with the function."""
    result = traced(fn, *examples)
    assert decode_plan(result.data) == result.plan
    want = fn(*examples).numpy()
    for program in (NumpyProgram, TorchProgram):
        (got,) = program(result.plan).run([example.numpy() for example in examples])
        assert np.asarray(got).dtype == want.dtype
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5, atol=1e-6)
    return result


def ops(result: TracedPlan) -> list[str]:
    return [node.op for node in result.plan.nodes]


ELEMENTWISE: dict[str, Function] = {
    "arithmetic": lambda x, y: 1 - x * 2 + y / 4 - torch.add(x, y, alpha=0.5) * (3 - y),
    "powers": lambda x, y: x**2 + y**3 + torch.sqrt(torch.abs(x)) - torch.pow(2.0, y),
    "compare": lambda x, y: torch.where((x > y) | (x <= 0.1), x, y * 2) + ((x == y) & ~(y != 0)).float(),
    "where-scalars": lambda x, y: torch.where(x > 0, 1.0, 0.0) * torch.where(y > 0, y, 0.5),
    "clamp": lambda x, y: torch.clamp(x, -0.5, 0.5) + torch.clamp_min(y, 0.0) + torch.minimum(x, y),
    "activations": lambda x, y: torch.nn.functional.silu(x) + torch.nn.functional.softplus(y) + torch.tanh(x * y),
    "gelu": lambda x, y: torch.nn.functional.gelu(x) * torch.nn.functional.gelu(y, approximate="tanh"),
    "reduce": lambda x, y: x.sum(0, keepdim=True) * y.mean() + x.sum(1, keepdim=True).sum(),
    "broadcast": lambda x, y: x.unsqueeze(0) * y.unsqueeze(1) + torch.ones(1, 1) * 3,
    "shape": lambda x, y: torch.cat([x, y], 1).t().flatten().unsqueeze(1).expand(-1, 2),
    "stack": lambda x, y: torch.stack([x, y]).permute(2, 0, 1)[:, 1:, ::2].transpose(0, 2),
    "constants": lambda x, y: x * torch.tensor(3.0) + torch.arange(x.shape[1]) - torch.full_like(y, 0.25),
    "bool-constants": lambda x, y: torch.where(torch.arange(x.shape[1]) % 2 == 0, x, y),
    "in-place": lambda x, y: x.clone().mul_(2).add_(y).relu_() + torch.zeros_like(y).add_(1),
    "softmax": lambda x, y: torch.softmax(x, 1) * torch.log_softmax(y, 0),
    "norms": lambda x, y: torch.linalg.vector_norm(x, dim=1) + torch.linalg.vector_norm(y),
    "matrix": lambda x, y: x @ y.t() @ torch.addmm(y, x @ x.t(), y, beta=0.5, alpha=2.0),
    "einsum": lambda x, y: torch.einsum("bi,bj->bij", x, y).sum(0),
    "casts": lambda x, y: x.double() + y.to(torch.int32).float() + (x > 0).long(),
    "pad": lambda x, y: torch.nn.functional.pad(x, (1, 2), value=1.5).flip(1) * y.sum(),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(shape=st.tuples(st.sampled_from([0, 1, 2, 3]), st.sampled_from([0, 1, 4])), seed=st.integers(0, 99))
def test_equal_to_the_function(name: str, shape: tuple[int, int], seed: int) -> None:
    """Shapes with empty dimensions and dimensions of size 1 included."""
    torch.manual_seed(seed)
    check(ELEMENTWISE[name], torch.randn(shape), torch.randn(shape))


def test_equal_operations_are_done_once() -> None:
    result = check(lambda x: torch.exp(x) * torch.exp(x) + torch.exp(x), torch.randn(3))
    assert sorted(ops(result)) == ["add", "exp", "mul"]


def test_operations_that_nothing_needs_are_dropped() -> None:
    def fn(x: Tensor) -> Tensor:
        torch.exp(x)
        return x + 1

    assert ops(check(fn, torch.randn(3))) == ["add"]


def test_an_integer_and_a_float_argument_are_not_the_same() -> None:
    """1 == 1.0 == True in Python; as arguments they promote differently."""
    result = check(lambda x: (x * 2).float() + x * 2.0, torch.arange(4))
    assert ops(result).count("mul") == 2


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x: x.t().t() + 0, []),
        (lambda x: x.t().reshape(-1).reshape(2, 3).reshape(6), ["permute", "view"]),
        (lambda x: x.unsqueeze(0).transpose(0, 1), ["view"]),
        (lambda x: x.view(6).view(3, 2), []),
        (lambda x: x * 2 / 4 * 3, ["mul"]),
        (lambda x: x * 4 / 4, []),
        (lambda x: x**1 + x**2, ["add", "mul"]),
        (lambda x: x.unsqueeze(1).sum(1), []),
        (lambda x: x.sum(0, keepdim=True).squeeze(0), ["sum"]),
        (lambda x: x.expand(3, 2).float().detach().clone() * 1.0, []),
        (lambda x: x * (torch.ones(2) * 2).sum() + torch.zeros(3, 2), ["mul"]),
    ],
)
def test_short(fn: Function, expected: list[str]) -> None:
    result = check(fn, torch.randn(3, 2))
    assert sorted(ops(result)) == expected
    assert result.plan.constants == ()


def test_integer_division_by_a_constant_stays_a_division() -> None:
    assert ops(check(lambda x: x / 3, torch.arange(5))) == ["div"]


def test_constants_are_carried_once() -> None:
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    result = check(lambda x: (x @ table) + (x @ table.clone()).exp() + torch.tensor([1.0, 2.0]), torch.randn(3, 2))
    assert [constant.shape for constant in result.plan.constants] == [(2, 2), (2,)]


def test_outputs_may_be_inputs_and_constants() -> None:
    result = trace(
        lambda x: [x, torch.tensor([1, 2]), x * 1, torch.ones(3)],
        [torch.randn(2)],
        inputs=[("x", "x")],
        outputs=[(name, "value") for name in "abcd"],
        name="outputs",
    )
    x = np.array([5.0, 6.0], np.float32)
    first, numbers, third, ones = NumpyProgram(result.plan).run([x])
    np.testing.assert_array_equal(first, x)
    np.testing.assert_array_equal(third, x)
    np.testing.assert_array_equal(numbers, [1, 2])
    np.testing.assert_array_equal(ones, np.ones(3, np.float32))


def test_unused_inputs_stay_inputs() -> None:
    result = check(lambda x, y: x + 1, torch.randn(2), torch.randn(7))
    assert len(result.plan.inputs) == 2


def test_origins_name_this_file() -> None:
    result = traced(lambda x: torch.exp(x) + 1, torch.randn(2))
    assert all(origin.startswith(f"{__file__}:") for origin in result.origins)
    assert len(result.origins) == 2
    assert __file__.encode() not in result.data


def test_limits_hold() -> None:
    with pytest.raises(PlanError, match="nodes, at most 1"):
        trace(
            lambda x: [torch.exp(x) + 1],
            [torch.randn(2)],
            inputs=[("x", "x")],
            outputs=[("y", "value")],
            name="long",
            limits=PlanLimits(nodes=1),
        )


def test_a_function_that_is_not_the_same_at_every_call_is_refused() -> None:
    calls = []

    def fn(x: Tensor) -> Tensor:
        calls.append(1)
        return x * float(len(calls))

    with pytest.raises(PlanError, match="not the same function at every call"):
        traced(fn, torch.ones(3))


def plan_ids(seed: int) -> str:
    """Plans of four kinds for two models whose weights are drawn from `seed`."""
    lines = []
    for name in ("own-lines", "mlp-relu-bce"):
        case = CASES[name]
        adam = Adam(lr=0.01)
        common = {"loss": case.loss, "x": case.x, "y": case.y, "batch_rows": 4}
        plans = (
            training_plan(case.model(seed), optimizer=adam, **common),
            gradient_plan(case.model(seed), **common),
            apply_plan(case.model(seed), optimizer=adam),
            evaluation_plan(case.model(seed), **common),
        )
        lines += [f"{plan.plan.name} {plan.plan_id.hex()}" for plan in plans]
    return "\n".join(lines)


def test_the_same_bytes_in_every_process() -> None:
    """Another hash seed, other weights, fresh imports: the identity of a Plan depends on the program alone."""
    here = Path(__file__)
    script = (
        f"import sys; sys.path[:0] = [{str(here.parent)!r}, {str(here.parents[1])!r}]\n"
        f"import {here.stem}\nprint({here.stem}.plan_ids(seed=1))"
    )
    there = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    ours = plan_ids(seed=2)
    assert there.strip() == ours
    assert len({line.split()[-1] for line in ours.splitlines()}) == 8  # all different


def test_the_identity_is_the_sha256_of_the_bytes() -> None:
    result = traced(lambda x: x + 1, torch.ones(2))
    assert hashlib.sha256(result.data).digest() == result.plan_id
