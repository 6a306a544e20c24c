"""What happens in a run, as values for whoever watches: the progress view, the log, the simulator, tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["answered", "refused", "missing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One agent's part in one round. `note` says why there was no (good) answer."""

    outcome: Outcome
    rows: int = 0
    steps: int = 0
    loss: float | None = None
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """A finished round: mean training loss over rows, metrics if it was evaluated, who did what, bytes and time."""

    round: int
    loss: float | None
    metrics: Mapping[str, float]
    shares: Mapping[str, Share]
    steps: int
    attempts: int
    bytes_up: int
    bytes_down: int
    seconds: float
    test_rows: int = 0  # held-out rows that the metrics are of: agents that are gone took theirs along

    @property
    def dropouts(self) -> int:
        """Agents that were asked and gave no usable answer."""
        return sum(share.outcome != "answered" for share in self.shares.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    run: str
    job: str
    mode: str
    security: str
    rounds: int
    first_round: int
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Nothing stands still silently: for whom, for what, how many are there, how many are needed, since when."""

    purpose: str
    names: tuple[str, ...]
    have: int
    quorum: int
    waited_s: float
    left_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStarted:
    round: int
    attempt: int
    asked: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One reply came in, or is known not to come. Totals of the run's bytes so far."""

    purpose: str
    name: str
    outcome: Outcome
    note: str
    have: int
    asked: int
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundDone:
    record: RoundRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something a person wants to know: an agent came or went, the broker is away, an update was excluded."""

    text: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDone:
    summary: Mapping[str, object] = field(default_factory=dict)


Event = RunStarted | Waiting | RoundStarted | Answered | RoundDone | Note | RunDone
Observer = Callable[[Event], None]


def silent(event: Event) -> None:
    """The observer that looks away."""


def both(*observers: Observer) -> Observer:
    """One observer that tells all of `observers`, in order."""

    def tell(event: Event) -> None:
        for observer in observers:
            observer(event)

    return tell
