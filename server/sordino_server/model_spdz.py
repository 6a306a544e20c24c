"""A job's model on secret shares: its Plans, traced with polynomial activations, and their circuits.

    train     one optimizer step                        on shares
    score     loss and prediction of rows               on shares: held-out metrics where the model stays hidden
    predict   prediction of rows                        on shares: inference
    evaluate  loss and accuracy of rows                 in the clear, on the owners' devices

A refusal names the Plan's node and the model's line behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from sordino_common.errors import PlanError
from sordino_common.plan.spec import TensorSpec
from sordino_common.spdz.lowering import Lowered, LoweringError, Ranges, Settings, lower
from sordino_server.job import Job, JobSpec
from sordino_server.job_spdz import SERVER
from sordino_server.model import optimizer_of
from sordino_server.rounds.effects import Params
from sordino_server.trace.activations import Activations, fitted, polynomial_activations
from sordino_server.trace.losses import Loss, OneHot, PolynomialLogistic, loss_named
from sordino_server.trace.steps import evaluation_plan, prediction_plan, scoring_plan, training_plan
from sordino_server.trace.tracing import TracedPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedProgram:
    """A Plan and its circuit; every agent lowers the Plan under `settings` itself and compares `lowered.digest`."""

    traced: TracedPlan
    settings: Settings
    lowered: Lowered

    @property
    def plan(self) -> bytes:
        return self.traced.data

    @property
    def plan_id(self) -> bytes:
        return self.traced.plan_id

    def line(self, node: int) -> str:
        """The model's line behind a node of the Plan."""
        return self.traced.origins[node] if 0 <= node < len(self.traced.origins) else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedModel:
    """What a run on shares needs of the model. `params`: the first parameters, in the order of `names`.
    `activations`: which of the fits it uses. `train`: None for a job of 0 rounds, which only infers."""

    train: SharedProgram | None
    evaluate: TracedPlan
    evaluate_rows: int
    score: SharedProgram | None
    predict: SharedProgram | None
    fits: Activations
    activations: frozenset[str]
    params: Params
    names: tuple[str, ...]
    parameters: int

    @property
    def main(self) -> SharedProgram:
        """What the job is about: training, or else prediction."""
        program = self.train or self.predict
        assert program is not None  # `check_spdz` has seen to it
        return program


def loss_on_shares(spec: JobSpec) -> Loss:
    """The job's loss as secret shares compute it."""
    loss: Loss = loss_named(spec.loss)
    if spec.loss == "bce_with_logits":
        loss = PolynomialLogistic(fit=fits_of(spec).sigmoid)
    return OneHot(inner=loss) if spec.data.classes is not None else loss


def fits_of(spec: JobSpec) -> Activations:
    activation = spec.shares.activation
    return fitted(activation.degree, activation.interval)


def settings_of_job(spec: JobSpec) -> Settings:
    """What the lowering is told of the job."""
    spdz = spec.shares
    stated = spdz.ranges
    return Settings(
        fraction_bits=spdz.fraction_bits,
        interval=spdz.activation.interval,
        ranges=Ranges(
            x=stated.x,
            y=stated.y,
            params=stated.params,
            state=stated.state,
            values=Ranges().values if stated.values is None else stated.values,
            updates=stated.updates,
            preactivations=stated.preactivations,
        ),
    )


def trace_spdz(job: Job, model: nn.Module) -> SharedModel:
    """All Plans of the job and the circuits of those that run on shares. Raises `PlanError` naming module and line for
    what can't be traced or lowered."""
    spec = job.spec
    x = TensorSpec("float32", spec.data.x_shape)
    y = TensorSpec("float32", spec.data.y_shape)
    fits, loss, settings, spdz = fits_of(spec), loss_on_shares(spec), settings_of_job(spec), spec.shares
    evaluate_rows = spec.evaluate.batch_rows or spec.train.batch_rows
    with polynomial_activations(fits) as used:
        train = score = predict = None
        if spec.train.rounds:
            optimizer, rows = optimizer_of(spec), spec.train.batch_rows
            train = training_plan(model, loss=loss, optimizer=optimizer, x=x, y=y, batch_rows=rows)
        evaluate = evaluation_plan(model, loss=loss, x=x, y=y, batch_rows=evaluate_rows)
        if spdz.evaluates == "shares" and (train is not None or spdz.evaluate is not None):
            score = scoring_plan(model, loss=loss, x=x, y=y, batch_rows=evaluate_rows)
        if spdz.inference is not None:
            predict = prediction_plan(model, x=x, batch_rows=spdz.inference.batch_rows)
    state = model.state_dict()
    names = tuple(entry.name for entry in (train or predict or evaluate).plan.inputs if entry.role == "param")
    params = tuple(state[name].detach().cpu().numpy().copy() for name in names)
    for name, value in zip(names, params, strict=True):
        largest = float(abs(value).max()) if value.size else 0.0
        if largest > spdz.ranges.params and spdz.model_from == SERVER:
            raise job.error(
                "spdz", f"parameter {name} starts at {largest:.3g}, beyond spdz.ranges.params {spdz.ranges.params:g}"
            )
    return SharedModel(
        train=None if train is None else lowered_program(train, settings),
        evaluate=evaluate,
        evaluate_rows=evaluate_rows,
        score=None if score is None else lowered_program(score, settings),
        predict=None if predict is None else lowered_program(predict, settings),
        fits=fits,
        activations=frozenset(used),
        params=params,
        names=names,
        parameters=sum(value.size for value in params),
    )


def lowered_program(traced: TracedPlan, settings: Settings) -> SharedProgram:
    """The Plan's circuit; a refusal gets the model's line."""
    try:
        lowered = lower(traced.plan, plan_id=traced.plan_id, settings=settings)
    except LoweringError as error:
        line = traced.origins[error.node] if 0 <= error.node < len(traced.origins) else ""
        raise PlanError(f"{line}: {traced.plan.name}: {error}" if line else f"{traced.plan.name}: {error}") from None
    return SharedProgram(traced=traced, settings=settings, lowered=lowered)


def with_steps(program: SharedProgram, steps: int) -> SharedProgram:
    """The program for a run of more steps than the circuit has mask room for (`Lowered.max_steps`)."""
    if steps <= program.lowered.max_steps:
        return program
    return lowered_program(program.traced, replace(program.settings, steps=steps))


def steps_of(spec: JobSpec, rows: int) -> tuple[int, ...]:
    """How many steps each round has, given the fleet's train rows: `local_steps`, or `local_epochs` passes over all
    rows together; `train.max_steps` cuts the last."""
    train = spec.train
    done, rounds = 0, []
    for number in range(1, train.rounds + 1):
        if train.local_steps is not None:
            target = number * train.local_steps
        else:
            assert train.local_epochs is not None
            target = max(number, round(number * train.local_epochs * rows / train.batch_rows))
        if train.max_steps is not None:
            target = min(target, train.max_steps)
        if target > done:
            rounds.append(target - done)
        done = target
    return tuple(rounds)
