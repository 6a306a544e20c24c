"""Training with a bound on every row: the Plan of each row's gradient, and the Plan of the optimizer's step.

Between the two stands what a device does itself: clip each row's gradient, add up, add noise (Abadi et al., "Deep
learning with differential privacy", CCS 2016, algorithm 1). `plan.gradients` says what goes in and out.

The gradients come from `vmap` over one row's backward pass, so each is the model's own on a batch of one row. Three
things are refused here, with the model's line, since a device would refuse the first and the others would train another
model than the one that is evaluated: rows that mix in the gradients, rows that mix in the model (statistics over the
batch), and a prediction that depends on the size of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import vmap

from sordino_common.errors import PlanError
from sordino_common.plan.gradients import row_gradients
from sordino_common.plan.separable import NotSeparable, require_separable
from sordino_common.plan.spec import TensorSpec
from sordino_server.trace.losses import Loss
from sordino_server.trace.optimizers import Optimizer
from sordino_server.trace.steps import formula_of, require_influence, require_trainable, stepped
from sordino_server.trace.subject import Subject, examples, mode, subject_of, vjp_of
from sordino_server.trace.tracing import TracedPlan, trace


def gradient_plan(model: nn.Module, *, loss: str | Loss, x: TensorSpec, y: TensorSpec, batch_rows: int) -> TracedPlan:
    """The gradient of each row's loss by every trainable parameter, and the loss: nothing clipped, nothing summed.

    x and y are the specs of one row. A class outside [0, C) counts as the nearest one: an error would tell of one row
    that it holds such a label, so labels are to be checked where the data is loaded. Raises `PlanError` for what a Plan
    can't express or `plan.gradients` would refuse, naming op, module and line.
    """
    formula = formula_of(loss)
    subject = subject_of(model)
    name = f"gradient {type(model).__name__} {formula.name}"
    chosen = require_trainable(subject, name)
    count = len(subject.names)

    def gradients(*tensors: Tensor) -> list[Tensor]:
        parameters, (x_batch, y_batch) = tensors[:count], tensors[count:]

        def of_row(x_row: Tensor, y_row: Tensor) -> tuple[list[Tensor], Tensor]:
            y_one = y_row.unsqueeze(0)

            def forward(trained: list[Tensor]) -> Tensor:
                return formula.agree(subject.predict(subject.bind(parameters, trained), x_row.unsqueeze(0)), y_one)

            prediction, pull_back = vjp_of(forward, [parameters[index] for index in subject.trainable])
            target = y_one if y_one.is_floating_point() else y_one.clamp(0, prediction.shape[-1] - 1)
            return pull_back(formula.gradient(prediction, target)), formula.rows(prediction, target).squeeze(0)

        # "different" lets a random op reach the op table, which refuses it with its line.
        per_row, losses = vmap(of_row, randomness="different")(x_batch, y_batch)
        return [*per_row, losses]

    x_batch, y_batch = examples(x, y, batch_rows)
    with mode(model, training=True):
        _require_rows_apart(subject, x, y, max(batch_rows, 2), name)
        traced = trace(
            gradients,
            [*subject.parameters, x_batch, y_batch],
            inputs=[*((label, "param") for label in subject.names), ("x", "x"), ("y", "y")],
            outputs=[*((label, "row-gradient") for label, _ in chosen), ("loss", "row")],
            name=name,
            model=model,
        )
    require_influence(traced, [label for label, _ in chosen])
    try:
        row_gradients(traced.plan)
    except NotSeparable as error:
        raise _located(error, traced, "compute with what rows have each for themselves") from None
    return traced


def _require_rows_apart(subject: Subject, x: TensorSpec, y: TensorSpec, rows: int, name: str) -> None:
    """Refuse a model whose prediction for a row depends on the rows beside it, or on how many there are."""
    count = len(subject.names)

    def predict(*tensors: Tensor) -> list[Tensor]:
        return [subject.predict(subject.bind(tensors[:count], ()), tensors[count])]

    x_batch, y_batch = examples(x, y, rows)
    traced = trace(
        predict,
        [*subject.parameters, x_batch, y_batch],
        inputs=[*((label, "param") for label in subject.names), ("x", "x"), ("y", "y")],
        outputs=[("prediction", "row")],
        name=name,
        model=subject.model,
    )
    remedy = "use nn.GroupNorm or nn.LayerNorm in the place of statistics over the batch"
    try:
        require_separable(traced.plan)
    except NotSeparable as error:
        raise _located(error, traced, remedy) from None
    with torch.no_grad():
        (together,) = predict(*subject.parameters, x_batch)
        alone = torch.cat([predict(*subject.parameters, x_batch[row : row + 1])[0] for row in range(rows)])
    if alone.shape != together.shape or not torch.allclose(alone, together, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise PlanError(
            f"{name}: the model's prediction for a row alone differs from that for the row in a batch of {rows}; with "
            f"privacy for each row it must not depend on the size of the batch"
        )


def _located(error: NotSeparable, traced: TracedPlan, remedy: str) -> PlanError:
    origin = "" if error.node is None else f"{traced.origins[error.node]}: "
    return PlanError(f"{traced.plan.name}: {origin}{error}; {remedy}")


def apply_plan(model: nn.Module, *, optimizer: Optimizer) -> TracedPlan:
    """One step of the optimizer on gradients that are handed in, of every trainable parameter."""
    subject = subject_of(model)
    name = f"apply {type(model).__name__}"
    chosen = require_trainable(subject, name)
    state = optimizer.state(chosen)
    count = len(subject.names)

    def step(*tensors: Tensor) -> list[Tensor]:
        parameters, states = tensors[:count], tensors[count : count + len(state)]
        return stepped(subject, optimizer, parameters, tensors[count + len(state) :], states)

    generator = torch.Generator().manual_seed(0)
    carried = [*((label, "param") for label in subject.names), *((label, "state") for label, _ in state)]
    return trace(
        step,
        [
            *subject.parameters,
            *(torch.zeros(shape) for _, shape in state),
            *(torch.randn(shape, generator=generator) for _, shape in chosen),
        ],
        inputs=[*carried, *((label, "gradient") for label, _ in chosen)],
        outputs=carried,
        name=name,
        model=model,
    )
