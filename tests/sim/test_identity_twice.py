"""Two devices with one identity: a copied disk, a card that was cloned. Which one counts, and what each side says."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from helpers_sim import boston
from sordino_agent.core import AgentCore
from sordino_agent.store import TensorStore
from sordino_common.clock import VirtualLoop
from sordino_common.messages import Describe, Described
from sordino_server.rounds.effects import Ask, ask
from sordino_server.rounds.events import Event, Note
from sordino_sim.harness import SERVER, SimulatedFleet
from sordino_sim.mortal import MortalLoop
from sordino_sim.scenario import scenario_of
from sordino_sim.wires import MemoryWire

NAME = "agent-03"


class Twins:
    """A fleet, and a second device with the keys of `agent-03` and a boot number of its own."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        scenario = scenario_of(boston())
        network = scenario.network(server=SERVER)
        self.wire = MemoryWire(self.loop, network=network)
        self.fleet = SimulatedFleet(scenario, loop=self.loop, wire=self.wire, network=network)
        self.told: list[str] = []
        conductor = self.fleet.start_server()
        conductor.observer = self._observe
        self.fleet.agents[NAME].boot = 6  # it has started before
        self.fleet.start_agents()
        self.loop.advance(5.0)
        assert NAME in conductor.online
        core = self.fleet.agents[NAME].core
        assert core is not None
        self.original = core

    def _observe(self, event: Event) -> None:
        if isinstance(event, Note):
            self.told.append(event.text)

    def clone(self, boot: int) -> AgentCore:
        """The copy starts, under `boot`."""
        agent, loop = self.fleet.agents[NAME], MortalLoop(self.loop)
        core = AgentCore(
            name=NAME,
            server=SERVER,
            policy=self.fleet.policy,
            limits=self.original._limits,
            executor=self.original._desk._executor,
            store=TensorStore(budget_bytes=1 << 20),
            loop=loop,
            version="copy",
            identity=agent.identity,
        )
        book = self.fleet._book(loop)
        book.accept(self.fleet._signed)
        core.on_roster(book.require())
        endpoint = self.fleet._endpoint(NAME, agent.identity, book, boot, loop, core)
        core.attach(endpoint)
        core.start()
        endpoint.open()
        return core

    def describe(self) -> dict[str, str]:
        """Which copy answers a question of the server: name -> version; or why nobody does."""
        conductor = self.fleet.conductor
        assert conductor is not None
        question = Ask(
            purpose="who", messages={NAME: Describe()}, expects=Described, quorum=1, deadline_s=60.0, straggler_s=60.0
        )
        conductor.start(ask(question))
        assert self.loop.run_until(lambda: conductor.done, deadline_s=self.loop.now_s() + 100.0)
        answers = conductor.result()
        found = {name: reply.version for name, reply in answers.replies.items()}
        return {**found, **answers.missing, **answers.refusals}


@pytest.fixture
def twins() -> Iterator[Twins]:
    made = Twins()
    yield made
    made.fleet.close()


@pytest.mark.parametrize("boot", [9, 7, 5])
def test_they_cut_each_other_off_and_the_greater_boot_counts(
    twins: Twins, boot: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sordino.agent"):
        twins.clone(boot)
        twins.loop.advance(300.0)
    taken = [record.message for record in caplog.records if "another client uses this client id" in record.message]
    assert len(taken) > 3, "each is told why it was cut off, again and again"
    flaps = [text for text in twins.told if "agent-03 has gone away 5 times" in text]
    assert flaps and "two devices with its identity" in flaps[0]
    # The original is in boot 7. Whoever has the smaller number is heard by nobody, also while the other is cut off.
    heard = {twins.describe()[NAME] for _ in range(5)}
    greater = {9: "copy", 7: None, 5: "simulated"}[boot]
    assert heard <= {greater, "offline", "went offline"} if greater else heard, heard
    others = set(twins.fleet.members) - {NAME}
    assert twins.fleet.conductor is not None and others <= twins.fleet.conductor.online.keys()


def test_the_smaller_boot_stays_alone_and_is_not_heard(twins: Twins) -> None:
    """The original has gone for good, its copy knows an older boot number only: refused, with the reason."""
    twins.fleet.die(NAME)
    core = twins.clone(5)
    twins.loop.advance(120.0)
    assert core.connected
    assert twins.fleet.conductor is not None and NAME not in twins.fleet.conductor.online
    assert twins.describe()[NAME] == "offline"
