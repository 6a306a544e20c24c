"""Inference on shares with the model that the committee holds: predictions, and held-out metrics where it stays hidden.

a session of the scoring Plan, whose parameters are the state that the committee holds; batch by batch, each of one
owner; loss and prediction of a row open to its owner only, who answers sums over all its rows when the session ends
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Literal

from sordino_common import messages as m
from sordino_common.errors import LocalError, RemoteError
from sordino_common.spdz.opening import OWNERS, numbers_of
from sordino_common.spdz.spec import Schedule
from sordino_server.rounds.average import LARGEST
from sordino_server.rounds.committee import provider
from sordino_server.rounds.effects import Checkpoint, Effect, Result, report
from sordino_server.rounds.events import Note
from sordino_server.rounds.fedavg import test_metrics
from sordino_server.rounds.spdz import REPORTS_AHEAD, Circuitry, TrainingOnShares, steps_ahead, with_digest
from sordino_server.rounds.spdz_session import SessionLost


def score_on_shares(
    training: TrainingOnShares, program: Circuitry, state: Checkpoint, *, batch_rows: int
) -> Generator[Effect, Result, tuple[dict[str, float], int]]:
    """(the job's metrics, over how many held-out rows). Raises `FleetUnavailable`, and errors of exit code 4."""
    closed, rows = yield from _infer(training, program, state, split="test", batch_rows=batch_rows)
    if not rows:
        return {}, 0
    return test_metrics(training.spec, state.scaling, _means(closed, rows)), sum(rows.values())


def predict_on_shares(
    training: TrainingOnShares,
    program: Circuitry,
    state: Checkpoint,
    *,
    split: Literal["train", "test"],
    batch_rows: int,
) -> Generator[Effect, Result, int]:
    """Every row's prediction to who owns the row, or all of them to the agent that the job names, who keeps them; how
    many rows that were."""
    receiver = training.spec.shares.outputs.prediction
    if receiver == "owners":
        receiver = OWNERS
    closed, rows = yield from _infer(training, program, state, split=split, batch_rows=batch_rows, receiver=receiver)
    if receiver != OWNERS:
        return closed[receiver].rows if receiver in closed else 0
    return sum(reply.rows for name, reply in closed.items() if name in rows)


def _infer(
    training: TrainingOnShares,
    program: Circuitry,
    state: Checkpoint,
    *,
    split: Literal["train", "test"],
    batch_rows: int,
    receiver: str = OWNERS,
) -> Generator[Effect, Result, tuple[dict[str, m.SpdzClosed], dict[str, int]]]:
    """A session over all owners' rows; (what they said at its end, how many rows each has). A session that is lost is
    tried again."""
    for left in range(training.spec.train.retries, -1, -1):
        try:
            return (yield from _session(training, program, state, split, batch_rows, receiver))
        except SessionLost as error:
            if not left:
                raise
            yield from report(Note(text=f"{error}; once more", level="warning"))
    raise LocalError("no session to infer in")


def _session(
    training: TrainingOnShares,
    program: Circuitry,
    state: Checkpoint,
    split: Literal["train", "test"],
    batch_rows: int,
    receiver: str,
) -> Generator[Effect, Result, tuple[dict[str, m.SpdzClosed], dict[str, int]]]:
    assert state.shared is not None
    readers = () if receiver == OWNERS else (receiver,)
    parties = yield from training.assemble(state, program, readers=readers)
    rows = {}
    for name, _ in state.shared.rows:
        data = training.roll.able[name].data
        rows[name] = data.test_rows if split == "test" else data.train_rows
    rows = {name: count for name, count in rows.items() if count > 0}
    if not rows:
        yield from report(Note(text=f"no agent holds {split} rows", level="warning"))
        return {}, {}
    command = _command(training, program, state, parties, rows, batch_rows, receiver)
    session = training.new_session(command, program, state, split=split)
    try:
        yield from session.open(None if command.resume else training.first_values(program))
        yield from session.advance(command.steps)
        yield from session.settle(command.steps)
        closed = yield from session.close()
    finally:
        training.tally.count(session)
    training.tally.count_online([closed[name].counters for name in parties if name in closed])
    missing = sorted({*rows, *readers} - closed.keys())
    if missing:
        raise SessionLost(f"no sums came from {', '.join(missing)}")
    return closed, rows


def _command(
    training: TrainingOnShares,
    program: Circuitry,
    state: Checkpoint,
    parties: tuple[str, ...],
    rows: dict[str, int],
    batch_rows: int,
    receiver: str,
) -> m.SpdzOpen:
    """Batch by batch, each of one owner; every row's results to its owner, or to `receiver`."""
    assert state.shared is not None
    shares, held = training.spec.shares, bool(state.shared.session)
    schedule = Schedule(rows=tuple(rows.items()), batch_rows=batch_rows, seed=0, order="by-owner")
    ahead = steps_ahead(shares, program.circuit, check_every=1)
    command = m.SpdzOpen(
        run=training.run,
        session=training.world.random(16),
        plan_id=program.program.plan_id,
        circuit=program.digest,
        digest=bytes(32),
        settings=numbers_of(program.settings),
        parties=parties,
        dealer=shares.dealer or training.world.server,
        security=shares.security,
        first_step=0,
        steps=schedule.steps_per_pass,
        check_every=1,
        retries=shares.retries,
        rows=tuple(m.SpdzRows(owner=name, rows=count) for name, count in rows.items()),
        batch_rows=batch_rows,
        seed=0,
        order="by-owner",
        outputs=tuple(
            m.SpdzOutput(name=output.name, receiver=receiver)
            for output in program.circuit.outputs
            if output.role == "row"
        ),
        data=None,
        state_from=None if held else provider(shares, training.world.roster()),
        resume=m.SpdzPoint(session=state.shared.session, step=state.shared.steps) if held else None,
        checkpoints=(),
        ahead=ahead,
        report_every=max(1, ahead // REPORTS_AHEAD),
        silence_s=shares.silence_s,
    )
    return with_digest(command, program)


def _means(closed: dict[str, m.SpdzClosed], rows: dict[str, int]) -> dict[str, float]:
    """Mean row results over all owners. Raises `RemoteError`, naming who tells what can't be."""
    sums: dict[str, list[float]] = {}
    for name in sorted(rows):
        reply = closed[name]
        if reply.rows != rows[name] or len(reply.names) != len(reply.sums) or set(reply.names) - {"loss", "correct"}:
            raise RemoteError(f"{name} tells sums over {reply.rows} rows, it has {rows[name]}; or of other names")
        for what, value in zip(reply.names, reply.sums, strict=True):
            if not math.isfinite(value) or abs(value) > LARGEST:
                raise RemoteError(f"{name} tells a sum that can't be: {what} {value:g}")
            sums.setdefault(what, []).append(value)
    total = sum(rows.values())
    return {what: math.fsum(values) / total for what, values in sums.items()}
