"""`connect` and `simulate`: where a fleet for pointers comes from."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from sordino_common.errors import ConfigError, FleetUnavailable
from sordino_common.messages import Message
from sordino_server.conductor import Interrupted
from sordino_server.fleet import Fleet, begin, drive, finish, interruptible, open_fleet
from sordino_server.home import Home
from sordino_server.rounds.effects import Effect, Gather, Result, gather
from sordino_server.rounds.spdz import World
from sordino_server.tensors.fleet import DEADLINE_S, LEASE_S, PointerFleet
from sordino_server.tensors.watch import Watch

T = TypeVar("T")
_JOIN_S: Final = 10.0


class ConnectedDriver:
    """A `Driver` on a real fleet. Nothing runs between two calls: leases are renewed by what is sent."""

    def __init__(self, fleet: Fleet, stack: ExitStack, *, progress: bool | None = None) -> None:
        self._fleet = fleet
        self._stack = stack
        self._watch = Watch(fleet.reactor, lambda: fleet.conductor.waiting, shown=progress)

    @property
    def members(self) -> Sequence[str]:
        """Agents with data, and those that only compute: a committee needs them, too."""
        able = {"data", "compute"}
        return tuple(sorted(entry.name for entry in self._fleet.roster.entries if able & set(entry.roles)))

    def drive(self, generator: Generator[Effect, Result, T]) -> T:
        """Ctrl-C ends the wait in order, and arrives as `KeyboardInterrupt`."""
        return self._through(lambda: drive(self._fleet, lambda: generator))

    def begin(self, generator: Generator[Effect, Result, Any]) -> bool:
        """As `Driver.begin`; Ctrl-C as in `drive`."""
        return self._through(lambda: begin(self._fleet, generator))

    def also(self, name: str, message: Message) -> bool:
        """As `Driver.also`."""
        return self._fleet.conductor.also(name, message)

    def finish(self) -> Any:
        """As `Driver.finish`; Ctrl-C as in `drive`."""
        return self._through(lambda: finish(self._fleet))

    def abandon(self) -> None:
        """As `Driver.abandon`."""
        self._fleet.conductor.interrupt("called off")

    def _through(self, wait: Callable[[], T]) -> T:
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError("a fleet is used from the main thread: signals and the broker's socket are handled there")
        try:
            with self._watch.over(), interruptible(self._fleet):
                return wait()
        except Interrupted as stopped:
            raise KeyboardInterrupt(str(stopped)) from None

    def now_s(self) -> float:
        return self._fleet.reactor.now_s()

    def world(self) -> World:
        return self._fleet.world()

    def close(self) -> None:
        self._stack.close()


def connect(
    where: str | Path,
    *,
    wait_s: float = _JOIN_S,
    lease_s: float = LEASE_S,
    deadline_s: float = DEADLINE_S,
    progress: bool | None = None,
) -> PointerFleet:
    """The fleet of a fleet directory, or of the `fleet.yaml` in it, as its server.

    Waits until all agents of the roster are online, at most `wait_s`. Who comes later is found when it is asked.
    `lease_s`: how long an agent keeps what nobody asks for. `progress`: whether long waits are shown, on stderr; None
    shows them on a terminal. Raises `ConfigError` (keys, roster, another process of this fleet) and `FleetUnavailable`
    (the broker; no agent at all)."""
    path = Path(where)
    home = Home(path.parent if path.name == "fleet.yaml" else path)
    with ExitStack() as stack:
        fleet = stack.enter_context(open_fleet(home, version=version("sordino")))
        driver = ConnectedDriver(fleet, stack, progress=progress)
        present = driver.drive(
            gather(Gather(purpose="agents", without=frozenset(), quorum=1, join_s=wait_s, deadline_s=wait_s))
        )
        if not present.boots:
            raise FleetUnavailable(
                f"none of {', '.join(fleet.members) or 'the roster, which names no data agent,'} came online within "
                f"{wait_s:g} s; is sordino-agent running there? (sordino agents --fleet {home.folder})"
            )
        driver._stack = stack.pop_all()
    return PointerFleet(driver, lease_s=lease_s, deadline_s=deadline_s)


def simulate(*args: Any, **kwargs: Any) -> PointerFleet:
    """`sordino_sim.pointers.simulate`: a fleet in this process. See there for the arguments.

    The simulator stands above the server and imports it, so it is looked up when it is called."""
    try:
        module = importlib.import_module("sordino_sim.pointers")
    except ModuleNotFoundError as error:
        raise ConfigError(f"simulate: the simulator is not installed ({error}); pip install 'sordino[sim]'") from None
    return cast(Callable[..., PointerFleet], module.simulate)(*args, **kwargs)
