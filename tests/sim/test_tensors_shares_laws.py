"""The law of shares: a random program gives by plain PyTorch, by pointers, and by 2 and 3 members the same, over memory
and over a broker: on shares within the bound that `helpers_shares_error` derives for each result, and for gradients,
from the circuits that were run.

Every operation here maps [-1, 1] to itself, so that no program is refused for its ranges.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sordino_server as sordino
from helpers_shares_error import analysed
from sordino_server.tensors.fleet import PointerFleet

Operation = Callable[[Tensor, Tensor], Tensor]  # two [3, 4] tensors -> one

# What the plain program is off by: float64, some dozen operations of numbers up to 1.
EXACT = 1e-12
# A bound beyond this would say nothing. Of 200 drawn programs all but a few have one below 2^-11; the largest is 2^-8,
# where the ranges leave coefficients of 1 part in 2^9 only.
MEANINGLESS = 2.0**-7


def _written(x: Tensor, y: Tensor) -> Tensor:
    copy = x.clone()
    copy[1:] += y[:-1]
    copy.mul_(0.5)
    return copy


def _filled(x: Tensor, y: Tensor) -> Tensor:
    copy = y.clone()
    copy[2] = x[0]
    return copy


LAWS: dict[str, Operation] = {
    "add": lambda x, y: (x + y) * 0.5,
    "scaled": lambda x, y: torch.add(x * 0.5, y, alpha=-0.3),
    "sub": lambda x, y: (1 - x - y) / 3,
    "mul": lambda x, y: x * y,
    "square": lambda x, y: x.square() - y.square(),
    "cube": lambda x, y: 0.5 * x**3 - 0.5 * y,
    "matmul": lambda x, y: (x @ y.t()) @ y * (1 / 12),
    "rows": lambda x, y: 0.5 * (x - y.mean(dim=1, keepdim=True)),
    "columns": lambda x, y: (x + y.sum(dim=0)) * 0.25,
    "turned": lambda x, y: 0.5 * (x.t().reshape(3, 4) + y.flip(0)),
    "joined": lambda x, y: torch.cat([x[:, :2], y[:, 2:]], dim=1),
    "sigmoid": lambda x, y: sordino.sigmoid(x, interval=8) * y,
    "tanh": lambda x, y: sordino.tanh(x - y, interval=4) * 0.5,
    "written": _written,
    "filled": _filled,
}

# (operation, operand, operand, whether what is there is computed now); operands count from the last value
Program = list[tuple[str, int, int, bool]]
PROGRAMS = st.lists(
    st.tuples(st.sampled_from(sorted(LAWS)), st.integers(0, 4), st.integers(0, 4), st.booleans()),
    min_size=1,
    max_size=4,
)


def run(program: Program, inputs: list[Tensor], flush: Callable[[], None]) -> list[Tensor]:
    """The last value of the program and the gradients of its mean."""
    values = list(inputs)
    for name, first, second, now in program:
        values.append(LAWS[name](values[-1 - first % len(values)], values[-1 - second % len(values)]))
        if now:
            flush()
    last = values[-1]
    results = [last.detach()]
    if last.requires_grad:
        found = torch.autograd.grad(last.mean(), inputs, allow_unused=True)
        results += [gradient for gradient in found if gradient is not None]
    return results


def holds(fleet: PointerFleet, program: Program, seed: int, *, members: tuple[int, ...] = (2, 3)) -> None:
    generator = torch.Generator().manual_seed(seed)
    plain = [(2 * torch.rand(3, 4, generator=generator) - 1).requires_grad_() for _ in range(2)]
    wanted = run(program, [tensor.detach().double().requires_grad_() for tensor in plain], lambda: None)
    agents = list(fleet)
    found = run(program, [agents[0].send(tensor) for tensor in plain], fleet.flush)
    for want, got in zip(wanted, found, strict=True):
        assert torch.allclose(fleet.get(got).double(), want, rtol=1e-4, atol=1e-5), program  # float32
    for count in members:
        with analysed() as analysis:
            found = run(program, [fleet.share(tensor, *agents[:count], ranges=1) for tensor in plain], fleet.flush)
            for want, got in zip(wanted, found, strict=True):
                error = np.abs(fleet.get(got).double().numpy() - want.numpy())
                assert (error <= analysis.opened + EXACT).all(), (program, seed, count, error, analysis.opened)
                assert (analysis.opened < MEANINGLESS).all(), (program, analysis.opened)


@pytest.fixture(scope="module")
def memory() -> Iterator[PointerFleet]:
    with sordino.simulate(agents=3) as fleet:
        yield fleet


@pytest.mark.soak
@settings(
    max_examples=200 if os.environ.get("SORDINO_SOAK") else 3,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
@given(program=PROGRAMS, seed=st.integers(0, 1000))
def test_shares_compute_what_pytorch_computes(memory: PointerFleet, program: Program, seed: int) -> None:
    holds(memory, program, seed)


def test_every_operation_of_the_law(memory: PointerFleet) -> None:
    names = sorted(LAWS)
    for seed in range(0, len(names), 3):  # three a program
        program = [(name, k, 1, False) for k, name in enumerate(names[seed : seed + 3])]
        holds(memory, program, seed, members=(2 + seed // 3 % 2,))


@pytest.mark.mqtt
def test_shares_compute_what_pytorch_computes_over_a_broker() -> None:
    with sordino.simulate(agents=3, transport="mqtt") as fleet:
        for seed, name in enumerate(sorted(LAWS)[::8]):
            holds(fleet, [(name, 0, 1, True), ("mul", 0, 1, False)], seed, members=(2 + seed % 2,))
