"""What all kinds of averaging have in common: round after round until it is enough, with record and checkpoint.

    for each round    enough? releases left?   ->   play   ->   checkpoint on disk   ->   observers are told

What a round is, is `play`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace

from sordino_server.job import JobSpec
from sordino_server.rounds.effects import Checkpoint, Effect, Metered, Result, meter, report, save
from sordino_server.rounds.events import RoundDone, RoundRecord, Share
from sordino_server.rounds.releases import LocalNoise, Releases, out_of_releases

Played = Generator[Effect, Result, tuple[Checkpoint, Metered]]


def every_round(
    spec: JobSpec,
    state: Checkpoint,
    counted: Metered,
    play: Callable[[int, Checkpoint, Metered], Played],
    *,
    releases: LocalNoise | Releases | None = None,
) -> Generator[Effect, Result, Checkpoint]:
    """The last checkpoint. `play(number, state, counted)` is one round; `counted`: bytes up to there belong to earlier
    rounds. Training ends early when `spec.train` says so, or when the planned `releases` are used up."""
    for number in range(state.record.round + 1, spec.train.rounds + 1):
        if enough(spec, state) or (yield from out_of_releases(releases, state, spec.train.rounds)):
            break
        state, counted = yield from play(number, state, counted)
        yield from save(state)
        yield from report(RoundDone(record=state.record))
    return state


def recorded(
    state: Checkpoint,
    counted: Metered,
    *,
    number: int,
    begin_s: float,
    loss: float | None,
    metrics: Mapping[str, float],
    test_rows: int,
    shares: Mapping[str, Share],
    steps: int,
    attempts: int,
) -> Played:
    """`state` with the record of the round that ends now, and what has been metered by now. What came before the first
    round (descriptions, Plans, moments) belongs to it; its seconds, from `begin_s`, are its own."""
    end = yield from meter()
    record = RoundRecord(
        round=number,
        loss=loss,
        metrics=metrics,
        shares=shares,
        steps=steps,
        attempts=attempts,
        bytes_up=end.bytes_up - counted.bytes_up,
        bytes_down=end.bytes_down - counted.bytes_down,
        seconds=end.now_s - begin_s,
        test_rows=test_rows,
    )
    return replace(state, record=record), end


def enough(spec: JobSpec, state: Checkpoint) -> bool:
    """Whether as many optimizer steps were taken as the job wants at most."""
    return spec.train.max_steps is not None and state.steps >= spec.train.max_steps


def nothing_yet() -> RoundRecord:
    """The record before the first round."""
    return RoundRecord(
        round=0, loss=None, metrics={}, shares={}, steps=0, attempts=0, bytes_up=0, bytes_down=0, seconds=0.0
    )
