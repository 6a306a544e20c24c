"""Held-out metrics of a model that stays shared: inference on shares, results to who owns the rows, sums to the server.

a session of the scoring Plan, whose parameters are the state that the committee holds; batch by batch, each of one
owner; loss and prediction of a row open to its owner only, who answers sums over all its rows when the session ends
"""

from __future__ import annotations

import math
from collections.abc import Generator

from sordino_common import messages as m
from sordino_common.errors import FleetUnavailable, RemoteError
from sordino_common.spdz.opening import OWNERS, numbers_of
from sordino_common.spdz.spec import Schedule
from sordino_server.rounds.average import LARGEST
from sordino_server.rounds.effects import Checkpoint, Effect, Result, report
from sordino_server.rounds.events import Note
from sordino_server.rounds.fedavg import test_metrics
from sordino_server.rounds.spdz import REPORTS_AHEAD, Circuitry, TrainingOnShares, steps_ahead, with_digest
from sordino_server.rounds.spdz_session import SessionLost


def score_on_shares(
    training: TrainingOnShares, program: Circuitry, state: Checkpoint, *, batch_rows: int
) -> Generator[Effect, Result, tuple[dict[str, float], int]]:
    """(the job's metrics, over how many held-out rows). Raises `FleetUnavailable`, and errors of exit code 4."""
    for left in range(training.spec.train.retries, -1, -1):
        try:
            return (yield from _score(training, program, state, batch_rows))
        except SessionLost as error:
            if not left:
                raise
            yield from report(Note(text=f"{error}; once more", level="warning"))
    raise FleetUnavailable("no session to score in")


def _score(
    training: TrainingOnShares, program: Circuitry, state: Checkpoint, batch_rows: int
) -> Generator[Effect, Result, tuple[dict[str, float], int]]:
    assert state.shared is not None
    spec, shared = training.spec, state.shared
    parties = yield from training.assemble(state, program)
    rows = tuple((name, training.roll.able[name].data.test_rows) for name, _ in shared.rows)
    rows = tuple((name, count) for name, count in rows if count > 0)
    if not rows:
        yield from report(Note(text="no agent holds rows to test on", level="warning"))
        return {}, 0
    steps = Schedule(rows=rows, batch_rows=batch_rows, seed=0, order="by-owner").steps_per_pass
    ahead = steps_ahead(spec.shares, program, check_every=1)
    command = m.SpdzOpen(
        run=training.run,
        session=training.world.random(16),
        plan_id=program.program.plan_id,
        circuit=program.digest,
        digest=bytes(32),
        settings=numbers_of(program.settings),
        parties=parties,
        dealer=spec.shares.dealer or training.world.server,
        security=spec.shares.security,
        first_step=0,
        steps=steps,
        check_every=1,
        retries=spec.shares.retries,
        rows=tuple(m.SpdzRows(owner=name, rows=count) for name, count in rows),
        batch_rows=batch_rows,
        seed=0,
        order="by-owner",
        outputs=tuple(
            m.SpdzOutput(name=output.name, receiver=OWNERS)
            for output in program.circuit.outputs
            if output.role == "row"
        ),
        data=None,
        state_from=None,
        resume=m.SpdzPoint(session=shared.session, step=shared.steps),
        checkpoints=(),
        ahead=ahead,
        report_every=max(1, ahead // REPORTS_AHEAD),
        silence_s=spec.shares.silence_s,
    )
    session = training.new_session(with_digest(command, program), program, state, split="test")
    try:
        yield from session.open(None)
        yield from session.advance(steps)
        yield from session.settle(steps)
        closed = yield from session.close()
    finally:
        training.tally.count(session)
    training.tally.count_online([closed[name].counters for name in parties if name in closed])
    means = _means({name: closed[name] for name, _ in rows if name in closed}, dict(rows))
    return test_metrics(spec, state.scaling, means), sum(count for _, count in rows)


def _means(closed: dict[str, m.SpdzClosed], rows: dict[str, int]) -> dict[str, float]:
    """Mean row results over all owners. Raises `RemoteError`, naming who tells what can't be."""
    missing = sorted(rows.keys() - closed.keys())
    if missing:
        raise SessionLost(f"no sums came from {', '.join(missing)}")
    sums: dict[str, list[float]] = {}
    for name in sorted(closed):
        reply = closed[name]
        if reply.rows != rows[name] or len(reply.names) != len(reply.sums) or set(reply.names) - {"loss", "correct"}:
            raise RemoteError(f"{name} tells sums over {reply.rows} rows, it has {rows[name]}; or of other names")
        for what, value in zip(reply.names, reply.sums, strict=True):
            if not math.isfinite(value) or abs(value) > LARGEST:
                raise RemoteError(f"{name} tells a sum that can't be: {what} {value:g}")
            sums.setdefault(what, []).append(value)
    total = sum(rows.values())
    return {what: math.fsum(values) / total for what, values in sums.items()}
