"""Fault schedules: what goes wrong, when, and with whom.

    seed: 7                     # draws the agents where only a number is given
    faults:
      - {round: 3, after_s: 0.05, do: die, agents: 3}          # three agents, drawn by the seed, are killed
      - {round: 5, do: return, agents: [agent-02]}             # one comes back, as a new boot
      - {round: 4, do: leave, agents: [agent-07]}              # drains and says goodbye
      - {round: 4, do: slow, agents: [agent-08], factor: 20}   # computes twenty times slower from here on
      - {round: 4, do: cut, agents: [agent-09], for_s: 3}      # its network fails for three seconds
      - {round: 4, do: die, agents: [helper-0]}               # a helper of secure sums; only by name
      - {round: 4, do: clock, agents: 2, by_s: -7200}          # their clocks are set back by two hours
      - {round: 4, do: flood, agents: 1, per_s: 500, for_s: 5} # sends whatever it can: messages, garbage, old packets
      - {time_s: 12.5, do: broker-restart, down_s: 2.0}
      - {round: 6, do: server-kill}

A fault is due at a round (when the round's first command leaves, plus `after_s`) or at a time after the job's start.
A killed process's connection breaks at once; with `noticed_s: 45` on `die` the broker hears of it after the keep-alive
only, as when power fails. `return` with a number brings back that many of those which are away, first gone first.

Pure: the schedule says what is due; `director` makes it happen.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from sordino_common.config import Marks, error_at, load_config_with_marks
from sordino_common.errors import ConfigError
from sordino_common.messages.base import Name

Action = Literal["die", "leave", "return", "slow", "cut", "clock", "flood", "broker-restart", "server-kill"]
TransportName = Literal["memory", "mqtt", "processes"]

_ON_AGENTS = ("die", "leave", "return", "slow", "cut", "clock", "flood")

# What needs a part that only some transports simulate: where it can happen, and why nowhere else.
_ONLY: Final[Mapping[Action, tuple[tuple[TransportName, ...], str]]] = {
    "slow": (("memory", "mqtt"), "processes compute as fast as this machine does"),
    "cut": (("memory",), "only there is the network simulated"),
    "clock": (("memory", "mqtt"), "processes have the clock of this machine"),
    "flood": (("memory", "mqtt"), "real agents don't"),
    "server-kill": (("memory", "mqtt"), "beside processes the server is the simulator itself"),
}


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that goes wrong. Exactly one of `round` and `time_s` says when."""

    do: Action
    round: Annotated[int, msgspec.Meta(ge=1)] | None = None
    time_s: Annotated[float, msgspec.Meta(ge=0.0, le=1e9)] | None = None
    after_s: Annotated[float, msgspec.Meta(ge=0.0, le=1e6)] = 0.0
    agents: Annotated[int, msgspec.Meta(ge=1)] | Annotated[tuple[Name, ...], msgspec.Meta(min_length=1)] | None = None
    noticed_s: Annotated[float, msgspec.Meta(ge=0.0, le=1e6)] = 0.0
    factor: Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] = 10.0
    for_s: Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] = 5.0
    down_s: Annotated[float, msgspec.Meta(ge=0.0, le=1e6)] = 1.0
    by_s: Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)] = 3600.0
    per_s: Annotated[float, msgspec.Meta(gt=0.0, le=1e5)] = 100.0


class FaultFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file's top level."""

    faults: tuple[Fault, ...]
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFault:
    """A fault with its agents named. `agents` is empty for those that concern broker or server, and for a `return`
    that only gives a number (`count`): who is away is known when it is due."""

    fault: Fault
    agents: tuple[str, ...] = ()
    count: int = 0

    def describe(self) -> str:
        """One line for the log and the summary, without the moment."""
        whom = ", ".join(self.agents) or (f"{self.count} agents" if self.count else "")
        match self.fault.do:
            case "die":
                return f"{whom} died"
            case "leave":
                return f"{whom} left"
            case "return":
                return f"{whom} returned"
            case "slow":
                return f"{whom} slowed down by a factor of {self.fault.factor:g}"
            case "cut":
                return f"{whom} cut off for {self.fault.for_s:g} s"
            case "clock":
                return f"the clocks of {whom} set by {self.fault.by_s:+g} s"
            case "flood":
                return f"{whom} flooded the server for {self.fault.for_s:g} s, {self.fault.per_s:g} packets a second"
            case "broker-restart":
                return f"broker restarted, down for {self.fault.down_s:g} s"
            case "server-kill":
                return "server killed"


class FaultSchedule:
    """Which faults are due. Drawn agents are fixed here, so that a schedule is a value of (file, agents, seed)."""

    def __init__(self, faults: Sequence[PlannedFault] = ()) -> None:
        self._by_round: dict[int, list[PlannedFault]] = {}
        self.timed: tuple[PlannedFault, ...] = tuple(
            sorted((planned for planned in faults if planned.fault.time_s is not None), key=_time_of)
        )
        for planned in faults:
            if planned.fault.round is not None:
                self._by_round.setdefault(planned.fault.round, []).append(planned)

    def take_round(self, round: int) -> list[PlannedFault]:
        """The faults of that round, once: a second call for the same round gives none."""
        return self._by_round.pop(round, [])

    @property
    def pending_rounds(self) -> tuple[int, ...]:
        """Rounds whose faults were not taken yet."""
        return tuple(sorted(self._by_round))


def load_faults(
    path: Path, *, agents: Sequence[str], seed: int, transport: TransportName, helpers: Sequence[str] = ()
) -> FaultSchedule:
    """The schedule in the file at `path` for these agents. `helpers` may be named, too, but are never drawn.

    Raises `ConfigError` with file, line and column."""
    config, marks = load_config_with_marks(path, FaultFile)
    return plan_faults(
        config, agents=agents, seed=seed, transport=transport, where=str(path), marks=marks, helpers=helpers
    )


def plan_faults(
    config: FaultFile,
    *,
    agents: Sequence[str],
    seed: int,
    transport: TransportName,
    where: str,
    marks: Marks,
    helpers: Sequence[str] = (),
) -> FaultSchedule:
    """Check every fault against the fleet and what connects it, and draw the agents that are only counted.

    A draw depends on (file's seed, run's seed, index of the fault) and skips agents drawn or named before, so that
    two faults `die: 3` hit six agents while there are six."""
    taken: set[str] = set()
    planned: list[PlannedFault] = []
    for index, fault in enumerate(config.faults):
        _check(fault, index, agents, transport, where, marks, helpers)
        if isinstance(fault.agents, tuple):
            planned.append(PlannedFault(fault=fault, agents=fault.agents))
        elif isinstance(fault.agents, int) and fault.do == "return":
            planned.append(PlannedFault(fault=fault, count=fault.agents))
        elif isinstance(fault.agents, int):
            rng = random.Random(f"sordino-faults|{config.seed}|{seed}|{index}")  # a str seed: the same in every process
            fresh = [name for name in agents if name not in taken]
            pool = fresh if len(fresh) >= fault.agents else list(agents)
            planned.append(PlannedFault(fault=fault, agents=tuple(sorted(rng.sample(pool, fault.agents)))))
        else:
            planned.append(PlannedFault(fault=fault))
        if fault.do not in ("return", "cut", "clock"):
            taken.update(planned[-1].agents)
    return FaultSchedule(planned)


def _check(
    fault: Fault,
    index: int,
    agents: Sequence[str],
    transport: TransportName,
    where: str,
    marks: Marks,
    helpers: Sequence[str],
) -> None:
    def wrong(key: str | None, text: str) -> ConfigError:
        path: tuple[str | int, ...] = ("faults", index) if key is None else ("faults", index, key)
        return error_at(where, marks, path, f"faults[{index}]: {text}")

    if (fault.round is None) == (fault.time_s is None):
        raise wrong(None, "give exactly one of `round` and `time_s`")
    possible, why = _ONLY.get(fault.do, ((transport,), ""))
    if transport not in possible:
        raise wrong("do", f"`do: {fault.do}` needs --transport {' or '.join(possible)}, not {transport}: {why}")
    if fault.do in _ON_AGENTS and fault.agents is None:
        raise wrong(None, f"`do: {fault.do}` needs `agents`: a number, or a list of names")
    if fault.do not in _ON_AGENTS and fault.agents is not None:
        raise wrong("agents", f"`do: {fault.do}` concerns no agents; leave `agents` out")
    if isinstance(fault.agents, int) and fault.agents > len(agents):
        raise wrong("agents", f"{fault.agents} agents, but the job has {len(agents)}")
    if isinstance(fault.agents, tuple):
        if len(set(fault.agents)) != len(fault.agents):
            raise wrong("agents", "an agent is named twice")
        known = {*agents, *helpers}
        for name in fault.agents:
            if name not in known:
                raise wrong("agents", f"no agent {name!r} in this fleet ({agents[0]} .. {agents[-1]})")


def _time_of(planned: PlannedFault) -> float:
    return (planned.fault.time_s or 0.0) + planned.fault.after_s
