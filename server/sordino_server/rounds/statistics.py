"""Statistics of the fleet's rows: one secure sum, noised if the job has privacy, and what follows from it.

    round 1      Σ over devices of the answers to all questions (`privacy.row_queries`), one release
    findings     ridge, moments, count, histograms, quantiles (`sordino_server.statistics`): post-processing
    evaluation   of the ridge model, as after any other training (`sum-metrics`, exact, over held-out rows)

A void sum is repeated as often as releases were planned for it (one, with a target epsilon): its noise is spent.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sordino_common.errors import LocalError
from sordino_common.messages import RangedColumn, RowQuery, SumNoise, SumStatistics, SumTerms
from sordino_common.privacy.row_queries import entry_bound, length_of
from sordino_common.privacy.row_sums import split
from sordino_server.job import JobSpec
from sordino_server.job_statistics import columns_of, queries_of
from sordino_server.rounds.effects import Checkpoint, Effect, Params, Result, meter, report, save
from sordino_server.rounds.events import RoundDone, RoundRecord, Share
from sordino_server.rounds.every_round import nothing_yet
from sordino_server.rounds.fedavg import Programs
from sordino_server.rounds.fedavg_secure import SecureRound
from sordino_server.rounds.releases import Releases
from sordino_server.rounds.roll import Roll
from sordino_server.rounds.scaling import given_scaling
from sordino_server.rounds.secure_sum import SumRequest, SumResult, largest_device, secure_sum
from sordino_server.rounds.spdz import World
from sordino_server.statistics.estimates import histogram_of, moments_of, scaling_of
from sordino_server.statistics.quantiles import quantiles
from sordino_server.statistics.ridge import Ridge, ridge

Findings = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A query with its entries, real: divided by the weight; `noise`: the deviation of the noise in each."""

    query: RowQuery
    entries: NDArray[np.float64]
    noise: float


def ask_rows(
    roll: Roll,
    spec: JobSpec,
    *,
    run: str,
    world: World,
    columns: Sequence[RangedColumn],
    queries: Sequence[RowQuery],
    noise: SumNoise | None,
    round: int,
    retries: int,
    releases: Releases | None = None,
) -> Generator[Effect, Result, tuple[SumResult, tuple[Answer, ...]]]:
    """The fleet's noised answers to `queries`, in their order. Raises what `secure_sum` raises."""
    secure, train = spec.secure, spec.train
    if secure is None:
        raise LocalError("ask_rows: the job has no secure_aggregation")
    yield from roll.assemble(round)
    limit = spec.limits.rows_per_agent
    counts = [able.data.train_rows for able in roll.able.values()]
    most_rows = max((rows for rows in counts if limit is None or rows <= limit), default=1)

    def command(terms: SumTerms) -> SumStatistics:
        return SumStatistics(
            terms=terms, round=round, dataset=spec.data.dataset, columns=tuple(columns), queries=tuple(queries)
        )

    request = SumRequest(
        purpose="statistics of the rows",
        round=round,
        command=command,
        length=length_of(queries),
        bound=entry_bound(queries, most_rows),
        minimum=secure.minimum,
        helpers=secure.helpers,
        deadline_s=train.round_deadline_s,
        straggler_s=train.straggler_s,
        retries=retries,
        noise=noise,
        bits=secure.bits,
        choose=lambda names, attempt: tuple(n for n in names if roll.able[n].data.train_rows <= most_rows),
        announce=True,
        releases=releases,
        remedy=largest_device(most_rows),
    )
    result = yield from secure_sum(roll, request, run=run, world=world)
    deviation = 0.0 if noise is None else float(np.sqrt(float(noise.sigma_squared) * result.aggregators))
    answers = tuple(
        Answer(query=query, entries=part.astype(np.float64) / query.weight, noise=deviation / query.weight)
        for query, part in zip(queries, split(queries, result.vector), strict=True)
    )
    return result, answers


def statistics_round(
    spec: JobSpec,
    *,
    run: str,
    programs: Programs,
    params: Params,
    world: World,
    noise: SumNoise | None,
    retries: int,
    releases: Releases | None = None,
    resumed: Checkpoint | None = None,
) -> Generator[Effect, Result, Checkpoint]:
    """The checkpoint after the one round, with its `findings`; `params` are the ridge model's, if the job asks for
    it."""
    if resumed is not None:
        return resumed  # there is one round, and it is done
    counted = yield from meter()
    secure = spec.secure
    if secure is None:
        raise LocalError("statistics_round: the job has no secure_aggregation")
    evaluated = spec.statistics.ridge is not None
    roll = Roll(
        data=spec.data, train=spec.train, programs=(programs.evaluate,) if evaluated else (), least=secure.minimum
    )
    columns, queries = columns_of(spec), queries_of(spec)
    result, answers = yield from ask_rows(
        roll,
        spec,
        run=run,
        world=world,
        columns=columns,
        queries=queries,
        noise=noise,
        round=1,
        retries=retries,
        releases=releases,
    )
    found = findings_of(spec, columns, answers)
    state = Checkpoint(params=params, scaling=given_scaling(spec.data), steps=0, record=nothing_yet(), findings=found)
    metrics: dict[str, float] = {}
    test_rows = 0
    if evaluated:
        line = ridge(answers[0].query, answers[0].entries, answers[0].noise)
        state = replace(state, params=_filled(params, line))
        this = SecureRound(spec=spec, secure=secure, run=run, programs=programs, roll=roll, number=1, world=world)
        metrics, test_rows = yield from this.metrics(state)
    end = yield from meter()
    record = RoundRecord(
        round=1,
        loss=None,
        metrics=metrics,
        shares=_shares(roll, result),
        steps=0,
        attempts=result.attempts,
        bytes_up=end.bytes_up - counted.bytes_up,
        bytes_down=end.bytes_down - counted.bytes_down,
        seconds=end.now_s - counted.now_s,
        test_rows=test_rows,
    )
    state = replace(state, record=record)
    yield from save(state)
    yield from report(RoundDone(record=record))
    return state


def findings_of(spec: JobSpec, columns: Sequence[RangedColumn], answers: Sequence[Answer]) -> Findings:
    """What the answers say, in the columns' own units, as plain values for JSON. Everything is an estimate."""
    found: Findings = {}
    rest = list(answers)
    if spec.statistics.ridge is not None:
        found["ridge"] = _line(columns, rest.pop(0))
    if spec.statistics.moments is not None:
        answer = rest.pop(0)
        moments = moments_of(answer.query, columns, answer.entries, answer.noise)
        found["moments"] = {
            one.name: {"mean": one.mean, "deviation": one.variance**0.5, "mean_error": one.mean_error}
            for one in moments
        }
        found["scaling"] = scaling_of(moments, columns)
    if spec.statistics.count is not None:
        answer = rest.pop(0)
        found["count"] = {"rows": float(answer.entries[0]), "error": answer.noise}
    for shape in spec.statistics.histograms:
        answer = rest.pop(0)
        one = histogram_of(answer.query, columns[answer.query.columns[0]], answer.entries, answer.noise)
        found.setdefault("histograms", {})[shape.column] = {
            "edges": list(one.edges),
            "counts": list(one.counts),
            "error": one.error,
        }
    for asked in spec.statistics.quantiles:
        answer = rest.pop(0)
        column = columns[answer.query.columns[0]]
        values = quantiles(column, answer.entries, answer.query.bits, asked.probabilities)
        found.setdefault("quantiles", {})[asked.column] = {
            f"{probability:g}": value for probability, value in zip(asked.probabilities, values, strict=True)
        }
    return found


def _line(columns: Sequence[RangedColumn], answer: Answer) -> Findings:
    """y = Σ coefficient · column + intercept, in the columns' own units."""
    line = ridge(answer.query, answer.entries, answer.noise)
    halves = [column.high / 2 - column.low / 2 for column in columns]
    middles = [column.high / 2 + column.low / 2 for column in columns]
    slopes = [halves[-1] * float(w) / half for w, half in zip(line.weights, halves[:-1], strict=True)]
    intercept = middles[-1] + halves[-1] * line.intercept
    intercept -= sum(slope * middle for slope, middle in zip(slopes, middles[:-1], strict=True))
    return {
        "target": columns[-1].name,
        "coefficients": {column.name: slope for column, slope in zip(columns[:-1], slopes, strict=True)},
        "intercept": intercept,
        "regularization": line.regularization,
    }


def _filled(params: Params, line: Ridge) -> Params:
    """The linear model's weight [1, D] and bias [1]."""
    weight, bias = params
    return (
        np.asarray(line.weights.reshape(weight.shape), dtype=weight.dtype),
        np.full(bias.shape, line.intercept, dtype=bias.dtype),
    )


def _shares(roll: Roll, result: SumResult) -> dict[str, Share]:
    shares = {
        name: Share(
            outcome="answered",
            rows=roll.able[name].data.train_rows if name in roll.able else 0,
            seconds=result.seconds[name],
        )
        for name in result.members
    }
    for name, why in result.excluded.items():
        shares[name] = Share(outcome="missing" if name in result.missing else "refused", note=why)
    return shares
