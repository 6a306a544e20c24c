"""Federated averaging over secure sums: the server sees the weighted sum of the updates, and no single one.

    every round     everybody trains from the same parameters; Σ rows · update, Σ rows and Σ rows · loss are one sum
    evaluation      Σ rows and Σ of every metric over the held-out rows are another
    both            over at least `secure_aggregation.minimum` devices; otherwise as `fedavg.py`

In the integers of a sum an update counts rows / W, where W is the largest row count among those who may be asked. With
f fraction bits each device's entry is rounded to a unit of 2^-f W / Σ rows of the mean, off by half of it at most: with
n devices the mean is off by at most n 2^-(f+1) W / Σ rows.

A round starts anew with everybody if its sum is void: what was sent under one session is of no use in another.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from sordino_common.aggregate.wide import EXTRAS, LIMB_BOUND, LOSS_FRACTION_BITS, ROWS_LIMBS, joined
from sordino_common.errors import BudgetRefused, ConfigError, FleetUnavailable, LocalError, PolicyRefusal, RemoteError
from sordino_common.messages import SumMetrics, SumTerms, SumUpdate
from sordino_common.plan.arrays import from_numpy
from sordino_server.job import JobSpec, TrainSpec
from sordino_server.job_aggregate import SecureSpec
from sordino_server.rounds.average import MOST_ROWS
from sordino_server.rounds.effects import Checkpoint, Effect, Metered, Params, Result, meter, report
from sordino_server.rounds.events import Note, Share
from sordino_server.rounds.every_round import Played, enough, every_round, nothing_yet, recorded
from sordino_server.rounds.fedavg import Programs, chosen, data_ref, test_metrics
from sordino_server.rounds.releases import LocalNoise, Releases, plans_of, retries_of, used_up
from sordino_server.rounds.roll import Names, Roll
from sordino_server.rounds.scaling import given_scaling
from sordino_server.rounds.secure_sum import SumRequest, SumResult, secure_sum
from sordino_server.rounds.spdz import World

F64 = npt.NDArray[np.float64]
METRICS_FRACTION_BITS: Final = 16
METRICS_BOUND: Final = 1 << 47  # with 20,000 devices a sum stays below 2^62; a device's own may be up to 2^31


def secure_averaging(
    spec: JobSpec,
    *,
    run: str,
    programs: Programs,
    params: Params,
    world: World,
    resumed: Checkpoint | None = None,
    private: LocalNoise | None = None,
) -> Generator[Effect, Result, Checkpoint]:
    """As `federated_averaging`. Raises `shortage`, and `ConfigError` if the job's integers fit no word."""
    counted = yield from meter()
    secure = spec.secure
    if secure is None:
        raise LocalError("secure_averaging: the job has no secure_aggregation")
    plans = plans_of((programs.train, programs.evaluate), private)
    roll = Roll(data=spec.data, train=spec.train, programs=plans, least=secure.minimum)
    state = resumed or Checkpoint(params=params, scaling=given_scaling(spec.data), steps=0, record=nothing_yet())

    def play(number: int, state: Checkpoint, counted: Metered) -> Played:
        this = SecureRound(
            spec=spec,
            secure=secure,
            run=run,
            programs=programs,
            roll=roll,
            number=number,
            world=world,
            private=private,
            releases=None if private is None else private.releases,
        )
        return this.play(state, counted)

    return (yield from every_round(spec, state, counted, play, releases=private))


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureRound:
    """One round. `metrics` and `finish` are of use to other kinds of rounds as well. `releases`: of a private job; the
    round that takes the last one is evaluated, as the last round is."""

    spec: JobSpec
    secure: SecureSpec
    run: str
    programs: Programs
    roll: Roll
    number: int
    world: World
    private: LocalNoise | None = None
    releases: Releases | None = None

    def play(self, state: Checkpoint, counted: Metered) -> Played:
        """The state after the round."""
        begin_s = (yield from meter()).now_s
        result = yield from self._train(state)
        assert isinstance(result.command, SumUpdate)
        mean, rows, loss = mean_update(result, state.params)
        stated = sum(self.rows(name) for name in result.members)
        if rows != stated:
            text = f"round {self.number}: the contributions are of {rows} rows together, the devices described {stated}"
            yield from report(Note(text=text, level="warning"))
        params = tuple(
            np.asarray(param.astype(np.float64) + change, dtype=param.dtype, order="C")
            for param, change in zip(state.params, mean, strict=True)
        )
        if not all(np.isfinite(param).all() for param in params):
            raise ConfigError(
                f"round {self.number}: the averaged parameters are not finite: the training diverges. "
                "Lower optimizer.lr, or standardize the data. The last checkpoint is kept."
            )
        after = replace(state, params=params)
        told = loss if self.private is None else None
        return (yield from self.finish(after, counted, result, begin_s=begin_s, loss=told))

    def finish(
        self, after: Checkpoint, counted: Metered, result: SumResult, *, begin_s: float, loss: float | None
    ) -> Played:
        """The state `after` the sum `result`, evaluated if it is this round's turn, with its record."""
        shares = self.shares(result)
        steps = sum(share.steps for share in shares.values())
        after = replace(after, steps=after.steps + steps)
        metrics, test_rows = yield from self.metrics(after)
        return (
            yield from recorded(
                after,
                counted,
                number=self.number,
                begin_s=begin_s,
                loss=loss,
                metrics=metrics,
                test_rows=test_rows,
                shares=shares,
                steps=steps,
                attempts=result.attempts,
            )
        )

    def metrics(self, state: Checkpoint) -> Generator[Effect, Result, tuple[dict[str, float], int]]:
        """The job's metrics over the held-out rows of whoever contributes, and how many rows those are; ({}, 0) if it
        is not this round's turn, or there was no sum."""
        train, every = self.spec.train, self.spec.train.evaluate_every
        final = self.number == train.rounds or enough(self.spec, state) or used_up(self.releases)
        if not final and (every == 0 or self.number % every != 0):
            return {}, 0
        arrays = tuple(from_numpy(param) for param in state.params)

        def command(terms: SumTerms) -> SumMetrics:
            return SumMetrics(
                terms=terms,
                round=self.number,
                plan_id=self.programs.evaluate.plan_id,
                data=data_ref(self.spec, state.scaling, "test"),
                params=arrays,
                batch_rows=self.programs.evaluate_rows,
                fraction_bits=METRICS_FRACTION_BITS,
            )

        request = SumRequest(
            purpose=f"evaluation of round {self.number}",
            round=self.number,
            command=command,
            length=1 + len(self.programs.row_names),
            bound=METRICS_BOUND,
            minimum=self.secure.minimum,
            helpers=self.secure.helpers,
            deadline_s=train.round_deadline_s,
            straggler_s=train.straggler_s,
            retries=train.retries if final else 0,
            bits=64,
            choose=lambda names, attempt: tuple(name for name in names if self.roll.able[name].data.test_rows > 0),
        )
        try:
            result = yield from secure_sum(self.roll, request, run=self.run, world=self.world)
        except (FleetUnavailable, PolicyRefusal, BudgetRefused) as error:
            yield from report(Note(text=f"round {self.number}: no metrics: {error}", level="warning"))
            return {}, 0
        rows = int(result.vector[0])
        if not 1 <= rows <= MOST_ROWS * len(result.members):
            text = f"round {self.number}: no metrics: they are of {rows} rows, so somebody lies; a sum can't tell who"
            yield from report(Note(text=text, level="warning"))
            return {}, 0
        means = {
            name: float(total) / (1 << METRICS_FRACTION_BITS) / rows
            for name, total in zip(self.programs.row_names, result.vector[1:], strict=True)
        }
        return test_metrics(self.spec, state.scaling, means), rows

    def _train(self, state: Checkpoint) -> Generator[Effect, Result, SumResult]:
        train, secure = self.spec.train, self.secure
        arrays = tuple(from_numpy(param) for param in state.params)
        length = sum(param.size for param in state.params) + EXTRAS
        # The extras' limbs are smaller than 2^16.
        bound = max(math.ceil(secure.largest * (1 << secure.fraction_bits)), LIMB_BOUND)

        def command(terms: SumTerms) -> SumUpdate:
            unit = max(self.rows(name) for name in self.roll.able)
            return SumUpdate(
                terms=terms,
                round=self.number,
                attempt=0,
                plan_id=self.programs.train.plan_id,
                data=data_ref(self.spec, state.scaling, "train"),
                params=arrays,
                batch_rows=train.batch_rows,
                steps=train.local_steps or 0,
                epochs=train.local_epochs or 0.0,
                seed=train.seed,
                weight="rows",
                weight_unit=min(unit, self.row_limit),
                fraction_bits=secure.fraction_bits,
                clip=None,
                privacy=None if self.private is None else self.private.record,
            )

        request = SumRequest(
            purpose=f"update of round {self.number}",
            round=self.number,
            command=command,
            length=length,
            bound=bound,
            minimum=secure.minimum,
            helpers=secure.helpers,
            deadline_s=train.round_deadline_s,
            straggler_s=train.straggler_s,
            retries=retries_of(train, self.private),
            bits=secure.bits,
            choose=lambda names, attempt: chosen(train, self.within(names, self.row_limit), self.number, attempt),
            announce=True,
            releases=self.releases,
        )
        return (yield from secure_sum(self.roll, request, run=self.run, world=self.world))

    @property
    def row_limit(self) -> int:
        """Devices of more rows are not asked."""
        return self.spec.limits.rows_per_agent or MOST_ROWS

    def within(self, names: Names, limit: int) -> Names:
        return tuple(name for name in names if self.rows(name) <= limit)

    def rows(self, name: str) -> int:
        """Train rows, as the device described them: public."""
        return self.roll.able[name].data.train_rows if name in self.roll.able else 0

    def shares(self, result: SumResult) -> dict[str, Share]:
        """What is known of single devices: row counts, hence steps, and the time that they took."""
        shares = {
            name: Share(
                outcome="answered",
                rows=self.rows(name),
                steps=local_steps(self.spec.train, self.rows(name)),
                seconds=result.seconds[name],
            )
            for name in result.members
        }
        for name, why in result.excluded.items():
            shares[name] = Share(outcome="missing" if name in result.missing else "refused", note=why)
        return shares


def mean_update(result: SumResult, params: Params) -> tuple[tuple[F64, ...], int, float]:
    """(mean update weighted by rows, float64 in the shapes of `params`; rows; mean loss) of a sum of `SumUpdate`s.

    Raises `RemoteError` if the sum can't be one of honest contributions."""
    command = result.command
    assert isinstance(command, SumUpdate)
    size = sum(param.size for param in params)
    vector, extras = result.vector[:size], result.vector[size:].tolist()
    rows, loss = joined(extras[:ROWS_LIMBS]), joined(extras[ROWS_LIMBS:])
    if not 1 <= rows <= MOST_ROWS * len(result.members):
        raise RemoteError(
            f"{result.terms.purpose}: the contributions are of {rows} rows together: somebody lies, and a sum can't "
            "tell who. The last checkpoint is kept."
        )
    scale = command.weight_unit / (rows * float(1 << command.fraction_bits))
    return split(np.multiply(vector, scale, dtype=np.float64), params), rows, loss / (1 << LOSS_FRACTION_BITS) / rows


def split(flat: F64, params: Params) -> tuple[F64, ...]:
    """`flat` in the shapes of `params`."""
    parts, start = [], 0
    for param in params:
        parts.append(flat[start : start + param.size].reshape(param.shape))
        start += param.size
    return tuple(parts)


def local_steps(train: TrainSpec, rows: int) -> int:
    """The optimizer steps that a device with `rows` rows takes in a round: the job says so, nobody reports it."""
    return train.local_steps or max(1, round((train.local_epochs or 0.0) * rows / train.batch_rows))
