"""A run on shares between job and rounds: circuits, the first state, evaluation, the summary's own fields."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from sordino_common.ring.fixed import encode_fixed
from sordino_common.spdz.layout import layout_of
from sordino_common.spdz.spec import Schedule
from sordino_server.baseline import Baseline, Owned, Pooled, run_shares_baseline
from sordino_server.job import Job
from sordino_server.job_spdz import NOBODY, OWNERS, SERVER
from sordino_server.model_spdz import SharedModel, SharedProgram, steps_of, trace_spdz, with_steps
from sordino_server.rounds.effects import Checkpoint, Effect, Result, SharedState, report, save
from sordino_server.rounds.events import Note, RoundDone
from sordino_server.rounds.fedavg import Programs, held_out_metrics
from sordino_server.rounds.roll import Program
from sordino_server.rounds.spdz import Circuitry, TrainingOnShares, World
from sordino_server.rounds.spdz_scores import predict_on_shares, score_on_shares


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRun:
    """A job on shares, ready to run in a `world`."""

    job: Job
    model: SharedModel
    world: World

    @property
    def names(self) -> tuple[str, ...]:
        return self.model.names

    def rounds(self, run: str, resumed: Checkpoint | None) -> Generator[Effect, Result, Checkpoint]:
        """Train, then evaluate as the job says; the last checkpoint."""
        spec, model = self.job.spec, self.model
        clear = spec.shares.evaluates == "clear"
        programs = Programs(
            train=_program(model.main),
            evaluate=Program(plan=model.evaluate.data, plan_id=model.evaluate.plan_id),
            evaluate_rows=model.evaluate_rows,
            row_names=tuple(output.name for output in model.evaluate.plan.outputs),
        )
        training = TrainingOnShares(
            spec,
            run=run,
            circuitry=lambda steps: _circuitry(with_steps(model.main, steps)),
            values=first_values(model),
            lengths=lambda rows: steps_of(spec, rows),
            world=self.world,
            programs=(
                *((programs.train,) if spec.train.rounds else ()),
                *((programs.evaluate,) if clear else ()),
            ),
        )
        state = yield from training.play(resumed)
        if clear:
            metrics, rows = yield from held_out_metrics(
                spec, run=run, programs=programs, roll=training.roll, state=state
            )
        elif model.score is not None:
            scored = _circuitry(with_steps(model.score, state.steps + 1))
            metrics, rows = yield from score_on_shares(training, scored, state, batch_rows=model.evaluate_rows)
        else:
            metrics, rows = {}, 0
        if model.predict is not None and spec.shares.inference is not None:
            inference = spec.shares.inference
            predicted = yield from predict_on_shares(
                training,
                _circuitry(with_steps(model.predict, state.steps + 1)),
                state,
                split=inference.split,
                batch_rows=inference.batch_rows,
            )
            receiver = spec.shares.outputs.prediction
            whom = "their owners" if receiver == OWNERS else receiver
            text = f"predictions of {predicted} {inference.split} rows are with {whom}, and nowhere else"
            yield from report(Note(text=text))
        if not spec.train.rounds:
            state = yield from training.inferred(state)
        state = training.with_tally(replace(state, record=replace(state.record, metrics=metrics, test_rows=rows)))
        yield from save(state)
        yield from report(RoundDone(record=state.record))
        return state

    def loud(self) -> Note | None:
        """What must be said before anything runs."""
        if self.job.spec.shares.security == "active":
            return None
        return Note(
            text="security: passive. A single cheating compute agent can falsify this run unseen, or learn rows",
            level="warning",
        )

    @property
    def comparable(self) -> bool:
        """Whether plain PyTorch can do the same: something is trained, from parameters that are known here."""
        return self.job.spec.train.rounds > 0 and self.job.spec.shares.model_from == SERVER

    def baseline(
        self, owned: Owned, shared: SharedState, stopwatch: Callable[[], float], breathe: Callable[[], None]
    ) -> Baseline:
        """Plain PyTorch with the same polynomials, rows and order."""
        spec = self.job.spec
        schedule = Schedule(rows=shared.rows, batch_rows=spec.train.batch_rows, seed=spec.train.seed)
        steps = steps_of(spec, schedule.total)
        return run_shares_baseline(
            self.job, owned, schedule=schedule, steps=steps, stopwatch=stopwatch, breathe=breathe
        )

    def summary(self, state: Checkpoint, baseline: Baseline | None) -> dict[str, Any]:
        """The fields that a run on shares adds to, or says better in, the summary."""
        assert state.shared is not None
        circuit = self.model.main.lowered.circuit
        shares, tally = self.job.spec.shares, state.shared.counters
        return {
            "security": shares.security,
            "rounds": state.record.round,
            "compute_agents": shares.committee,
            "model_from": shares.model_from,
            "online_rounds_per_step": len(circuit.rounds),
            "opened_bytes_per_step_per_party": 8 * circuit.gate_elements,
            "preprocessing_bytes_per_step": layout_of(circuit).preprocessing_bytes(active=shares.security == "active"),
            "mac_checks": int(tally.get("checks", 0)),
            "mask_at_edge_retries": int(tally.get("retries", 0)),
            "sessions": int(tally.get("sessions", 0)),
            "dealer_seconds": tally.get("dealer_s", 0.0),
            "online_seconds": tally.get("online_s", 0.0),
            "compute_seconds": tally.get("compute_s", 0.0),
            "opened": {name: to for name, to in _opened(shares) if to != NOBODY},
        }


def shared_run(job: Job, module: nn.Module, world: World) -> SharedRun:
    """Raises `PlanError` naming the model's line for what shares can't compute, `ConfigError` for what is not built."""
    shares = job.spec.shares
    if shares.inference is not None and shares.outputs.prediction in (SERVER, NOBODY):
        raise job.error(
            "spdz.outputs.prediction", "predictions open to who owns the rows (owners), or to an agent by name"
        )
    return SharedRun(job=job, model=trace_spdz(job, module), world=world)


def first_values(model: SharedModel) -> Mapping[str, Any]:
    """The first state as fixed point: the model's parameters, zeros for the optimizer's state."""
    params = dict(zip(model.names, model.params, strict=True))
    values = {}
    for entry in model.main.lowered.circuit.inputs:
        if entry.role == "param":
            values[entry.name] = encode_fixed(
                np.asarray(params[entry.name], dtype=np.float64), entry.wire.fraction_bits
            )
        elif entry.role == "state":
            values[entry.name] = np.zeros(entry.wire.shape, dtype=np.int64)
    return values


def owned_by(owned: Owned, rows: Sequence[tuple[str, int]]) -> bool:
    """Whether the rows for the baseline are those of the fleet's owners."""
    return {name: table.rows for name, table in owned.train} == dict(rows)


def owned_in_order(pooled: Pooled, rows: Sequence[tuple[str, int]]) -> Owned | None:
    """The public rows dealt out to the owners in order: who really has which is theirs to know. None if the numbers
    don't fit."""
    if sum(count for _, count in rows) != pooled.train.rows:
        return None
    owned, first = [], 0
    for name, count in rows:
        owned.append((name, pooled.train.take(np.arange(first, first + count))))
        first += count
    return Owned(train=tuple(owned), test=pooled.test)


def _opened(shares: Any) -> tuple[tuple[str, str], ...]:
    predictions = () if shares.inference is None else (("prediction", shares.outputs.prediction),)
    return (("model", shares.outputs.model), ("loss", shares.outputs.loss), *predictions)


def _program(program: SharedProgram) -> Program:
    return Program(plan=program.plan, plan_id=program.plan_id)


def _circuitry(program: SharedProgram) -> Circuitry:
    return Circuitry(
        program=_program(program),
        circuit=program.lowered.circuit,
        digest=program.lowered.digest,
        settings=program.settings,
    )
