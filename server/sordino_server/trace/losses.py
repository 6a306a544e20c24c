"""Losses: the value per row, its derivative by the prediction, and the metrics per row that an evaluation sums.

The derivative is stated, not left to autograd: it is shorter (two operations where autograd records eight), and on
secret shares every operation costs. Training uses the mean over the rows. Legend: B rows, p prediction, y target, C
classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sordino_common.errors import ConfigError, PlanError
from sordino_server.trace.activations import Fit

LossName = Literal["mse", "bce_with_logits", "cross_entropy"]


class Loss(Protocol):
    """A loss over a prediction [B, ...] and a target [B, ...]."""

    @property
    def name(self) -> str: ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what `metric_rows` returns: "loss" first."""
        ...

    def agree(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The prediction in the shape that the formulas take, or `PlanError`: nothing is ever broadcast."""
        ...

    def rows(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of each row, [B]."""
        ...

    def gradient(self, prediction: Tensor, target: Tensor) -> Tensor:
        """d rows[b] / d prediction[b], in the prediction's shape."""
        ...

    def metric_rows(self, prediction: Tensor, target: Tensor) -> list[Tensor]:
        """One float32 [B] per metric."""
        ...


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} [{', '.join(str(dim) for dim in tensor.shape)}]"


def _agree_elementwise(name: str, prediction: Tensor, target: Tensor) -> Tensor:
    """A prediction [B, ..., 1] for a target [B, ...] loses the last axis; otherwise both must have the same shape.

    Left alone, [B, 1] against [B] would broadcast to [B, B] and train on every wrong pair.
    """
    if target.dtype != torch.float32:
        raise PlanError(f"loss {name}: the target is {_shape(target)}, expected float32; convert the target column")
    if prediction.dtype != torch.float32:
        raise PlanError(f"loss {name}: the model returns {_shape(prediction)}, expected float32")
    if prediction.dim() == target.dim() + 1 and prediction.shape[-1] == 1:
        prediction = prediction.squeeze(-1)
    if prediction.shape != target.shape:
        raise PlanError(
            f"loss {name}: the model returns {_shape(prediction)} for a target of {_shape(target)}, expected the same "
            f"shape or one "
            f"more axis of length 1 at the end; mend the last layer or the target's columns"
        )
    return prediction


def _mean_of_entries(entries: Tensor) -> Tensor:
    """[B, ...] -> [B], the mean over all but the rows: several target columns are averaged, as by `nn.MSELoss`."""
    return entries if entries.dim() == 1 else entries.flatten(1).mean(1)


def _entries(prediction: Tensor) -> int:
    return prediction[0].numel() if prediction.dim() > 1 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanSquaredError:
    """(p - y)²; derivative 2(p - y). Equals `nn.MSELoss`."""

    name: str = "mse"
    metrics: tuple[str, ...] = ("loss",)

    def agree(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _agree_elementwise(self.name, prediction, target)

    def rows(self, prediction: Tensor, target: Tensor) -> Tensor:
        difference = prediction - target
        return _mean_of_entries(difference * difference)

    def gradient(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target) * (2.0 / _entries(prediction))

    def metric_rows(self, prediction: Tensor, target: Tensor) -> list[Tensor]:
        return [self.rows(prediction, target)]


@dataclass(frozen=True, slots=True, kw_only=True)
class BinaryCrossEntropy:
    """-y log s(p) - (1-y) log(1 - s(p)) with s the sigmoid, as max(p, 0) - py + log(1 + exp(-|p|)), which never
    overflows; derivative s(p) - y. Equals `nn.BCEWithLogitsLoss`. Targets are 0.0 or 1.0; a row is correct if p > 0
    just where y > 1/2 (for several labels a row, the share of labels that are)."""

    name: str = "bce_with_logits"
    metrics: tuple[str, ...] = ("loss", "correct")

    def agree(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _agree_elementwise(self.name, prediction, target)

    def rows(self, prediction: Tensor, target: Tensor) -> Tensor:
        entries = torch.relu(prediction) - prediction * target + torch.log1p(torch.exp(-torch.abs(prediction)))
        return _mean_of_entries(entries)

    def gradient(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (torch.sigmoid(prediction) - target) * (1.0 / _entries(prediction))

    def metric_rows(self, prediction: Tensor, target: Tensor) -> list[Tensor]:
        correct = ((prediction > 0) == (target > 0.5)).to(torch.float32)
        return [self.rows(prediction, target), _mean_of_entries(correct)]


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """-log softmax(p)[y] for classes y in [0, C), int64 [B], and p [B, C]; derivative softmax(p) - onehot(y).

    Equals `nn.CrossEntropyLoss` except that no class index is ignored: a label outside [0, C) stops the step.
    """

    name: str = "cross_entropy"
    metrics: tuple[str, ...] = ("loss", "correct")

    def agree(self, prediction: Tensor, target: Tensor) -> Tensor:
        if target.dtype != torch.int64 or target.dim() != 1:
            raise PlanError(
                f"loss {self.name}: the target is {_shape(target)}, expected int64 [B] of class numbers from 0"
            )
        if prediction.dtype != torch.float32 or prediction.dim() != 2 or prediction.shape[0] != target.shape[0]:
            raise PlanError(
                f"loss {self.name}: the model returns {_shape(prediction)}, expected float32 [{target.shape[0]}, "
                f"classes]"
            )
        if prediction.shape[1] < 2:
            raise PlanError(
                f"loss {self.name}: the model returns one class; expected two or more, or loss bce_with_logits"
            )
        return prediction

    def rows(self, prediction: Tensor, target: Tensor) -> Tensor:
        logs = torch.log_softmax(prediction, 1)
        return -logs.gather(1, target.unsqueeze(1)).squeeze(1)

    def gradient(self, prediction: Tensor, target: Tensor) -> Tensor:
        classes = torch.arange(prediction.shape[1], device=prediction.device)
        onehot = (target.unsqueeze(1) == classes).to(torch.float32)
        return torch.exp(torch.log_softmax(prediction, 1)) - onehot

    def metric_rows(self, prediction: Tensor, target: Tensor) -> list[Tensor]:
        correct = (torch.argmax(prediction, 1) == target).to(torch.float32)
        return [self.rows(prediction, target), correct]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolynomialLogistic:
    """Logistic loss without exponential or logarithm: derivative s(p) - y with the polynomial s of `fit`; the value is
    its integral, ln 2 + p/2 + c1 p²/2 + c3 p⁴/4 + ... - py, which is near `BinaryCrossEntropy` on the fit's interval.

    Metrics are those of the true loss: they are computed in the clear, if at all."""

    fit: Fit
    name: str = "bce_with_logits"
    metrics: tuple[str, ...] = ("loss", "correct")

    def agree(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _agree_elementwise(self.name, prediction, target)

    def rows(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _mean_of_entries(self.fit.integral(prediction) - prediction * target)

    def gradient(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (self.fit(prediction) - target) * (1.0 / _entries(prediction))

    def metric_rows(self, prediction: Tensor, target: Tensor) -> list[Tensor]:
        return BinaryCrossEntropy().metric_rows(prediction, target)


@dataclass(frozen=True, slots=True, kw_only=True)
class OneHot:
    """`inner` over classes as one-hot floats [B, C]; a row is correct if the largest prediction is of its class."""

    inner: Loss

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("loss", "correct")

    def agree(self, prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.dim() != 2 or prediction.shape != target.shape:
            raise PlanError(
                f"loss {self.name}: the model returns {_shape(prediction)} for one-hot targets of {_shape(target)}, "
                f"expected one number per class; mend the last layer or data.classes"
            )
        return self.inner.agree(prediction, target)

    def rows(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.inner.rows(prediction, target)

    def gradient(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.inner.gradient(prediction, target)

    def metric_rows(self, prediction: Tensor, target: Tensor) -> list[Tensor]:
        correct = (torch.argmax(prediction, 1) == torch.argmax(target, 1)).to(torch.float32)
        return [self.inner.metric_rows(prediction, target)[0], correct]


def loss_named(name: str) -> Loss:
    """The loss of that name, or `ConfigError` with the names there are."""
    known: tuple[Loss, ...] = (MeanSquaredError(), BinaryCrossEntropy(), CrossEntropy())
    for loss in known:
        if loss.name == name:
            return loss
    raise ConfigError(f"loss: {name!r} is unknown, expected one of {', '.join(loss.name for loss in known)}")
