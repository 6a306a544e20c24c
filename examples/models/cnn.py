"""A small convolutional net for 28 x 28 grey images: two convolutions, each with pooling, and two dense layers."""

from __future__ import annotations

import torch
from torch import nn


class Cnn(nn.Module):
    def __init__(self, channels: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, kernel_size=5, stride=1)  # 28 -> 24, pooled 12
        self.conv2 = nn.Conv2d(channels, 2 * channels, kernel_size=5)  # 12 -> 8, pooled 4
        self.pool = nn.MaxPool2d(2)
        self.dense1 = nn.Linear(2 * channels * 4 * 4, hidden)
        self.dense2 = nn.Linear(hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, 1, 28, 28], scaled to 0..1 -> logits [rows, classes]"""
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x)))
        return self.dense2(torch.relu(self.dense1(x.flatten(1))))


def make_model(channels: int = 8, hidden: int = 64, classes: int = 10) -> nn.Module:
    return Cnn(channels, hidden, classes)
