"""A fleet at one moment, as every viewer shows it. Values only; `source` makes them.

Names, notes and errors come from devices: whoever prints them escapes them. Times in seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from sordino_server.dashboard.live import Notice, Spending, WaitNow

# What is known of an agent: in a running round, or only whether it is connected, or nothing.
State = Literal["answered", "awaited", "refused", "missing", "idle", "online", "offline", "unknown"]
STATES: tuple[State, ...] = ("answered", "awaited", "idle", "online", "refused", "missing", "offline", "unknown")
TROUBLE: frozenset[State] = frozenset({"refused", "missing", "offline"})


class AgentView(msgspec.Struct, frozen=True, kw_only=True):
    """One party of the roster but the server. `answered` of `asked`: rounds of the run that is shown first."""

    name: str
    state: State
    roles: tuple[str, ...] = ()
    zone: str = ""
    note: str = ""
    version: str = ""
    answered: int = 0
    asked: int = 0


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A finished round."""

    round: int
    loss: float | None
    metrics: Mapping[str, float]
    answered: int
    asked: int
    bytes_up: int
    bytes_down: int
    seconds: float


class RunView(msgspec.Struct, frozen=True, kw_only=True):
    """One run. `status`: running, comparing, stopped, interrupted, failed, done. Bytes of finished rounds, and of this
    process where that is more. `silent_s`: a running process has not been heard of for so long, None if it has."""

    run: str
    job: str
    mode: str
    dataset: str
    security: str
    status: str
    error: str
    created_s: float
    changed_s: float
    round: int
    rounds: int | None
    points: tuple[Point, ...]
    wait: WaitNow | None
    bytes_up: int
    bytes_down: int
    connected: bool
    warnings: int
    spent: tuple[Spending, ...]
    uncounted: bool  # noised releases have begun, and what they cost is not known here
    silent_s: float | None

    @property
    def metrics(self) -> Mapping[str, float]:
        """The last that were evaluated."""
        return next((point.metrics for point in reversed(self.points) if point.metrics), {})

    @property
    def loss(self) -> float | None:
        return next((point.loss for point in reversed(self.points) if point.loss is not None), None)

    @property
    def active(self) -> bool:
        """Whether a process trains it now."""
        return self.status in ("running", "comparing")


class DatasetView(msgspec.Struct, frozen=True, kw_only=True):
    """ε of one `unit` of a dataset over all runs of this server, each run's figure added up: an upper bound. The exact
    account, and the budget, is on each device (`sordino-agent budget`). `uncounted` runs are not in it."""

    dataset: str
    unit: str
    epsilon: float
    delta: float
    releases: int
    runs: int
    uncounted: int


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Of the finished rounds of all runs. `answers`: agents that were asked, by what became of that."""

    rounds: int = 0
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    answers: Mapping[str, int] = {}


class View(msgspec.Struct, frozen=True, kw_only=True):
    """`births`: what the viewer itself hears from the broker (empty: it does not listen). `runs`: the newest first, at
    most so many as asked for; `runs_by_status` counts all. `trouble`: what keeps the view from being whole."""

    fleet: str
    server: str
    version: str
    at_s: float
    roster_epoch: int | None
    roster_expires_s: float | None
    births: str
    agents: tuple[AgentView, ...]
    runs: tuple[RunView, ...]
    runs_by_status: Mapping[str, int]
    totals: Totals
    datasets: tuple[DatasetView, ...]
    notices: tuple[Notice, ...]
    trouble: tuple[str, ...]

    @property
    def now(self) -> RunView | None:
        """The run that is trained now; else the latest."""
        return next((run for run in self.runs if run.active), self.runs[0] if self.runs else None)

    def count(self, *states: State) -> int:
        """How many agents are in one of `states`."""
        return sum(agent.state in states for agent in self.agents)
