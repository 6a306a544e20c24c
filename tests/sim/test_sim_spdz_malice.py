"""A malicious broker: right result, or a named abort before the deadline. `make soak` plays 300 schedules."""

from __future__ import annotations

import os

import numpy as np
import pytest

from helpers_sim import boston_shares
from sordino_common.clock import VirtualLoop
from sordino_common.errors import SordinoError
from sordino_common.transport.memory import Publication
from sordino_server.model import make_model
from sordino_server.rounds.effects import Checkpoint
from sordino_server.run_shares import SharedRun, shared_run
from sordino_sim.harness import SERVER, SimulatedFleet
from sordino_sim.malice import MaliciousBroker
from sordino_sim.scenario import scenario_of
from sordino_sim.wires import MemoryWire

SCHEDULES = 300 if os.environ.get("SORDINO_SOAK") else 10
DEADLINE_S = 900.0  # virtual: every wait of the job together, its retries included
JOB = boston_shares(
    "train.rounds=1", "train.round_deadline_s=20", "spdz.silence_s=10", "train.retries=2", "train.quorum=1.0"
)


def play(shared: SharedRun, seed: int | None, past: tuple[Publication, ...] = ()) -> tuple[Checkpoint, MemoryWire]:
    """One run over a broker that plays schedule `seed`; None is an honest one."""
    loop = VirtualLoop()
    scenario = scenario_of(JOB)
    network = scenario.network(server=SERVER)
    broker = None if seed is None else MaliciousBroker(loop, seed=seed, network=network, past=past)
    wire = MemoryWire(loop, network=network, broker=broker)
    fleet = SimulatedFleet(scenario, loop=loop, wire=wire, network=network)
    conductor = fleet.start_server()
    fleet.start_agents()
    run = SharedRun(job=JOB, model=shared.model, world=fleet.world())
    conductor.start(run.rounds("malice-1", None), run="malice-1", save=lambda state: None)
    try:
        assert loop.run_until(lambda: conductor.done, deadline_s=DEADLINE_S), "no end before the deadline"
        return conductor.result(), wire
    finally:
        fleet.close()


@pytest.mark.soak
def test_a_malicious_broker_gets_a_right_result_or_a_named_abort() -> None:
    fleet = SimulatedFleet(
        scenario_of(JOB), loop=(loop := VirtualLoop()), wire=MemoryWire(loop, network=None), network=None
    )
    shared = shared_run(JOB, make_model(JOB), fleet.world())
    honest, _ = play(shared, None)
    done, aborted = 0, dict[int, SordinoError]()
    deeds: dict[str, int] = {}
    past: tuple[Publication, ...] = ()
    for seed in range(SCHEDULES):
        try:
            found, wire = play(shared, seed, past)
        except SordinoError as error:
            aborted[seed] = error
            continue
        assert isinstance(wire.broker, MaliciousBroker)
        past = tuple(wire.broker.seen)  # an old session, to be replayed to the next
        for deed, count in wire.broker.counts.items():
            deeds[deed] = deeds.get(deed, 0) + count
        for value, right in zip(found.params, honest.params, strict=True):
            assert np.abs(value - right).max() < 0.02, seed
        done += 1
    assert all(error.exit_code in (3, 4) and str(error) for error in aborted.values()), aborted
    assert done > SCHEDULES // 4, aborted
    assert all(deeds[deed] for deed in deeds), deeds
