"""A multilayer perceptron with one output per row: regression, or the logit of a binary class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Mlp(nn.Module):
    def __init__(self, inputs: int, hidden: Sequence[int], activation: str) -> None:
        super().__init__()
        kinds = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(inputs, width), kinds[activation]()]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, inputs] -> [rows]"""
        return self.layers(x).squeeze(-1)


def make_model(inputs: int = 13, hidden: Sequence[int] = (64,), activation: str = "relu") -> nn.Module:
    return Mlp(inputs, hidden, activation)
