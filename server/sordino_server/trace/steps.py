"""From a model to the Plans of a job: a training step, its DP-SGD form, and the evaluation of a batch.

    training     inputs  param*P, state*S, x, y        outputs  param*P, state*S, loss
    evaluation   inputs  param*P, x, y                 outputs  row: loss [B], and correct [B] for classifiers
    scoring      inputs  param*P, x, y                 outputs  row: loss [B], prediction [B, ...]   (on secret shares)
    prediction   inputs  param*P, x                    outputs  row: prediction [B, ...]

P is every parameter of the model by its name in `state_dict`, in the order of `named_parameters` (a tied parameter
once, under its first name); a parameter with `requires_grad=False` passes through unchanged. Optimizer state begins at
zero, on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from sordino_common.errors import ConfigError, PlanError
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import refs
from sordino_server.trace.capture import buffers_of
from sordino_server.trace.losses import Loss, loss_named
from sordino_server.trace.optimizers import Optimizer
from sordino_server.trace.tracing import TracedPlan, trace

_DTYPES = {"float32": torch.float32, "int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8}
# Norms count as at least this share of the clip norm C: min(1, C / norm) is 1 there anyway, and C / 0 never arises.
_TINY_NORM = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
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
        result = functional_call(self.model, {**values, **self.buffers}, (x,), tie_weights=True)
        if not isinstance(result, Tensor):
            raise PlanError(
                f"model {type(self.model).__name__}: forward returns {type(result).__name__}, expected one tensor; "
                f"wrap the model in a module that returns the prediction alone"
            )
        return result


def _subject(model: nn.Module) -> _Subject:
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
    return _Subject(
        model=model,
        names=tuple(name for name, _ in named),
        parameters=tuple(parameter.detach() for _, parameter in named),
        trainable=tuple(index for index, (_, parameter) in enumerate(named) if parameter.requires_grad),
        buffers=buffers_of(model),
    )


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in train or eval mode, and afterwards every module as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def _example(name: str, spec: TensorSpec, batch_rows: int, generator: torch.Generator) -> Tensor:
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


def _examples(x: TensorSpec, y: TensorSpec, batch_rows: int) -> tuple[Tensor, Tensor]:
    if batch_rows < 1:
        raise ConfigError(f"batch_rows is {batch_rows}, expected at least 1")
    generator = torch.Generator().manual_seed(0)
    return _example("x", x, batch_rows, generator), _example("y", y, batch_rows, generator)


Gradients = Callable[[Sequence[Tensor], Tensor, Tensor], tuple[list[Tensor], Tensor]]


def _step_plan(
    subject: _Subject,
    gradients: Gradients,
    *,
    name: str,
    optimizer: Optimizer,
    x: TensorSpec,
    y: TensorSpec,
    batch_rows: int,
) -> TracedPlan:
    """Trace: (gradients, mean loss) of the batch, then one step of the optimizer."""
    if not subject.trainable:
        raise PlanError(f"{name}: no parameter has requires_grad=True, so there is nothing to train")
    chosen = [(subject.names[index], tuple(subject.parameters[index].shape)) for index in subject.trainable]
    state = optimizer.state(chosen)
    count = len(subject.names)

    def step(*tensors: Tensor) -> list[Tensor]:
        parameters, states, (x_batch, y_batch) = tensors[:count], tensors[count:-2], tensors[-2:]
        direction, loss = gradients(parameters, x_batch, y_batch)
        trained, new_states = optimizer.step([parameters[index] for index in subject.trainable], direction, states)
        updated = list(parameters)
        for index, parameter in zip(subject.trainable, trained, strict=True):
            updated[index] = parameter
        return [*updated, *new_states, loss]

    x_batch, y_batch = _examples(x, y, batch_rows)
    params = [(parameter, "param") for parameter in subject.names]
    states = [(state_name, "state") for state_name, _ in state]
    with _mode(subject.model, training=True):
        traced = trace(
            step,
            [*subject.parameters, *(torch.zeros(shape) for _, shape in state), x_batch, y_batch],
            inputs=[*params, *states, ("x", "x"), ("y", "y")],
            outputs=[*params, *states, ("loss", "loss")],
            name=name,
            model=subject.model,
        )
    _require_influence(traced, [name for name, _ in chosen])
    return traced


def _require_influence(traced: TracedPlan, trainable: Sequence[str]) -> None:
    """Refuse a parameter without influence on the loss: `torch.optim` leaves it alone, weight decay here would not."""
    plan = traced.plan
    needed = {output.value for output in plan.outputs if output.role == "loss"}
    value = len(plan.specs())
    for node in reversed(plan.nodes):
        results = range(value - len(node.outs), value)
        value -= len(node.outs)
        if needed.intersection(results):
            needed.update(used for arg in node.args for used in refs(arg))
    unused = [entry.name for index, entry in enumerate(plan.inputs) if entry.role == "param" and index not in needed]
    for name in trainable:
        if name in unused:
            raise PlanError(
                f"{plan.name}: the loss does not depend on parameter {name!r}; remove it or set requires_grad=False "
                f"on it"
            )


def _formula(loss: str | Loss) -> Loss:
    return loss_named(loss) if isinstance(loss, str) else loss


def training_plan(
    model: nn.Module, *, loss: str | Loss, optimizer: Optimizer, x: TensorSpec, y: TensorSpec, batch_rows: int
) -> TracedPlan:
    """One optimizer step on the mean loss of `batch_rows` rows; x and y are the specs of one row.

    Raises `PlanError` for what a Plan can't express, naming aten op, module and line.
    """
    formula = _formula(loss)
    subject = _subject(model)

    def gradients(parameters: Sequence[Tensor], x_batch: Tensor, y_batch: Tensor) -> tuple[list[Tensor], Tensor]:
        def forward(trained: list[Tensor]) -> Tensor:
            return formula.agree(subject.predict(subject.bind(parameters, trained), x_batch), y_batch)

        prediction, pull_back = _vjp(forward, [parameters[index] for index in subject.trainable])
        direction = pull_back(formula.gradient(prediction, y_batch) * (1.0 / batch_rows))
        return direction, _mean(formula.rows(prediction, y_batch))

    name = f"train {type(model).__name__} {formula.name}"
    return _step_plan(subject, gradients, name=name, optimizer=optimizer, x=x, y=y, batch_rows=batch_rows)


def dp_training_plan(
    model: nn.Module,
    *,
    loss: str,
    optimizer: Optimizer,
    x: TensorSpec,
    y: TensorSpec,
    batch_rows: int,
    clip_norm: float,
) -> TracedPlan:
    """One optimizer step on the mean over rows of g_b min(1, C / |g_b|): DP-SGD (Abadi et al., CCS 2016, algorithm 1)
    before noise.

    g_b is the gradient of row b's loss over all trainable parameters together, |.| its Euclidean norm, C = `clip_norm`.
    No noise is added here, so on its own this gives no privacy. Otherwise as `training_plan`.
    """
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ConfigError(f"clip_norm is {clip_norm}, expected a number above 0")
    formula = loss_named(loss)
    subject = _subject(model)

    def gradients(parameters: Sequence[Tensor], x_batch: Tensor, y_batch: Tensor) -> tuple[list[Tensor], Tensor]:
        def of_row(x_row: Tensor, y_row: Tensor) -> tuple[list[Tensor], Tensor]:
            def forward(trained: list[Tensor]) -> Tensor:
                prediction = subject.predict(subject.bind(parameters, trained), x_row.unsqueeze(0))
                return formula.agree(prediction, y_row.unsqueeze(0))

            prediction, pull_back = _vjp(forward, [parameters[index] for index in subject.trainable])
            direction = pull_back(formula.gradient(prediction, y_row.unsqueeze(0)))
            return direction, formula.rows(prediction, y_row.unsqueeze(0)).squeeze(0)

        # "different" lets a random op reach the op table, which refuses it with its line.
        per_row, losses = vmap(of_row, randomness="different")(x_batch, y_batch)
        flat = [g.reshape(batch_rows, -1) for g in per_row]
        squares = (flat[0] * flat[0]).sum(1)
        for g_flat in flat[1:]:
            squares = squares + (g_flat * g_flat).sum(1)
        norms = torch.clamp(torch.sqrt(squares), min=clip_norm * _TINY_NORM)
        factors = torch.clamp(clip_norm / norms, max=1.0) * (1.0 / batch_rows)
        # A row vector times a matrix clips and sums in one pass, with no second copy of the gradients.
        clipped = [
            torch.mm(factors.unsqueeze(0), g_flat).view(g.shape[1:]) for g_flat, g in zip(flat, per_row, strict=True)
        ]
        return clipped, _mean(losses)

    name = f"dp-train {type(model).__name__} {loss}"
    return _step_plan(subject, gradients, name=name, optimizer=optimizer, x=x, y=y, batch_rows=batch_rows)


def evaluation_plan(model: nn.Module, *, loss: str | Loss, x: TensorSpec, y: TensorSpec, batch_rows: int) -> TracedPlan:
    """Loss and other metrics of each row, the model in eval mode: outputs of role "row", float32 [batch_rows]."""
    formula = _formula(loss)

    def metrics(prediction: Tensor, y_batch: Tensor) -> list[Tensor]:
        return formula.metric_rows(prediction, y_batch)

    name = f"evaluate {type(model).__name__} {formula.name}"
    return _row_plan(model, formula, metrics, formula.metrics, name=name, x=x, y=y, batch_rows=batch_rows)


def scoring_plan(model: nn.Module, *, loss: str | Loss, x: TensorSpec, y: TensorSpec, batch_rows: int) -> TracedPlan:
    """The training loss and the prediction of each row, the model in eval mode: what secret shares can say of rows."""
    formula = _formula(loss)

    def scores(prediction: Tensor, y_batch: Tensor) -> list[Tensor]:
        return [formula.rows(prediction, y_batch), prediction]

    name = f"score {type(model).__name__} {formula.name}"
    return _row_plan(model, formula, scores, ("loss", "prediction"), name=name, x=x, y=y, batch_rows=batch_rows)


def _row_plan(
    model: nn.Module,
    formula: Loss,
    of_rows: Callable[[Tensor, Tensor], list[Tensor]],
    outputs: Sequence[str],
    *,
    name: str,
    x: TensorSpec,
    y: TensorSpec,
    batch_rows: int,
) -> TracedPlan:
    subject = _subject(model)
    count = len(subject.names)

    def evaluate(*tensors: Tensor) -> list[Tensor]:
        parameters, (x_batch, y_batch) = tensors[:count], tensors[count:]
        prediction = formula.agree(subject.predict(subject.bind(parameters, ()), x_batch), y_batch)
        return of_rows(prediction, y_batch)

    x_batch, y_batch = _examples(x, y, batch_rows)
    with _mode(model, training=False):
        return trace(
            evaluate,
            [*subject.parameters, x_batch, y_batch],
            inputs=[*((name, "param") for name in subject.names), ("x", "x"), ("y", "y")],
            outputs=[(output, "row") for output in outputs],
            name=name,
            model=model,
        )


def prediction_plan(model: nn.Module, *, x: TensorSpec, batch_rows: int) -> TracedPlan:
    """The model's result for each row, in eval mode."""
    subject = _subject(model)
    count = len(subject.names)

    def predict(*tensors: Tensor) -> list[Tensor]:
        return [subject.predict(subject.bind(tensors[:count], ()), tensors[count])]

    generator = torch.Generator().manual_seed(0)
    with _mode(model, training=False):
        return trace(
            predict,
            [*subject.parameters, _example("x", x, batch_rows, generator)],
            inputs=[*((name, "param") for name in subject.names), ("x", "x")],
            outputs=[("prediction", "row")],
            name=f"predict {type(model).__name__}",
            model=model,
        )


def _vjp(
    forward: Callable[[list[Tensor]], Tensor], trained: list[Tensor]
) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """The prediction, and what turns a derivative by the prediction into derivatives by `trained`."""
    result: Any = vjp(forward, trained)  # of two or three parts, depending on an option that is not used here
    prediction, pull_back = result
    return prediction, lambda cotangent: pull_back(cotangent)[0]


def _mean(rows: Tensor) -> Tensor:
    return rows.sum() * (1.0 / rows.shape[0])
