"""`simulate`: agents in this process that take tensors, for notebooks, tests and guides.

The agents, the link and the server's end are the real ones; the clock is virtual and the wire is memory, or a mosquitto
of our own in real time. Keys come from the seed: nothing here is secret."""

from __future__ import annotations

import math
import signal
import tempfile
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final, Literal, TypeVar

import numpy as np

from sordino_agent.budget import BudgetSpec
from sordino_agent.data.table import Table, table_of
from sordino_agent.policy import Policy
from sordino_agent.spdz.policy import SpdzPolicy
from sordino_common.clock import VirtualLoop
from sordino_common.errors import ConfigError
from sordino_common.messages import Message
from sordino_common.transport.reactor import Reactor
from sordino_server.conductor import Conductor, Interrupted
from sordino_server.rounds.effects import Effect, Gather, Result, gather
from sordino_server.rounds.events import Waiting
from sordino_server.rounds.spdz import World
from sordino_server.run import RunnableLoop
from sordino_server.tensors.fleet import LEASE_S, PointerFleet
from sordino_server.tensors.watch import Watch
from sordino_sim.broker import LocalBroker
from sordino_sim.harness import SERVER, SimulatedFleet
from sordino_sim.keys import simulation_random
from sordino_sim.profiles import DeviceProfile, profile
from sordino_sim.tamper import Tamper
from sordino_sim.wires import MemoryWire, MqttWire, Wire

T = TypeVar("T")
_NAMES: Final = ("alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi")
_JOIN_S: Final = 30.0


def open_policy(names: Sequence[str]) -> Policy:
    """Owners that let what was sent here, or shared, and what came of it, leave again, to the server and each other."""
    return Policy(
        jobs=("describe", "tensors", "spdz-compute", "spdz-data"),
        plans="any",
        fetch="any",
        min_rows=1,
        spdz=SpdzPolicy(outputs={"tensors": (SERVER, *names)}, security="passive"),  # the least that is accepted
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """Agents by name, each with its board and perhaps a dataset; no job."""

    seed: int
    boards: Mapping[str, DeviceProfile]
    datasets: Mapping[str, Table]
    dealer: None = None
    zones: Mapping[str, str] = field(default_factory=dict)
    helpers: Mapping[str, str] = field(default_factory=dict)
    budgets: Mapping[str, BudgetSpec] = field(default_factory=dict)

    receivers: tuple[str, ...] = ()

    def models(self) -> Mapping[str, Mapping[str, bytes]]:
        return {}

    def tables(self) -> Mapping[str, Table | None]:
        return {name: self.datasets.get(name) for name in self.boards}


class SimulatedDriver:
    """A `Driver` on a simulated fleet."""

    def __init__(
        self, fleet: SimulatedFleet, loop: RunnableLoop, stack: ExitStack, *, progress: bool | None = False
    ) -> None:
        self.fleet = fleet
        self._loop = loop
        self._watch = Watch(loop, self._waiting, shown=progress)
        self._stack = stack
        self.messages = 0

    @property
    def members(self) -> Sequence[str]:
        return self.fleet.members

    def drive(self, generator: Generator[Effect, Result, T]) -> T:
        self._conductor.start(generator)
        result: T = self.finish()
        return result

    def begin(self, generator: Generator[Effect, Result, Any]) -> bool:
        conductor = self._conductor
        with self._interruptible() as received:
            conductor.start(generator, at_once=True)
        if received:
            conductor.interrupt("stopped by SIGINT")
        if conductor.done:
            self._result()
        return not conductor.done

    def also(self, name: str, message: Message) -> bool:
        return self._conductor.also(name, message)

    def finish(self) -> Any:
        conductor = self._conductor
        try:
            with self._watch.over(), self._interruptible() as received:
                self._loop.run_until(lambda: conductor.done or bool(received), deadline_s=math.inf)
        finally:
            conductor.interrupt("stopped by SIGINT")  # nothing, if it is done
        return self._result()

    def abandon(self) -> None:
        self._conductor.interrupt("called off")

    @property
    def _conductor(self) -> Conductor:
        conductor = self.fleet.conductor
        assert conductor is not None
        return conductor

    def _result(self) -> Any:
        try:
            return self._conductor.result()
        except Interrupted as stopped:
            raise KeyboardInterrupt(str(stopped)) from None

    def _waiting(self) -> Waiting | None:
        return None if self.fleet.conductor is None else self.fleet.conductor.waiting

    @contextmanager
    def _interruptible(self) -> Iterator[list[int]]:
        """Ctrl-C ends the wait between two callbacks, none of which it may tear; a second one does at once."""
        received: list[int] = []
        if threading.current_thread() is not threading.main_thread():
            yield received
            return

        def handle(number: int, frame: FrameType | None) -> None:
            received.append(number)
            if len(received) > 1:
                raise KeyboardInterrupt
            if isinstance(self._loop, Reactor):
                self._loop.wake()

        before = signal.signal(signal.SIGINT, handle)
        try:
            yield received
        finally:
            signal.signal(signal.SIGINT, before)

    def now_s(self) -> float:
        return self._loop.now_s()

    def world(self) -> World:
        return self.fleet.world()

    def close(self) -> None:
        self._stack.close()


def simulate(
    agents: int | Sequence[str] = 3,
    *,
    data: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    tags: Sequence[str] = (),
    policy: Policy | None = None,
    transport: Literal["memory", "mqtt"] = "memory",
    board: str = "server",
    seed: int = 0,
    lease_s: float = LEASE_S,
    tamper: Tamper | None = None,
    progress: bool | None = None,
) -> PointerFleet:
    """A fleet of `agents` (names, or how many: alice, bob, carol, ...) in this process.

    `data[agent][dataset][column]`: arrays with rows along the first axis, one dataset an agent. `tags`: of every
    dataset. `policy`: of every owner; None is `open_policy`. `transport`: `memory`, on a virtual clock, or `mqtt`,
    through a mosquitto of our own. `tamper`: one member of a committee cheats once, in a session on shares
    (`sordino_sim.tamper`). `progress`: whether long waits are shown, on stderr; None shows them on a terminal, but not
    on the virtual clock. Raises `ConfigError`."""
    names = _names(agents) if isinstance(agents, int) else tuple(agents)
    strangers = sorted(set(data or ()) - set(names))
    if strangers:
        raise ConfigError(f"simulate: data for {', '.join(strangers)}, but the agents are {', '.join(names)}")
    boards = dict.fromkeys(names, profile(board))
    cast = Cast(
        seed=seed, boards=boards, datasets={name: _table(name, given, tags) for name, given in (data or {}).items()}
    )
    with ExitStack() as stack:
        wire: Wire
        loop: RunnableLoop
        if transport == "memory":
            loop = virtual = VirtualLoop()
            wire = MemoryWire(virtual, network=None)
        else:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="sordino-sim-"))
            loop = reactor = stack.enter_context(Reactor())
            wire = MqttWire(reactor, stack.enter_context(LocalBroker(Path(scratch) / "broker")))
        fleet = SimulatedFleet(cast, loop=loop, wire=wire, network=None)
        fleet.policy = open_policy(names) if policy is None else policy
        if tamper is not None:
            fleet.make_party = tamper.make_party()
        stack.callback(fleet.close)
        fleet.start_server()
        fleet.start_agents()
        shown = False if progress is None and transport == "memory" else progress
        driver = SimulatedDriver(fleet, loop, stack, progress=shown)
        present = driver.drive(
            gather(Gather(purpose="agents", without=frozenset(), quorum=len(names), join_s=_JOIN_S, deadline_s=_JOIN_S))
        )
        away = sorted(set(names) - present.boots.keys())
        if away:
            raise ConfigError(f"simulate: {', '.join(away)} did not come online within {_JOIN_S:g} s")
        driver._stack = stack.pop_all()
    return PointerFleet(driver, random=simulation_random(seed, "tensor-ids", 1), lease_s=lease_s)


def _names(count: int) -> tuple[str, ...]:
    if count < 1:
        raise ConfigError(f"simulate: {count} agents; at least one is needed")
    return tuple(_NAMES[k] if k < len(_NAMES) else f"agent-{k:02d}" for k in range(count))


def _table(name: str, given: Mapping[str, Mapping[str, Any]], tags: Sequence[str]) -> Table:
    if len(given) != 1:
        raise ConfigError(f"simulate: {name} has {len(given)} datasets; one an agent is simulated")
    ((dataset, columns),) = given.items()
    return table_of(dataset, {column: np.asarray(values) for column, values in columns.items()}, tags=tags)
