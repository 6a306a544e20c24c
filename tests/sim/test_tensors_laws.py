"""The law of pointers: a random program gives through them what it gives in plain PyTorch, over memory and a broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sordino_server as sordino
from sordino_server.tensors.fleet import PointerFleet

# Each takes two [3, 4] tensors and gives one; those that write do so to a copy or to a view of one.
Operation = Callable[[Tensor, Tensor], Tensor]


def _written(x: Tensor, y: Tensor) -> Tensor:
    copy = x.clone()
    copy[1:] += y[:-1]
    copy.t()[0].mul_(0.5)
    return copy


def _filled(x: Tensor, y: Tensor) -> Tensor:
    copy = y.clone()
    copy[2] = x[0]
    copy[0, 1] = 3.0
    return copy


OPERATIONS: dict[str, Operation] = {
    "add": lambda x, y: x + y,
    "scaled": lambda x, y: torch.add(x, y, alpha=0.25),
    "sub": lambda x, y: 2 - x - y * 0.5,
    "mul": lambda x, y: x * y.tanh(),
    "div": lambda x, y: x / (y.abs() + 1),
    "relu": lambda x, y: torch.relu(x - y),
    "where": lambda x, y: torch.where(x > y, x, -y),
    "clamp": lambda x, y: x.clamp(-1, 1) + y.sign(),
    "matmul": lambda x, y: (x @ y.t()).softmax(dim=1) @ y,
    "rows": lambda x, y: x - y.mean(dim=1, keepdim=True),
    "columns": lambda x, y: x + y.amax(dim=0),
    "norm": lambda x, y: x / (1 + y.norm()),
    "turned": lambda x, y: x.t().reshape(3, 4) + y.flip(0),
    "joined": lambda x, y: torch.cat([x[:, :2], y[:, 2:]], dim=1),
    "sigmoid": lambda x, y: torch.sigmoid(x) * y,
    "exp": lambda x, y: (-(x * x)).exp() + y,
    "written": _written,
    "filled": _filled,
}

# (operation, operand, operand, whether what is there is sent now); operands count from the last value
PROGRAMS = st.lists(
    st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 5), st.integers(0, 5), st.booleans()),
    min_size=1,
    max_size=8,
)


def run(program: list[tuple[str, int, int, bool]], inputs: list[Tensor], flush: Callable[[], None]) -> list[Tensor]:
    """The last value of the program, and the gradients of its sum."""
    values = list(inputs)
    for name, first, second, send in program:
        values.append(OPERATIONS[name](values[-1 - first % len(values)], values[-1 - second % len(values)]))
        if send:
            flush()
    last = values[-1]
    gradients = torch.autograd.grad(last.sum(), inputs, allow_unused=True) if last.requires_grad else ()
    return [last.detach(), *(gradient for gradient in gradients if gradient is not None)]


def holds(fleet: PointerFleet, program: list[tuple[str, int, int, bool]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    plain = [torch.randn(3, 4, generator=generator, requires_grad=True) for _ in range(2)]
    there: list[Tensor] = [fleet["alice"].send(tensor) for tensor in plain]
    wanted = run(program, plain, lambda: None)
    found = run(program, there, fleet.flush)
    assert len(wanted) == len(found)
    for want, got in zip(wanted, found, strict=True):
        # float32, a dozen operations deep; PyTorch's kernels and NumPy's round differently
        assert torch.allclose(fleet.get(got), want, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def memory() -> Iterator[PointerFleet]:
    with sordino.simulate(agents=1) as fleet:
        yield fleet


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(program=PROGRAMS, seed=st.integers(0, 1000))
def test_pointers_compute_what_pytorch_computes(
    memory: PointerFleet, program: list[tuple[str, int, int, bool]], seed: int
) -> None:
    holds(memory, program, seed)


@pytest.mark.mqtt
def test_pointers_compute_what_pytorch_computes_over_a_broker() -> None:
    with sordino.simulate(agents=1, transport="mqtt") as fleet:
        for seed, name in enumerate(sorted(OPERATIONS)[::3]):
            holds(fleet, [(name, 0, 1, False), ("mul", 0, 1, True), ("written", 0, 2, False)], seed)
