"""One run on the simulated fleet with real agents, helpers and boxes, in the test's hands: what is sent can be changed,
what is saved and told can be looked at."""

from __future__ import annotations

from collections.abc import Callable, Generator

from sordino_common import messages as m
from sordino_common.clock import VirtualLoop
from sordino_server.job import Job
from sordino_server.rounds.effects import Checkpoint, Effect, Result
from sordino_server.rounds.events import Event, Note
from sordino_sim.harness import SERVER, SimulatedFleet
from sordino_sim.scenario import scenario_of
from sordino_sim.wires import MemoryWire

Change = Callable[[str, m.Message], m.Message | None]


class BasePlay:
    """One run named `name`. `change(name, message)`: what a party sends instead of `message`; None: nothing.

    Subclasses say what `rounds(resumed)` are."""

    name = "play-1"

    def __init__(
        self,
        job: Job,
        *,
        change: Change | None = None,
        on_event: Callable[[BasePlay, Event], None] = lambda play, event: None,
    ) -> None:
        self.job = job
        self.on_event = on_event
        self.events: list[Event] = []
        self.saved: list[Checkpoint] = []
        self.sums = self.begun = 0
        self.sent: list[tuple[str, m.Message]] = []
        self.loop = VirtualLoop()
        scenario = scenario_of(self.job)
        network = scenario.network(server=SERVER)
        self.fleet = SimulatedFleet(
            scenario, loop=self.loop, wire=MemoryWire(self.loop, network=network), network=network
        )
        self.start_server()
        self.fleet.start_agents()
        for name, agent in (*self.fleet.agents.items(), *self.fleet.helpers.items()):
            assert agent.core is not None
            assert agent.endpoint is not None
            agent.core.attach(_Between(self, name, agent.endpoint, change))  # type: ignore[arg-type]

    def rounds(self, resumed: Checkpoint | None) -> Generator[Effect, Result, Checkpoint]:
        raise NotImplementedError

    def start_server(self) -> None:
        conductor = self.fleet.start_server()
        conductor.observer = self._observe
        rounds = self.rounds(self.saved[-1] if self.saved else None)
        conductor.start(rounds, run=self.name, save=self.saved.append, begin=self._begin, next_sum=self._next_sum)

    def run(self, *, within_s: float = 2000.0) -> Checkpoint:
        assert self.loop.run_until(self._done, deadline_s=within_s)
        assert self.fleet.conductor is not None
        try:
            result: Checkpoint = self.fleet.conductor.result()
        finally:
            self.fleet.close()
        return result

    def notes(self) -> str:
        return "\n".join(event.text for event in self.events if isinstance(event, Note))

    def of(self, kind: type[m.Message]) -> list[tuple[str, m.Message]]:
        return [(name, message) for name, message in self.sent if isinstance(message, kind)]

    def _done(self) -> bool:
        return self.fleet.conductor is not None and self.fleet.conductor.done

    def _observe(self, event: Event) -> None:
        self.events.append(event)
        self.on_event(self, event)

    def _begin(self, releases: int) -> None:
        self.begun = max(self.begun, releases)

    def _next_sum(self) -> int:
        self.sums += 1
        return self.sums


class _Between:
    """A sender that changes what goes through it."""

    def __init__(self, play: BasePlay, name: str, endpoint: object, change: Change | None) -> None:
        self._play, self._name, self._endpoint, self._change = play, name, endpoint, change

    def send(self, to: str, message: m.Message, **more: object) -> bytes:
        changed = message if self._change is None else self._change(self._name, message)
        if changed is None:
            return b""
        self._play.sent.append((self._name, changed))
        return self._endpoint.send(to, changed, **more)  # type: ignore[attr-defined, no-any-return]

    def end_context(self, peer: str, context: bytes) -> None:
        self._endpoint.end_context(peer, context)  # type: ignore[attr-defined]
