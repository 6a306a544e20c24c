"""A linear model: one output per row (regression, a logit) or one per class. It starts at zero, so every seed does.

Under differential privacy with few rows its few parameters are its strength: noise is added to each of them.
"""

from __future__ import annotations

import torch
from torch import nn


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, pool: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(pool) if pool > 1 else nn.Identity()
        self.layer = nn.Linear(inputs, outputs)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, ...] -> [rows], or [rows, outputs] if there are several; images are first averaged in squares"""
        out = self.layer(self.pool(x).flatten(1))
        return out.squeeze(-1) if out.shape[-1] == 1 else out


def make_model(inputs: int = 13, outputs: int = 1, pool: int = 1) -> nn.Module:
    return Linear(inputs, outputs, pool)
