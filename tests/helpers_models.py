"""Models, batches and oracles that the tracing tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sordino_common.plan.spec import TensorSpec
from sordino_server.trace.optimizers import Adam, Optimizer, Sgd


class ClassifierWithOwnLines(nn.Module):
    """A convolutional net whose forward has lines of its own: in-place ops, functional calls, a constant buffer."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(4 * 3 * 3, 3)
        self.relu = nn.ReLU(inplace=True)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.conv(x))
        h = torch.nn.functional.max_pool2d(h, 2)
        out = self.head(h.flatten(1))
        out *= self.scale
        return out + 1


class TiedAutoencoder(nn.Module):
    """Encoder and decoder are one and the same parameter, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 4, bias=False)
        self.decode = nn.Linear(4, 4, bias=False)
        self.decode.weight = self.encode.weight
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.decode(torch.tanh(self.encode(x))))


class Normalised(nn.Module):
    """LayerNorm and GroupNorm: statistics of the row itself, hence no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.group = nn.GroupNorm(2, 4)
        self.layer = nn.LayerNorm(16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.relu(self.group(self.conv(x))).flatten(1)))


def _mlp(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), activation, nn.Linear(8, 6), activation, nn.Linear(6, 1))


def mnist_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 6 * 6, 10)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model with the data it takes. `classes` for cross entropy."""

    build: Callable[[], nn.Module]
    loss: str
    x: TensorSpec
    classes: int = 0

    @property
    def y(self) -> TensorSpec:
        return TensorSpec("int64" if self.classes else "float32", ())

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.build()

    def batch(self, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 + seed)
        x = torch.randn((rows, *self.x.shape), generator=generator)
        if self.classes:
            return x, torch.randint(0, self.classes, (rows,), generator=generator)
        y = torch.randn(rows, generator=generator)
        return x, (y > 0).to(torch.float32) if self.loss == "bce_with_logits" else y


def _floats(*shape: int) -> TensorSpec:
    return TensorSpec("float32", shape)


CASES: dict[str, Case] = {
    "mlp-sigmoid-mse": Case(build=lambda: _mlp(nn.Sigmoid()), loss="mse", x=_floats(5)),
    "mlp-tanh-mse": Case(build=lambda: _mlp(nn.Tanh()), loss="mse", x=_floats(5)),
    "mlp-relu-bce": Case(build=lambda: _mlp(nn.ReLU()), loss="bce_with_logits", x=_floats(5)),
    "mlp-gelu-bce": Case(build=lambda: _mlp(nn.GELU()), loss="bce_with_logits", x=_floats(5)),
    "mlp-leaky-mse": Case(build=lambda: _mlp(nn.LeakyReLU()), loss="mse", x=_floats(5)),
    "mlp-elu-mse": Case(build=lambda: _mlp(nn.ELU()), loss="mse", x=_floats(5)),
    "mlp-softmax-mse": Case(
        build=lambda: nn.Sequential(nn.Linear(5, 4), nn.Softmax(dim=1), nn.Linear(4, 1)), loss="mse", x=_floats(5)
    ),
    "cnn-relu-max": Case(
        build=lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
        ),
        loss="cross_entropy",
        x=_floats(1, 6, 6),
        classes=3,
    ),
    "cnn-sigmoid-avg": Case(
        build=lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        ),
        loss="cross_entropy",
        x=_floats(2, 10, 10),
        classes=3,
    ),
    "cnn-deep": Case(
        build=lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 4),
        ),
        loss="cross_entropy",
        x=_floats(1, 8, 8),
        classes=4,
    ),
    "own-lines": Case(build=ClassifierWithOwnLines, loss="cross_entropy", x=_floats(1, 6, 6), classes=3),
    "normalised": Case(build=Normalised, loss="cross_entropy", x=_floats(2, 4, 4), classes=2),
    "tied": Case(build=TiedAutoencoder, loss="mse", x=_floats(4)),
}


def torch_loss(name: str, prediction: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """PyTorch's own loss, for comparison."""
    if name == "cross_entropy":
        return nn.functional.cross_entropy(prediction, target, reduction=reduction)
    flat = prediction.squeeze(-1)
    if name == "mse":
        return nn.functional.mse_loss(flat, target, reduction=reduction)
    return nn.functional.binary_cross_entropy_with_logits(flat, target, reduction=reduction)


def torch_optimizer(optimizer: Optimizer, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """PyTorch's own optimizer, for comparison."""
    if isinstance(optimizer, Sgd):
        return torch.optim.SGD(
            parameters,
            lr=optimizer.lr,
            momentum=optimizer.momentum,
            nesterov=optimizer.nesterov,
            weight_decay=optimizer.weight_decay,
        )
    assert isinstance(optimizer, Adam)
    return torch.optim.Adam(
        parameters,
        lr=optimizer.lr,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )


def arrays(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    return [tensor.detach().clone().numpy() for tensor in tensors]


def run_steps(program, plan, parameters, batches):
    """Run a training Plan over the batches as a device does: state from zero, outputs fed back. (parameters, losses)"""
    params = list(parameters)
    states = [np.zeros(entry.spec.shape, entry.spec.dtype) for entry in plan.inputs if entry.role == "state"]
    losses = []
    for x, y in batches:
        *carried, loss = program.run([*params, *states, x.numpy(), y.numpy()])
        carried = [np.asarray(value) for value in carried]
        params, states = carried[: len(params)], carried[len(params) :]
        losses.append(float(np.asarray(loss)))
    return params, losses


def clipped_gradients(model: nn.Module, loss: str, x: Tensor, y: Tensor, clip_norm: float) -> list[Tensor]:
    """The slow oracle of DP-SGD: a backward pass per row, each gradient clipped in float64, and their mean."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
    for row in range(x.shape[0]):
        value = torch_loss(loss, model(x[row : row + 1]), y[row : row + 1])
        gradients = [g.double() for g in torch.autograd.grad(value, parameters)]
        norm = torch.sqrt(torch.stack([(g * g).sum() for g in gradients]).sum())
        factor = min(1.0, clip_norm / max(float(norm), 1e-30))
        for accumulated, gradient in zip(total, gradients, strict=True):
            accumulated += factor * gradient
    return [(accumulated / x.shape[0]).float() for accumulated in total]


def batches_of(case: Case, rows: int, count: int) -> list[tuple[Tensor, Tensor]]:
    return [case.batch(rows, seed) for seed in range(count)]
