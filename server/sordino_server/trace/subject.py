"""A model seen as a function of its parameters, and batches to trace it with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from sordino_common.errors import ConfigError, PlanError
from sordino_common.plan.spec import TensorSpec
from sordino_server.trace.capture import buffers_of

_DTYPES = {"float32": torch.float32, "int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model seen as a function of its parameters."""

    model: nn.Module
    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    trainable: tuple[int, ...]  # positions in `names`
    buffers: dict[str, Tensor]

    def bind(self, parameters: Sequence[Tensor], trained: Sequence[Tensor]) -> dict[str, Tensor]:
        """All tensors of the model by name, `trained` (none, or all) in place of the trainable ones."""
        values = dict(zip(self.names, parameters, strict=True))
        values.update(zip((self.names[index] for index in self.trainable), trained, strict=False))
        return values

    def predict(self, values: dict[str, Tensor], x: Tensor) -> Tensor:
        """The model's result for a batch, computed with these tensors in place of its own."""
        result = functional_call(self.model, {**values, **self.buffers}, (x,), tie_weights=True)
        if not isinstance(result, Tensor):
            raise PlanError(
                f"model {type(self.model).__name__}: forward returns {type(result).__name__}, expected one tensor; "
                f"wrap the model in a module that returns the prediction alone"
            )
        return result


def subject_of(model: nn.Module) -> Subject:
    """`PlanError` for parameters or buffers that are not on the CPU, and for parameters that are not float32."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu":
            raise PlanError(
                f"{name!r} lives on {tensor.device}, expected cpu; build the model on the CPU, Plans choose their "
                f"device"
            )
    named = list(model.named_parameters())
    for name, parameter in named:
        if parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise PlanError(f"parameter {name!r} is {kind}, expected float32; call model.float()")
    return Subject(
        model=model,
        names=tuple(name for name, _ in named),
        parameters=tuple(parameter.detach() for _, parameter in named),
        trainable=tuple(index for index, (_, parameter) in enumerate(named) if parameter.requires_grad),
        buffers=buffers_of(model),
    )


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in train or eval mode, and afterwards every module as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def example(name: str, spec: TensorSpec, batch_rows: int, generator: torch.Generator) -> Tensor:
    """A batch to trace with (only its shape and dtype count) and to compare function and Plan on: always the same one.

    Floats are normal for x, 0 or 1 for y, which every loss takes; integers are 0, a valid class and index.
    """
    if spec.dtype not in _DTYPES:
        raise PlanError(f"{name} is {spec}, expected one of {', '.join(_DTYPES)}; convert the columns")
    shape = (batch_rows, *spec.shape)
    if spec.dtype != "float32":
        return torch.zeros(shape, dtype=_DTYPES[spec.dtype])
    normal = torch.randn(shape, generator=generator)
    return normal if name == "x" else (normal > 0).to(torch.float32)


def examples(x: TensorSpec, y: TensorSpec, batch_rows: int) -> tuple[Tensor, Tensor]:
    """Batches of x and y; `ConfigError` for less than one row."""
    if batch_rows < 1:
        raise ConfigError(f"batch_rows is {batch_rows}, expected at least 1")
    generator = torch.Generator().manual_seed(0)
    return example("x", x, batch_rows, generator), example("y", y, batch_rows, generator)


def vjp_of(
    forward: Callable[[list[Tensor]], Tensor], trained: list[Tensor]
) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """The prediction, and what turns a derivative by the prediction into derivatives by `trained`."""
    result: Any = vjp(forward, trained)  # of two or three parts, depending on an option that is not used here
    prediction, pull_back = result
    return prediction, lambda cotangent: pull_back(cotangent)[0]
