"""The law of shares: a random program gives by plain PyTorch, by pointers, and by 2 and 3 members the same, within the
bound of fixed point, over memory and over a broker.

Every operation here maps [-1, 1] to itself, so that no program is refused for its ranges. What shares add to an
operation is at most `OWN`: a coefficient is off by 2^-12 of itself, and a gate or two by a unit in the last place each.
What its operands are off by comes out multiplied by at most its gain.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sordino_server as sordino
from sordino_server.tensors.fleet import PointerFleet

OWN = 2.0**-12 + 3 * 2.0**-14
INPUT = 2.0**-14


@dataclass(frozen=True)
class Law:
    """`function` takes two [3, 4] tensors and gives one; `gain`: at most so much of their error comes out."""

    function: Callable[[Tensor, Tensor], Tensor]
    gain: float


def _written(x: Tensor, y: Tensor) -> Tensor:
    copy = x.clone()
    copy[1:] += y[:-1]
    copy.mul_(0.5)
    return copy


def _filled(x: Tensor, y: Tensor) -> Tensor:
    copy = y.clone()
    copy[2] = x[0]
    return copy


LAWS = {
    "add": Law(lambda x, y: (x + y) * 0.5, 1.0),
    "scaled": Law(lambda x, y: torch.add(x * 0.5, y, alpha=-0.3), 0.8),
    "sub": Law(lambda x, y: (1 - x - y) / 3, 0.7),
    "mul": Law(lambda x, y: x * y, 2.0),
    "square": Law(lambda x, y: x.square() - y.square(), 4.0),
    "cube": Law(lambda x, y: 0.5 * x**3 - 0.5 * y, 2.0),
    "matmul": Law(lambda x, y: (x @ y.t()) @ y * (1 / 12), 3.0),
    "rows": Law(lambda x, y: 0.5 * (x - y.mean(dim=1, keepdim=True)), 1.0),
    "columns": Law(lambda x, y: (x + y.sum(dim=0)) * 0.25, 1.0),
    "turned": Law(lambda x, y: 0.5 * (x.t().reshape(3, 4) + y.flip(0)), 1.0),
    "joined": Law(lambda x, y: torch.cat([x[:, :2], y[:, 2:]], dim=1), 1.0),
    "sigmoid": Law(lambda x, y: sordino.sigmoid(x, interval=8) * y, 1.3),
    "tanh": Law(lambda x, y: sordino.tanh(x - y, interval=4) * 0.5, 1.0),
    "written": Law(_written, 1.0),
    "filled": Law(_filled, 1.0),
}

# (operation, operand, operand, whether what is there is computed now); operands count from the last value
Program = list[tuple[str, int, int, bool]]
PROGRAMS = st.lists(
    st.tuples(st.sampled_from(sorted(LAWS)), st.integers(0, 4), st.integers(0, 4), st.booleans()),
    min_size=1,
    max_size=4,
)


def run(program: Program, inputs: list[Tensor], flush: Callable[[], None]) -> tuple[list[Tensor], list[float]]:
    """The last value of the program and the gradients of its mean; how far off each may be on shares."""
    values, bounds = list(inputs), [INPUT] * len(inputs)
    gain = 1.0
    for name, first, second, now in program:
        law = LAWS[name]
        one, other = -1 - first % len(values), -1 - second % len(values)
        bounds.append(law.gain * max(bounds[one], bounds[other]) + OWN)
        values.append(law.function(values[one], values[other]))
        gain *= max(1.0, law.gain)
        if now:
            flush()
    last = values[-1]
    results, allowed = [last.detach()], [bounds[-1]]
    if last.requires_grad:
        found = torch.autograd.grad(last.mean(), inputs, allow_unused=True)
        results += [gradient for gradient in found if gradient is not None]
        # Each operation back multiplies by derivatives that are off as the values are, and sums.
        allowed += [4 * gain * (bounds[-1] + OWN * len(program))] * (len(results) - 1)
    return results, allowed


def holds(fleet: PointerFleet, program: Program, seed: int, *, members: tuple[int, ...] = (2, 3)) -> None:
    generator = torch.Generator().manual_seed(seed)
    plain = [(2 * torch.rand(3, 4, generator=generator) - 1).requires_grad_() for _ in range(2)]
    wanted, allowed = run(program, plain, lambda: None)
    agents = list(fleet)
    ways: list[list[Tensor]] = [[agents[0].send(tensor) for tensor in plain]]
    ways += [[fleet.share(tensor, *agents[:count], ranges=1) for tensor in plain] for count in members]
    for inputs in ways:
        found, _ = run(program, inputs, fleet.flush)
        assert len(found) == len(wanted)
        for want, got, bound in zip(wanted, found, allowed, strict=True):
            error = float((fleet.get(got) - want).abs().max())
            assert error <= bound, (program, inputs[0], error, bound)


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
