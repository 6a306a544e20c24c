"""A convolutional net that secret shares can run: one convolution, sigmoid, average pooling, one dense layer."""

from __future__ import annotations

import torch
from torch import nn


class SigmoidCnn(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, kernel_size=5, stride=2)  # 28 -> 12, pooled 6
        self.pool = nn.AvgPool2d(2)
        self.dense = nn.Linear(channels * 6 * 6, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, 1, 28, 28], scaled to 0..1 -> a logit per class [rows, classes]"""
        x = self.pool(torch.sigmoid(self.conv(x)))
        return self.dense(x.flatten(1))


def make_model(channels: int = 8, classes: int = 10) -> nn.Module:
    return SigmoidCnn(channels, classes)
