"""Choosing what runs a Plan: `numpy` everywhere, `torch` where it is installed and the configuration asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from sordino_common.errors import ConfigError
from sordino_common.plan.analysis import PlanCost
from sordino_common.plan.arrays import NdArray
from sordino_common.plan.interpreter import NumpyProgram
from sordino_common.plan.values import Plan


class Program(Protocol):
    """What both executors are."""

    @property
    def plan(self) -> Plan: ...

    @property
    def cost(self) -> PlanCost: ...

    def run(
        self,
        inputs: Sequence[NdArray],
        *,
        check: Callable[[], None] | None = None,
        own: bool = True,
        quiet: bool = False,
    ) -> list[NdArray]: ...


def load_program(plan: Plan, executor: str = "numpy", *, device: str = "cpu") -> Program:
    """`plan`, made ready for `executor`: "numpy", or "torch" on `device`. `ConfigError` if it is not there."""
    if executor == "numpy":
        return NumpyProgram(plan)
    if executor == "torch":
        try:
            from sordino_common.plan.torch_executor import TorchProgram
        except ImportError as error:
            raise ConfigError(f"executor torch: {error}; install sordino[torch], or set `executor: numpy`") from None
        return TorchProgram(plan, device=device)
    raise ConfigError(f"executor {executor!r} is not one of numpy, torch")
