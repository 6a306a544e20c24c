"""What eager style costs on secret shares: a step of the Boston MLP by three members, beside the same by plain PyTorch.

One step a flush, in a session that stays open; `one-off`: a program of another form each time, which opens a session.
All members and the dealer are in this process; over memory without network time, then through a broker of our own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, Literal

import torch
from torch import nn

import sordino_server as sordino

RANGES = sordino.Ranges(x=12, params=4, values=16, updates=0.25, preactivations=8)
WARM = 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 64), nn.Sigmoid(), nn.Linear(64, 1))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


def seconds(model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, steps: int) -> float:
    """The median step; on shares the loss is fetched."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    taken = []
    with sordino.polynomial_activations(degree=3, interval=8):
        for _ in range(WARM + steps):
            began = time.perf_counter()
            loss: Any = step(model, optimizer, x, y)
            if isinstance(loss, sordino.ChainTensor):
                loss.get()  # type: ignore[attr-defined]  # a shared tensor has it
            taken.append(time.perf_counter() - began)
    return statistics.median(taken[WARM:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    count: int = parser.parse_args().steps
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 13, generator=generator).clamp(-4, 4)
    y = torch.randn(32, 1, generator=generator).clamp(-2, 2)
    print(f"pytorch          {1e3 * seconds(network(), x, y, steps=count):8.2f} ms a step")
    transports: tuple[Literal["memory", "mqtt"], ...] = ("memory", "mqtt")
    for transport in transports:
        with sordino.simulate(agents=3, transport=transport) as fleet:
            xs, ys = (fleet.share(tensor, *fleet, ranges=RANGES) for tensor in (x, y))
            model = fleet.share(network(), *fleet, ranges=RANGES)
            shared = seconds(model, xs, ys, steps=count)
            began = time.perf_counter()
            for k in range(count):
                (xs * (k + 1.5)).sum().get()
            once = (time.perf_counter() - began) / count
        print(f"shares, {transport:8s} {1e3 * shared:8.2f} ms a step, {1e3 * once:8.2f} ms a one-off program")


if __name__ == "__main__":
    main()
