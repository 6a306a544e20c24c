"""What plain PyTorch reaches: same model and first parameters, same rows pooled, same epochs, batch size and optimizer.

Nothing of Plans, rounds or the wire is in here on purpose: this is what the user would have written without us.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sordino_common.spdz.spec import Schedule
from sordino_server.job import Job, JobSpec, SgdSpec
from sordino_server.model import make_model
from sordino_server.model_spdz import fits_of, loss_on_shares
from sordino_server.public_data import Table, load_public, split_rows
from sordino_server.rounds.effects import Scaling
from sordino_server.rounds.fedavg import test_metrics
from sordino_server.rounds.scaling import given_scaling
from sordino_server.trace.activations import polynomial_activations

_BREATH_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """All agents' train rows and all their held-out rows, each in one table."""

    train: Table
    test: Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """`metrics` after the last epoch; `curve[r]` after the epochs of r + 1 rounds. `seconds`: training and the last
    evaluation, without those in between."""

    metrics: Mapping[str, float]
    curve: tuple[Mapping[str, float], ...]
    epochs: float
    seconds: float


def public_pool(job: Job) -> Pooled | None:
    """The job's public data, split as the simulator splits it; None if the job names none."""
    simulation = job.spec.simulation
    if simulation.data is None:
        return None
    table = load_public(simulation.data)
    seed = job.spec.train.seed if simulation.seed is None else simulation.seed
    train, test = split_rows(table.rows, simulation.test_fraction, seed)
    return Pooled(train=table.take(train), test=table.take(test))


class _Training:
    """The seconds of what is measured. Between steps the caller may see to other things, off the clock: a connection
    that is left alone for longer than its keep-alive is ended by the broker, and a service by its watchdog."""

    def __init__(self, stopwatch: Callable[[], float], breathe: Callable[[], None]) -> None:
        self._stopwatch = stopwatch
        self._breathe = breathe
        self._began_s = self._breathed_s = stopwatch()

    def begin(self) -> None:
        self._began_s = self._stopwatch()

    def end(self) -> float:
        """Since `begin`, without what was given to others."""
        now_s = self._stopwatch()
        taken, self._began_s = now_s - self._began_s, now_s
        return taken

    def step(self) -> None:
        """A step is done."""
        now_s = self._stopwatch()
        if now_s - self._breathed_s >= _BREATH_S:
            self._breathe()
            self._breathed_s = self._stopwatch()
            self._began_s += self._breathed_s - now_s


def run_baseline(
    job: Job,
    pooled: Pooled,
    *,
    agents: int,
    rounds: int | None = None,
    stopwatch: Callable[[], float] = time.perf_counter,
    breathe: Callable[[], None] = lambda: None,
) -> Baseline:
    """Train on the pooled rows. `agents` turns local steps into epochs; `rounds`: how many were trained in the end.
    `breathe`: called now and then between steps.

    On one thread: models of this size gain nothing from more, and on a machine that is busy otherwise torch's threads
    wait for one another (the small CNN took 7 times as long on two threads beside one other process)."""
    with _one_thread():
        return _train(job, pooled, agents=agents, rounds=rounds, timing=_Training(stopwatch, breathe))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(job: Job, pooled: Pooled, *, agents: int, rounds: int | None, timing: _Training) -> Baseline:
    spec = job.spec
    rounds = spec.train.rounds if rounds is None else rounds
    scaling = pooled_scaling(spec, pooled.train)
    x, y = _tensors(spec, scaling, pooled.train)
    test_x, test_y = _tensors(spec, scaling, pooled.test)
    model = make_model(job)
    optimizer = _optimizer(spec, model)
    loss = _LOSSES[spec.loss]()
    batch, per_round = _pace(spec, len(x), agents)
    generator = torch.Generator().manual_seed(spec.train.seed)
    curve: list[Mapping[str, float]] = []
    steps = 0
    order = torch.empty(0, dtype=torch.int64)
    seconds = last_s = 0.0
    for number in range(1, rounds + 1):
        timing.begin()
        model.train()
        for _ in range(max(1, round(number * per_round * len(x) / batch)) - steps):
            if len(order) == 0:
                order = torch.randperm(len(x), generator=generator)
            rows, order = order[:batch], order[batch:]
            optimizer.zero_grad()
            loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
            steps += 1
            timing.step()
        seconds += timing.end()
        curve.append(_evaluate(spec, model, scaling, test_x, test_y))
        last_s = timing.end()
    return Baseline(metrics=curve[-1], curve=tuple(curve), epochs=rounds * per_round, seconds=seconds + last_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Owned:
    """Each owner's train rows, in the order of the schedule, and all held-out rows."""

    train: tuple[tuple[str, Table], ...]
    test: Table

    @property
    def pooled(self) -> Table:
        """All train rows in one table."""
        tables = [table for _, table in self.train]
        columns = {name: np.concatenate([table.columns[name] for table in tables]) for name in tables[0].columns}
        return Table(name=tables[0].name, columns=columns)


def run_shares_baseline(
    job: Job,
    owned: Owned,
    *,
    schedule: Schedule,
    steps: Sequence[int],
    stopwatch: Callable[[], float] = time.perf_counter,
    breathe: Callable[[], None] = lambda: None,
) -> Baseline:
    """What plain PyTorch reaches where the job runs on secret shares: the same polynomial activations and loss, first
    parameters, rows and their order (`schedule`); `steps[r]` optimizer steps in round r. Floats in place of fixed
    point are the only difference. One thread, as `run_baseline`."""
    spec = job.spec
    with _one_thread(), polynomial_activations(fits_of(spec)):
        scaling = pooled_scaling(spec, owned.pooled)
        rows = {name: _tensors(spec, scaling, table) for name, table in owned.train}
        test_x, test_y = _tensors(spec, scaling, owned.test)
        model, formula = make_model(job), loss_on_shares(spec)
        optimizer = _optimizer(spec, model)
        curve: list[Mapping[str, float]] = []
        done, seconds, last_s = 0, 0.0, 0.0
        timing = _Training(stopwatch, breathe)
        for count in steps:
            batches = [_batch(rows, schedule, number) for number in range(done, done + count)]
            timing.begin()
            model.train()
            for x, y in batches:
                optimizer.zero_grad()
                torch.autograd.backward(formula.rows(formula.agree(model(x), y), y).mean())
                optimizer.step()
                timing.step()
            done += count
            seconds += timing.end()
            curve.append(_evaluate(spec, model, scaling, test_x, test_y))
            last_s = timing.end()
    epochs = done * schedule.batch_rows / schedule.total
    return Baseline(metrics=curve[-1], curve=tuple(curve), epochs=epochs, seconds=seconds + last_s)


def _batch(
    rows: Mapping[str, tuple[torch.Tensor, torch.Tensor]], schedule: Schedule, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of a step, every owner's rows at their places."""
    x = y = torch.empty(0)
    for part in schedule.step(number):
        own_x, own_y = rows[part.owner]
        if not len(x):
            x = own_x.new_zeros((schedule.batch_rows, *own_x.shape[1:]))
            y = own_y.new_zeros((schedule.batch_rows, *own_y.shape[1:]))
        places, taken = torch.from_numpy(part.positions.copy()), torch.from_numpy(part.rows.copy())
        x[places], y[places] = own_x[taken], own_y[taken]
    return x, y


def pooled_scaling(spec: JobSpec, train: Table) -> Scaling:
    """As the fleet's (`rounds/scaling.py`), computed on the pooled rows."""
    data, stated = spec.data, given_scaling(spec.data)

    def moments(name: str) -> tuple[float, float]:
        column = train.columns[name].astype(np.float64)
        deviation = float(column.std())
        return float(column.mean()), deviation if deviation > 0.0 else 1.0

    features = [moments(name) for name in data.features] if data.standardize == "fleet" else []
    target = moments(data.target) if data.target_standardize == "fleet" else (stated.target_offset, stated.target_scale)
    return Scaling(
        offset=tuple(mean for mean, _ in features) or stated.offset,
        scale=tuple(deviation for _, deviation in features) or stated.scale,
        target_offset=target[0],
        target_scale=target[1],
    )


_LOSSES: Mapping[str, Callable[[], nn.Module]] = {
    "mse": nn.MSELoss,
    "bce_with_logits": nn.BCEWithLogitsLoss,
    "cross_entropy": nn.CrossEntropyLoss,
}


def _pace(spec: JobSpec, rows: int, agents: int) -> tuple[int, float]:
    """(rows of a batch, epochs of a round). Where a private job samples rows, a batch is as large as its expected
    sample: the fleet's if a round is one step, a device's if every device takes steps of its own."""
    train, privacy = spec.train, spec.privacy
    if privacy is not None and privacy.sampling_rate is not None:
        steps = (train.local_steps or 1) * (agents if privacy.noise_at == "device" else 1)
        pooled = rows / agents if privacy.noise_at == "device" else rows
        batch = max(1, round(privacy.sampling_rate * pooled))
        return batch, steps * batch / rows
    if train.local_epochs is not None:
        return train.batch_rows, train.local_epochs
    assert train.local_steps is not None
    return train.batch_rows, train.local_steps * train.batch_rows * agents / rows


def _tensors(spec: JobSpec, scaling: Scaling, table: Table) -> tuple[torch.Tensor, torch.Tensor]:
    data = spec.data
    columns: list[NDArray[np.float64]] = []
    for k, name in enumerate(data.features):
        column = table.columns[name].astype(np.float64)
        columns.append((column - scaling.offset[k]) / scaling.scale[k] if scaling.offset else column)
    x = columns[0] if len(columns) == 1 else np.stack(columns, axis=1)
    target = table.columns[data.target].astype(np.float64)
    y = (target - scaling.target_offset) / scaling.target_scale
    inputs = torch.from_numpy(x.reshape(table.rows, *data.x_shape).astype(np.float32))
    if data.classes is not None:
        return inputs, torch.nn.functional.one_hot(torch.from_numpy(y.astype(np.int64)), data.classes).float()
    return (
        inputs,
        torch.from_numpy(y.astype(np.int64 if spec.loss == "cross_entropy" else np.float32)),
    )


def _optimizer(spec: JobSpec, model: nn.Module) -> torch.optim.Optimizer:
    chosen = spec.optimizer
    if isinstance(chosen, SgdSpec):
        return torch.optim.SGD(
            model.parameters(),
            lr=chosen.lr,
            momentum=chosen.momentum,
            nesterov=chosen.nesterov,
            weight_decay=chosen.weight_decay,
        )
    return torch.optim.Adam(
        model.parameters(),
        lr=chosen.lr,
        betas=(chosen.beta1, chosen.beta2),
        eps=chosen.eps,
        weight_decay=chosen.weight_decay,
    )


def _evaluate(
    spec: JobSpec, model: nn.Module, scaling: Scaling, x: torch.Tensor, y: torch.Tensor
) -> Mapping[str, float]:
    model.eval()
    with torch.no_grad():
        out = model(x)
        if spec.loss != "cross_entropy":
            out = out.reshape(y.shape)
        means = {"loss": float(_LOSSES[spec.loss]()(out, y))}
        if spec.loss == "bce_with_logits":
            means["correct"] = float(((out > 0) == (y > 0.5)).double().mean())
        if spec.data.classes is not None:
            means["correct"] = float((out.argmax(1) == y.argmax(1)).double().mean())
        elif spec.loss == "cross_entropy":
            means["correct"] = float((out.argmax(1) == y).double().mean())
    return test_metrics(spec, scaling, means)
