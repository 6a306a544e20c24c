"""What a device computes: local training, sums over held-out rows, column moments, a Plan on stored tensors.

Pure functions from arrays to arrays. `check` is called between the Plan's nodes and may raise to stop the work.
Legend: R rows, B rows of a batch, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sordino_agent.data.table import Rows, Table
from sordino_agent.errors import BadCommand, Diverged
from sordino_common.errors import PolicyRefusal
from sordino_common.messages import Array, MomentsResult
from sordino_common.plan.arrays import from_numpy, to_numpy
from sordino_common.plan.executors import Program
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import Plan

Values = NDArray[Any]
Check = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where a training or evaluation Plan takes and gives what: indices into its inputs and outputs.

    `carry` pairs an output with the input that takes it in the next step: parameters, then optimizer state."""

    params: tuple[int, ...]
    states: tuple[int, ...]
    x: int
    y: int | None
    carry: tuple[tuple[int, int], ...]
    loss: int | None
    rows: tuple[int, ...]


def training_layout(plan: Plan) -> Layout:
    """Raises `BadCommand` unless `plan` is a training step: every parameter and state comes back in its own dtype and
    shape, float parameters, one scalar loss, one x and one y with the same batch."""
    layout = _inputs_layout(plan)
    if layout.y is None:
        raise BadCommand(f"Plan {plan.name!r}: a training step takes a target (role y)")
    specs = plan.specs()
    places = {(output.role, output.name): index for index, output in enumerate(plan.outputs)}
    carry = []
    for index in (*layout.params, *layout.states):
        entry = plan.inputs[index]
        place = places.pop((entry.role, entry.name), None)
        if place is None:
            raise BadCommand(
                f"Plan {plan.name!r}: a training step gives back every {entry.role}; {entry.name!r} is missing"
            )
        given = specs[plan.outputs[place].value]
        if given != entry.spec:
            raise BadCommand(
                f"Plan {plan.name!r}: {entry.role} {entry.name!r} goes in as {entry.spec}, comes out as {given}"
            )
        carry.append((place, index))
    for index in layout.params:
        if not plan.inputs[index].spec.dtype.startswith("float"):
            raise BadCommand(f"Plan {plan.name!r}: parameter {plan.inputs[index].name!r} is not of floats")
    losses = [index for (role, _), index in places.items() if role == "loss"]
    if len(losses) != 1 or len(places) != 1 or specs[plan.outputs[losses[0]].value].shape != ():
        raise BadCommand(f"Plan {plan.name!r}: besides parameters and state a training step gives one scalar loss")
    return Layout(
        params=layout.params, states=layout.states, x=layout.x, y=layout.y, carry=tuple(carry), loss=losses[0], rows=()
    )


def evaluation_layout(plan: Plan) -> Layout:
    """Raises `BadCommand` unless `plan` is an evaluation: parameters, x and maybe y in; per-row outputs [B] only."""
    layout = _inputs_layout(plan)
    batch = plan.inputs[layout.x].spec.shape[0]
    specs = plan.specs()
    if layout.states or any(output.role != "row" or specs[output.value].shape != (batch,) for output in plan.outputs):
        raise BadCommand(
            f"Plan {plan.name!r}: an evaluation keeps no state and gives outputs of role row, shape [{batch}]"
        )
    return Layout(
        params=layout.params,
        states=(),
        x=layout.x,
        y=layout.y,
        carry=(),
        loss=None,
        rows=tuple(range(len(plan.outputs))),
    )


def _inputs_layout(plan: Plan) -> Layout:
    places: dict[str, list[int]] = {role: [] for role in ("param", "state", "x", "y", "value")}
    for index, entry in enumerate(plan.inputs):
        places[entry.role].append(index)
    if len(places["x"]) != 1 or len(places["y"]) > 1 or places["value"]:
        raise BadCommand(
            f"Plan {plan.name!r}: one input of role x, at most one of role y and none of role value is expected"
        )
    batches = {plan.inputs[index].spec.shape[:1] for index in (*places["x"], *places["y"])}
    if len(batches) != 1 or batches == {()}:
        raise BadCommand(f"Plan {plan.name!r}: x and y must have the same first dimension, the batch")
    return Layout(
        params=tuple(places["param"]),
        states=tuple(places["state"]),
        x=places["x"][0],
        y=places["y"][0] if places["y"] else None,
        carry=(),
        loss=None,
        rows=(),
    )


def check_params(plan: Plan, layout: Layout, params: Sequence[Array]) -> None:
    """Raises `BadCommand`, naming the parameter, unless `params` fit the Plan's inputs of role param in order."""
    if len(params) != len(layout.params):
        raise BadCommand(f"Plan {plan.name!r} takes {len(layout.params)} parameters, the command has {len(params)}")
    for index, array in zip(layout.params, params, strict=True):
        check_spec(plan, index, array)


def check_spec(plan: Plan, index: int, array: Array) -> None:
    """Raises `BadCommand` unless `array` fits input `index`; uint8 fits bool (arrays have no bool)."""
    entry = plan.inputs[index]
    dtype = "uint8" if entry.spec.dtype == "bool" else entry.spec.dtype
    if (array.dtype, array.shape) != (dtype, entry.spec.shape):
        raise BadCommand(
            f"Plan {plan.name!r}: input {entry.name!r} is {entry.spec}, not {array.dtype}{list(array.shape)}"
        )


def train(
    plan: Plan,
    program: Program,
    layout: Layout,
    *,
    x: Values,
    y: Values,
    params: Sequence[Array],
    batches: Iterator[Rows],
    steps: int,
    check: Check | None = None,
) -> tuple[tuple[Array, ...], float]:
    """(params after minus params before, sum of the loss) of `steps` steps; optimizer state starts at zero.

    Raises `Diverged` as soon as the loss, or at the end the update, is NaN or infinite."""
    assert layout.y is not None
    assert layout.loss is not None
    start = [to_numpy(array) for array in params]
    feeds: list[Values] = [np.empty(0)] * len(plan.inputs)
    for index, value in zip(layout.params, start, strict=True):
        feeds[index] = value
    for index in layout.states:
        feeds[index] = _zeros(plan.inputs[index].spec)
    loss_sum = 0.0
    with np.errstate(all="ignore"):  # NaN and infinity are looked for below
        for step in range(steps):
            rows = next(batches)
            feeds[layout.x] = x[rows]
            feeds[layout.y] = y[rows]
            outs = program.run(feeds, check=check, quiet=True)
            for output, index in layout.carry:
                feeds[index] = outs[output]
            loss = float(outs[layout.loss])
            if loss - loss != 0.0:
                raise Diverged(
                    f"the loss is {loss} at local step {step + 1} of {steps}; a smaller learning rate may help"
                )
            loss_sum += loss
        update = [feeds[index] - before for index, before in zip(layout.params, start, strict=True)]
    for index, value in zip(layout.params, update, strict=True):
        if not np.isfinite(value).all():
            name = plan.inputs[index].name
            raise Diverged(
                f"the update of {name!r} is NaN or infinite after {steps} local steps; try a smaller learning rate"
            )
    return tuple(from_numpy(value) for value in update), loss_sum


def evaluate(
    plan: Plan,
    program: Program,
    layout: Layout,
    *,
    x: Values,
    y: Values | None,
    params: Sequence[Array],
    check: Check | None = None,
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """(names, float64 sums over all R rows) of the row outputs. The last batch is filled up with its own last row,
    whose outputs are not counted."""
    batch = plan.inputs[layout.x].spec.shape[0]
    count = len(x)
    feeds: list[Values] = [np.empty(0)] * len(plan.inputs)
    for index, array in zip(layout.params, params, strict=True):
        feeds[index] = to_numpy(array)
    sums = np.zeros(len(layout.rows), dtype=np.float64)
    with np.errstate(all="ignore"):
        for begin in range(0, count, batch):
            rows = np.minimum(np.arange(begin, begin + batch), count - 1)
            feeds[layout.x] = x[rows]
            if layout.y is not None and y is not None:
                feeds[layout.y] = y[rows]
            outs = program.run(feeds, check=check, quiet=True)
            filled = min(batch, count - begin)
            sums += [outs[index][:filled].sum(dtype=np.float64) for index in layout.rows]
    if not np.isfinite(sums).all():
        raise Diverged("a sum over the rows is NaN or infinite; the model's parameters have diverged")
    return tuple(plan.outputs[index].name for index in layout.rows), tuple(float(value) for value in sums)


def moments(table: Table, columns: Sequence[str]) -> MomentsResult:
    """Rows, Σ v and Σ v² (float64) over all elements of the train rows, a pair per column.

    Raises `Diverged` if they overflow."""
    sums = np.empty(len(columns), dtype=np.float64)
    squares = np.empty(len(columns), dtype=np.float64)
    with np.errstate(all="ignore"):
        for place, name in enumerate(columns):
            values = table.column(name)[table.train].astype(np.float64)
            sums[place] = values.sum()
            squares[place] = np.square(values).sum()
    if not (np.isfinite(sums).all() and np.isfinite(squares).all()):
        raise Diverged(f"dataset {table.name!r}: a sum over a column is too large for float64")
    return MomentsResult(rows=len(table.train), sums=from_numpy(sums), squares=from_numpy(squares))


def run_plan(plan: Plan, program: Program, inputs: Sequence[Array], *, check: Check | None = None) -> tuple[Array, ...]:
    """The Plan's outputs on stored tensors. Raises `BadCommand` if they do not fit its inputs."""
    if len(inputs) != len(plan.inputs):
        raise BadCommand(f"Plan {plan.name!r} takes {len(plan.inputs)} tensors, the command names {len(inputs)}")
    feeds = []
    for index, array in enumerate(inputs):
        check_spec(plan, index, array)
        value = to_numpy(array)
        feeds.append(value != 0 if plan.inputs[index].spec.dtype == "bool" else value)
    with np.errstate(all="ignore"):
        outs = program.run(feeds, check=check, quiet=True)
    return tuple(from_numpy(np.asarray(value)) for value in outs)


def as_dtype(values: Values, dtype: str, dataset: str) -> Values:
    """The values as numbers of `dtype`, contiguous. Raises `BadCommand` where integers would be lost."""
    with np.errstate(all="ignore"):
        cast = np.ascontiguousarray(values, dtype=dtype)
    if cast.dtype.kind == "i" and not np.array_equal(cast, values):
        raise BadCommand(f"dataset {dataset!r}: not all of these values are integers; load them as float32")
    return cast


def require_rows(rows: int, minimum: int, *, dataset: str, what: str) -> None:
    """Raises `PolicyRefusal` if an answer would be formed over fewer rows than the device's policy wants."""
    if rows < minimum:
        raise PolicyRefusal(f"dataset {dataset!r}: {what} over {rows} rows; policy.min_rows on the device is {minimum}")


def _zeros(spec: TensorSpec) -> Values:
    return np.zeros(spec.shape, dtype=spec.dtype)
