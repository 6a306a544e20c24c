"""Makes a fault schedule happen to a simulated fleet, at the rounds and times that it says, and keeps the record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from sordino_common.clock import Loop
from sordino_common.errors import SordinoError
from sordino_server.rounds.events import Event, Note, Observer, RoundStarted, RunStarted
from sordino_sim.faults import FaultSchedule, PlannedFault


class ServerKilled(SordinoError):
    """The schedule says that the server's process dies here; whoever drives the simulation starts it again."""

    code = "server-killed"


class Stage(Protocol):
    """What faults happen to: a simulated fleet, or real processes."""

    @property
    def away(self) -> tuple[str, ...]: ...

    def die(self, name: str, *, noticed_after_s: float) -> None: ...

    def leave(self, name: str) -> None: ...

    def come_back(self, name: str) -> None: ...

    def slow_down(self, name: str, factor: float) -> None: ...

    def cut(self, names: frozenset[str], for_s: float) -> None: ...

    def set_clock(self, name: str, *, by_s: float) -> None: ...

    def flood(self, name: str, *, per_s: float, for_s: float) -> None: ...

    def restart_broker(self, *, down_s: float) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Happened:
    """A fault that took place: seconds since the start of the run, the round it was in, and what it was."""

    time_s: float
    round: int
    what: str


class Director:
    """An observer of the run. Tells `observer` a `Note` for everything that it does."""

    def __init__(self, *, schedule: FaultSchedule, stage: Stage, loop: Loop, observer: Observer) -> None:
        self.happened: list[Happened] = []
        self._schedule = schedule
        self._stage = stage
        self._loop = loop
        self._observer = observer
        self._began_s: float | None = None
        self._round = 0

    def on_event(self, event: Event) -> None:
        """Hear how the run goes on. A resumed run is the same run: timed faults are set once."""
        match event:
            case RunStarted() if self._began_s is None:
                self._began_s = self._loop.now_s()
                for planned in self._schedule.timed:
                    self._at(planned.fault.time_s or 0.0, planned)
            case RoundStarted(round=round_):
                self._round = round_
                for planned in self._schedule.take_round(round_):
                    self._at(0.0, planned)
            case _:
                pass

    @property
    def outstanding(self) -> tuple[int, ...]:
        """Rounds with faults that never came, because the run was over before."""
        return self._schedule.pending_rounds

    def _at(self, after_s: float, planned: PlannedFault) -> None:
        self._loop.call_at(self._loop.now_s() + after_s + planned.fault.after_s, partial(self._do, planned))

    def _do(self, planned: PlannedFault) -> None:
        fault, names = planned.fault, planned.agents
        if fault.do == "return" and planned.count:
            names = self._stage.away[: planned.count]
            planned = PlannedFault(fault=fault, agents=names)
        assert self._began_s is not None
        what = planned.describe()
        self.happened.append(Happened(time_s=self._loop.now_s() - self._began_s, round=self._round, what=what))
        self._observer(Note(text=f"fault: {what}", level="warning"))
        match fault.do:
            case "die":
                each(names, partial(self._stage.die, noticed_after_s=fault.noticed_s))
            case "leave":
                each(names, self._stage.leave)
            case "return":
                each(names, self._stage.come_back)
            case "slow":
                each(names, lambda name: self._stage.slow_down(name, fault.factor))
            case "cut":
                self._stage.cut(frozenset(names), fault.for_s)
            case "clock":
                each(names, lambda name: self._stage.set_clock(name, by_s=fault.by_s))
            case "flood":
                each(names, lambda name: self._stage.flood(name, per_s=fault.per_s, for_s=fault.for_s))
            case "broker-restart":
                self._stage.restart_broker(down_s=fault.down_s)
            case "server-kill":
                raise ServerKilled(what)


def each(names: tuple[str, ...], action: Callable[[str], None]) -> None:
    """`action` for every name, in order."""
    for name in names:
        action(name)
