"""Optimizers as functions: (parameters, gradients, state) -> (parameters, state). Equal to `torch.optim` step by step.

State starts at zero on the device, so what each optimizer keeps is chosen such that zero is the right beginning.
Legend: θ parameter, g gradient, η learning rate, μ momentum, λ weight decay, β1 β2 decay rates, ε as in the Adam paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sordino_common.errors import ConfigError

Shape = tuple[int, ...]


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ConfigError(text)


def _decayed(gradient: Tensor, parameter: Tensor, weight_decay: float) -> Tensor:
    return torch.add(gradient, parameter, alpha=weight_decay) if weight_decay else gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Sgd:
    """Stochastic gradient descent with momentum, Nesterov's form of it, and L2 weight decay: `torch.optim.SGD`.

    g <- g + λθ;  b <- μb + g;  g <- g + μb (Nesterov) or b;  θ <- θ - ηg.   (PyTorch starts b at the first g: the same
    from zero.) State: b, one tensor per parameter, if μ > 0.
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _require(math.isfinite(self.lr) and self.lr > 0, f"optimizer sgd: lr is {self.lr}, expected a number above 0")
        _require(0 <= self.momentum < 1, f"optimizer sgd: momentum is {self.momentum}, expected 0 <= momentum < 1")
        _require(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            f"optimizer sgd: weight_decay is {self.weight_decay}, expected a number of at least 0",
        )
        _require(
            not self.nesterov or self.momentum > 0,
            "optimizer sgd: nesterov needs momentum above 0, expected momentum: 0.9 or so",
        )

    def state(self, parameters: Sequence[tuple[str, Shape]]) -> list[tuple[str, Shape]]:
        """Names and shapes of the state for these parameters (float32, zero at the start)."""
        return [(f"momentum.{name}", shape) for name, shape in parameters] if self.momentum else []

    def step(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], state: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """One step. The inputs are not changed."""
        updated: list[Tensor] = []
        buffers: list[Tensor] = []
        for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            direction = _decayed(gradient, parameter, self.weight_decay)
            if self.momentum:
                buffer = torch.add(direction, state[index], alpha=self.momentum)
                buffers.append(buffer)
                direction = torch.add(direction, buffer, alpha=self.momentum) if self.nesterov else buffer
            updated.append(torch.sub(parameter, direction, alpha=self.lr))
        return updated, buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam:
    """Adam with L2 weight decay: `torch.optim.Adam` (Kingma and Ba, ICLR 2015, algorithm 1).

    g <- g + λθ;  m <- β1 m + (1-β1) g;  v <- β2 v + (1-β2) g²;  θ <- θ - (η / c1) m / (sqrt(v) / sqrt(c2) + ε), where
    after t steps c1 = 1 - β1^t and c2 = 1 - β2^t. The count t appears only in c1 and c2, and these obey c <- βc + (1-β)
    from c = 0. So they are kept in its place: no power is computed, and 1 - β^t suffers no cancellation in float32.
    State: c1 and c2 (scalars), then m, then v, a tensor per parameter each.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _require(math.isfinite(self.lr) and self.lr > 0, f"optimizer adam: lr is {self.lr}, expected a number above 0")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            _require(0 <= beta < 1, f"optimizer adam: {name} is {beta}, expected 0 <= {name} < 1")
        _require(
            math.isfinite(self.eps) and self.eps > 0, f"optimizer adam: eps is {self.eps}, expected a number above 0"
        )
        _require(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            f"optimizer adam: weight_decay is {self.weight_decay}, expected a number of at least 0",
        )

    def state(self, parameters: Sequence[tuple[str, Shape]]) -> list[tuple[str, Shape]]:
        """Names and shapes of the state for these parameters (float32, zero at the start)."""
        if not parameters:
            return []
        corrections: list[tuple[str, Shape]] = [("adam.correction1", ()), ("adam.correction2", ())]
        first = [(f"adam.first.{name}", shape) for name, shape in parameters]
        second = [(f"adam.second.{name}", shape) for name, shape in parameters]
        return corrections + first + second

    def step(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], state: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """One step. The inputs are not changed."""
        if not parameters:
            return [], []
        count = len(parameters)
        correction1 = self.beta1 * state[0] + (1 - self.beta1)
        correction2 = self.beta2 * state[1] + (1 - self.beta2)
        rate = self.lr / correction1
        root2 = torch.sqrt(correction2)
        updated: list[Tensor] = []
        firsts: list[Tensor] = []
        seconds: list[Tensor] = []
        for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            direction = _decayed(gradient, parameter, self.weight_decay)
            first = torch.add(self.beta1 * state[2 + index], direction, alpha=1 - self.beta1)
            square = direction * direction
            second = torch.add(self.beta2 * state[2 + count + index], square, alpha=1 - self.beta2)
            updated.append(parameter - rate * (first / (torch.sqrt(second) / root2 + self.eps)))
            firsts.append(first)
            seconds.append(second)
        return updated, [correction1, correction2, *firsts, *seconds]


Optimizer = Sgd | Adam
