"""From a model to the Plans of a job: a training step, the evaluation of a batch, a prediction.

    training     inputs  param*P, state*S, x, y        outputs  param*P, state*S, loss
    evaluation   inputs  param*P, x, y                 outputs  row: loss [B], and correct [B] for classifiers
    scoring      inputs  param*P, x, y                 outputs  row: loss [B], prediction [B, ...]   (on secret shares)
    prediction   inputs  param*P, x                    outputs  row: prediction [B, ...]

P is every parameter of the model by its name in `state_dict`, in the order of `named_parameters` (a tied parameter
once, under its first name); a parameter with `requires_grad=False` passes through unchanged. Optimizer state begins at
zero, on the device. With privacy for each row a training step is two Plans: see `row_gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sordino_common.errors import PlanError
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import refs
from sordino_server.trace.losses import Loss, loss_named
from sordino_server.trace.optimizers import Optimizer
from sordino_server.trace.subject import Subject, example, examples, mode, subject_of, vjp_of
from sordino_server.trace.tracing import TracedPlan, trace


def require_trainable(subject: Subject, name: str) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the trainable parameters; `PlanError` if there are none."""
    if not subject.trainable:
        raise PlanError(f"{name}: no parameter has requires_grad=True, so there is nothing to train")
    return [(subject.names[index], tuple(subject.parameters[index].shape)) for index in subject.trainable]


def stepped(
    subject: Subject,
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor],
    states: Sequence[Tensor],
) -> list[Tensor]:
    """All parameters and then the state after one step of the optimizer along the trainable ones' gradients."""
    trained, new_states = optimizer.step([parameters[index] for index in subject.trainable], direction, states)
    updated = list(parameters)
    for index, parameter in zip(subject.trainable, trained, strict=True):
        updated[index] = parameter
    return [*updated, *new_states]


def require_influence(traced: TracedPlan, trainable: Sequence[str]) -> None:
    """Refuse a parameter without influence on the loss: `torch.optim` leaves it alone, weight decay here would not."""
    plan = traced.plan
    needed = {output.value for output in plan.outputs if output.role in ("loss", "row")}
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


def formula_of(loss: str | Loss) -> Loss:
    """A loss by its name, or as it is."""
    return loss_named(loss) if isinstance(loss, str) else loss


def training_plan(
    model: nn.Module, *, loss: str | Loss, optimizer: Optimizer, x: TensorSpec, y: TensorSpec, batch_rows: int
) -> TracedPlan:
    """One optimizer step on the mean loss of `batch_rows` rows; x and y are the specs of one row.

    Raises `PlanError` for what a Plan can't express, naming aten op, module and line.
    """
    formula = formula_of(loss)
    subject = subject_of(model)
    name = f"train {type(model).__name__} {formula.name}"
    chosen = require_trainable(subject, name)
    state = optimizer.state(chosen)
    count = len(subject.names)

    def step(*tensors: Tensor) -> list[Tensor]:
        parameters, states, (x_batch, y_batch) = tensors[:count], tensors[count:-2], tensors[-2:]

        def forward(trained: list[Tensor]) -> Tensor:
            return formula.agree(subject.predict(subject.bind(parameters, trained), x_batch), y_batch)

        prediction, pull_back = vjp_of(forward, [parameters[index] for index in subject.trainable])
        direction = pull_back(formula.gradient(prediction, y_batch) * (1.0 / batch_rows))
        mean_loss = _mean(formula.rows(prediction, y_batch))
        return [*stepped(subject, optimizer, parameters, direction, states), mean_loss]

    x_batch, y_batch = examples(x, y, batch_rows)
    carried = [*((parameter, "param") for parameter in subject.names), *((label, "state") for label, _ in state)]
    with mode(model, training=True):
        traced = trace(
            step,
            [*subject.parameters, *(torch.zeros(shape) for _, shape in state), x_batch, y_batch],
            inputs=[*carried, ("x", "x"), ("y", "y")],
            outputs=[*carried, ("loss", "loss")],
            name=name,
            model=model,
        )
    require_influence(traced, [label for label, _ in chosen])
    return traced


def evaluation_plan(model: nn.Module, *, loss: str | Loss, x: TensorSpec, y: TensorSpec, batch_rows: int) -> TracedPlan:
    """Loss and other metrics of each row, the model in eval mode: outputs of role "row", float32 [batch_rows]."""
    formula = formula_of(loss)

    def metrics(prediction: Tensor, y_batch: Tensor) -> list[Tensor]:
        return formula.metric_rows(prediction, y_batch)

    name = f"evaluate {type(model).__name__} {formula.name}"
    return _row_plan(model, formula, metrics, formula.metrics, name=name, x=x, y=y, batch_rows=batch_rows)


def scoring_plan(model: nn.Module, *, loss: str | Loss, x: TensorSpec, y: TensorSpec, batch_rows: int) -> TracedPlan:
    """The training loss and the prediction of each row, the model in eval mode: what secret shares can say of rows."""
    formula = formula_of(loss)

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
    subject = subject_of(model)
    count = len(subject.names)

    def evaluate(*tensors: Tensor) -> list[Tensor]:
        parameters, (x_batch, y_batch) = tensors[:count], tensors[count:]
        prediction = formula.agree(subject.predict(subject.bind(parameters, ()), x_batch), y_batch)
        return of_rows(prediction, y_batch)

    x_batch, y_batch = examples(x, y, batch_rows)
    with mode(model, training=False):
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
    subject = subject_of(model)
    count = len(subject.names)

    def predict(*tensors: Tensor) -> list[Tensor]:
        return [subject.predict(subject.bind(tensors[:count], ()), tensors[count])]

    generator = torch.Generator().manual_seed(0)
    with mode(model, training=False):
        return trace(
            predict,
            [*subject.parameters, example("x", x, batch_rows, generator)],
            inputs=[*((name, "param") for name in subject.names), ("x", "x")],
            outputs=[("prediction", "row")],
            name=f"predict {type(model).__name__}",
            model=model,
        )


def _mean(rows: Tensor) -> Tensor:
    return rows.sum() * (1.0 / rows.shape[0])
