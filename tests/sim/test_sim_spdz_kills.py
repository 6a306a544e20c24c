"""Kill -9 of any party at any moment: the run ends at the same model, and nothing is sent under a burnt session again.

`make soak` tries 50 moments.
"""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

from helpers_sim import boston_shares
from sordino_agent.spdz.session import Session
from sordino_common.clock import VirtualLoop
from sordino_common.messages import SpdzShare
from sordino_server.model import make_model
from sordino_server.rounds.effects import Checkpoint
from sordino_server.run_shares import SharedRun, shared_run
from sordino_sim.harness import SERVER, SimulatedFleet
from sordino_sim.scenario import scenario_of
from sordino_sim.wires import MemoryWire

MOMENTS = 50 if os.environ.get("SORDINO_SOAK") else 6
JOB = boston_shares("train.rounds=2", "train.quorum=1.0", "spdz.checkpoint_every=4")


class Play:
    """One run, during which one party is killed and started again."""

    def __init__(self, shared: SharedRun, victim: str, at_s: float) -> None:
        self.shared, self.victim = shared, victim
        self.loop = VirtualLoop()
        scenario = scenario_of(JOB)
        network = scenario.network(server=SERVER)
        wire = MemoryWire(self.loop, network=network)
        self.fleet = SimulatedFleet(scenario, loop=self.loop, wire=wire, network=network)
        self.saved: Checkpoint | None = None
        self.killed = False
        self._start_server()
        self.fleet.start_agents()
        self.loop.call_at(self.loop.now_s() + at_s, self._kill)

    def run(self) -> Checkpoint:
        assert self.loop.run_until(self._done, deadline_s=600.0)
        assert self.fleet.conductor is not None
        result: Checkpoint = self.fleet.conductor.result()
        self.took_s = self.loop.now_s()
        self.fleet.close()
        return result

    def _done(self) -> bool:
        return self.fleet.conductor is not None and self.fleet.conductor.done

    def _start_server(self) -> None:
        conductor = self.fleet.start_server()
        run = SharedRun(job=JOB, model=self.shared.model, world=self.fleet.world())
        conductor.start(run.rounds("kills-1", self.saved), run="kills-1", save=self._save)

    def _save(self, state: Checkpoint) -> None:
        self.saved = state

    def _kill(self) -> None:
        if self._done():
            return
        self.killed = True
        if self.victim == SERVER:
            self.fleet.kill_server()
            self.loop.call_at(self.loop.now_s() + 1.0, self._start_server)
        else:
            self.fleet.die(self.victim)
            self.loop.call_at(self.loop.now_s() + 1.0, lambda: self.fleet.come_back(self.victim))


@pytest.mark.soak
def test_kill_any_party_at_any_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = SimulatedFleet(
        scenario_of(JOB), loop=(loop := VirtualLoop()), wire=MemoryWire(loop, network=None), network=None
    )
    shared = shared_run(JOB, make_model(JOB), fleet.world())
    sent: dict[tuple[int, str, bytes], set[int]] = {}  # (play, agent, session) -> the boots that sent shares in it
    playing: list[Play] = []
    original = Session._send_shares

    def watched(self: Session, shares: tuple[SpdzShare, ...]) -> None:
        boot = playing[-1].fleet.agents[self._agent].boot
        sent.setdefault((len(playing), self._agent, self.id), set()).add(boot)
        journal = playing[-1].fleet.agents[self._agent].journal
        original(self, shares)
        step, attempt = journal.burnt_steps(self.id)
        assert all(share.step < step and share.attempt <= attempt for share in shares)

    monkeypatch.setattr(Session, "_send_shares", watched)
    playing.append(Play(shared, "agent-00", 1e9))
    honest = playing[-1].run()
    whole_s = playing[-1].took_s
    rng = random.Random(3)
    killed = 0
    for _ in range(MOMENTS):
        victim = rng.choice((SERVER, "agent-00", "agent-01", "agent-02", "agent-03"))
        playing.append(Play(shared, victim, rng.uniform(0.0, whole_s)))
        found = playing[-1].run()
        killed += playing[-1].killed
        for value, right in zip(found.params, honest.params, strict=True):
            assert np.abs(value - right).max() < 0.02, (victim, playing[-1].loop.now_s())
    assert killed > MOMENTS // 2
    assert all(len(boots) == 1 for boots in sent.values())
