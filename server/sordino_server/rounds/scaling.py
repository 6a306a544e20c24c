"""Standardisation over the fleet from sums: μ = Σ s_i / Σ n_i, σ² = Σ q_i / Σ n_i - μ², per column.

Each agent sends n (rows), s (sum) and q (sum of squares) over its train rows, in float64; they are added in ascending
order of names. A constant column keeps scale 1. Cancellation in σ² costs about log10(μ²/σ²) of float64's 15 digits.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping

import numpy as np

from sordino_common.errors import RemoteError
from sordino_common.messages import Message, Moments, MomentsResult
from sordino_common.plan.arrays import to_numpy
from sordino_server.job import DataSpec, TrainSpec
from sordino_server.rounds.average import LARGEST, MOST_ROWS
from sordino_server.rounds.effects import Ask, Effect, Result, Scaling, ask
from sordino_server.rounds.roll import Roll, shortage


def given_scaling(data: DataSpec) -> Scaling:
    """What the job itself states; the neutral scaling where it says `fleet` or `none`."""
    given = data.standardize == "given"
    return Scaling(
        offset=data.offset if given else (),
        scale=data.scale if given else (),
        target_offset=data.target_offset,
        target_scale=data.target_scale,
    )


def fleet_columns(data: DataSpec) -> tuple[str, ...]:
    """The columns whose moments are needed, features first; empty if the job needs none."""
    features = data.features if data.standardize == "fleet" else ()
    return (*features, data.target) if data.target_standardize == "fleet" else features


def scaling_of(data: DataSpec, results: Mapping[str, MomentsResult]) -> Scaling:
    """The job's scaling with the fleet's moments in it."""
    columns = fleet_columns(data)
    rows = sum(result.rows for result in results.values())
    sums = np.zeros(len(columns))
    squares = np.zeros(len(columns))
    for name in sorted(results):
        sums += to_numpy(results[name].sums)
        squares += to_numpy(results[name].squares)
    # A tensor-valued column's sums run over all its elements.
    elements = np.full(len(columns), float(rows))
    if data.standardize == "fleet" and data.shape is not None and len(data.features) == 1:
        elements[0] *= float(np.prod(data.shape))
    mean = sums / elements
    deviation = np.sqrt(np.maximum(squares / elements - mean * mean, 0.0))
    # Below this, all that is left of the variance is rounding.
    floor = 1e-7 * np.maximum(np.abs(mean), np.finfo(np.float64).tiny)
    deviation = np.where(deviation > floor, deviation, 1.0)
    stated = given_scaling(data)
    features = len(data.features) if data.standardize == "fleet" else 0
    fleet_target = data.target_standardize == "fleet"
    return Scaling(
        offset=tuple(mean[:features].tolist()) if features else stated.offset,
        scale=tuple(deviation[:features].tolist()) if features else stated.scale,
        target_offset=float(mean[-1]) if fleet_target else stated.target_offset,
        target_scale=float(deviation[-1]) if fleet_target else stated.target_scale,
    )


def measure(data: DataSpec, train: TrainSpec, roll: Roll, first_round: int) -> Generator[Effect, Result, Scaling]:
    """Ask the fleet for its moments. Raises `shortage` if too few answer after `retries` repetitions."""
    columns = fleet_columns(data)
    if not columns:
        return given_scaling(data)

    def check(_: str, reply: Message) -> None:
        assert isinstance(reply, MomentsResult)
        for array in (reply.sums, reply.squares):
            if array.dtype != "float64" or array.shape != (len(columns),) or not np.isfinite(to_numpy(array)).all():
                raise RemoteError(f"its moments are not {len(columns)} finite float64 numbers")
        if reply.rows < 1 or (to_numpy(reply.squares) < 0.0).any():
            raise RemoteError("its moments are of no rows, or a sum of squares is negative")
        sums, squares = to_numpy(reply.sums), to_numpy(reply.squares)
        if reply.rows > MOST_ROWS or (np.abs(sums) > LARGEST).any() or (squares > LARGEST**2).any():
            raise RemoteError(
                f"its moments are of {reply.rows} rows, at most {MOST_ROWS}; or a sum is above {LARGEST:g}"
            )

    results: dict[str, MomentsResult] = {}
    reasons: dict[str, str] = {}
    forbidden: frozenset[str] = frozenset()
    broke: frozenset[str] = frozenset()
    for _ in range(train.retries + 1):
        names, need = yield from roll.assemble(first_round, done=frozenset(results))
        answers = yield from ask(
            Ask(
                purpose="column moments",
                messages=dict.fromkeys(names, Moments(dataset=data.dataset, columns=columns)),
                expects=MomentsResult,
                quorum=need,
                deadline_s=train.round_deadline_s,
                straggler_s=train.straggler_s,
                check=check,
            )
        )
        for name, reply in answers.replies.items():
            assert isinstance(reply, MomentsResult)
            results[name] = reply
        reasons, forbidden = {**answers.missing, **answers.refusals}, answers.forbidden
        broke = answers.unaffordable
        if len(answers.replies) >= need:
            return scaling_of(data, results)
    detail = ", ".join(f"{name} ({why})" for name, why in sorted(reasons.items()))
    text = f"column moments: {len(results)} agents answered, too few; missing: {detail}"
    raise shortage(text, missing=reasons.keys(), forbidden=forbidden, unaffordable=broke)
