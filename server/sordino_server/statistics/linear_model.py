"""The linear model that ridge regression fills: y' = clamp(w·x' + c, -1, 1), x' and y' in [-1, 1] by their ranges.

The clamp is public knowledge about the target: its range."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RangedLinear(nn.Module):
    """One weight row [1, D] and one bias [1]; prediction [B, 1]."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(self.linear(x), -1.0, 1.0)


def make_linear(inputs: int) -> RangedLinear:
    """Zero weights: before the fleet has answered, the middle of the target's range."""
    return RangedLinear(inputs)
