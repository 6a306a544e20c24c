"""A fleet of several versions: neighbours train together, others are refused by name, on both sides."""

from __future__ import annotations

import pytest

from helpers_sim import boston, boston_secure, boston_shares
from sordino_common.clock import VirtualLoop
from sordino_common.errors import FleetUnavailable
from sordino_common.messages.protocol import PROTOCOL, ProtocolVersion
from sordino_server.job import Job
from sordino_server.rounds.events import Note
from sordino_sim.harness import SERVER, SimulatedFleet
from sordino_sim.runner import simulate
from sordino_sim.scenario import scenario_of
from sordino_sim.wires import MemoryWire

NEXT = ProtocolVersion(PROTOCOL.major, PROTOCOL.minor + 1)
AFTER_NEXT = ProtocolVersion(PROTOCOL.major, PROTOCOL.minor + 2)
OLDER = ProtocolVersion(PROTOCOL.major - 1, 9)
QUICK = ("train.rounds=1", "simulation.agents=4")


@pytest.mark.parametrize(
    ("job", "newer"),
    [
        (boston(*QUICK), (SERVER,)),
        (boston(*QUICK), ("agent-00", "agent-02")),
        (boston_secure(*QUICK, "simulation.agents=6"), ("agent-00", "agent-03", "helper-0")),
        (boston_shares("train.rounds=1", "train.local_steps=2"), ("agent-00", "agent-02")),
    ],
    ids=["server", "agents", "sums", "shares"],
)
def test_neighbours_train_together_and_to_the_same_bits(job: Job, newer: tuple[str, ...]) -> None:
    alike = simulate(job, with_baseline=False)
    mixed = simulate(job, with_baseline=False, protocols=dict.fromkeys(newer, NEXT))
    assert mixed.summary["params_sha256"] == alike.summary["params_sha256"]
    assert mixed.summary["dropouts"] == 0


@pytest.mark.parametrize("version", [OLDER, AFTER_NEXT])
def test_one_agent_of_another_version_is_named_and_the_others_go_on(version: ProtocolVersion) -> None:
    done = simulate(boston(*QUICK, "train.quorum=3"), with_baseline=False, protocols={"agent-01": version})
    remedy = "upgrade sordino on agent-01" if version < PROTOCOL else "upgrade sordino here"
    told = [event.text for event in done.events if isinstance(event, Note) and "protocol" in event.text]
    assert len(told) == 1
    assert told[0].startswith("agent-01 can't take part: ")
    assert f"agent-01 speaks protocol {version}, this side {PROTOCOL}; only" in told[0]
    assert told[0].endswith(f"neighbouring minors of one major work together: {remedy}")
    assert done.summary["rounds"] == 1


def test_a_fleet_of_another_version_than_its_server_is_unavailable_and_says_why() -> None:
    with pytest.raises(FleetUnavailable, match=r"agent-00 \(agent-00 speaks protocol") as caught:
        simulate(boston(*QUICK), with_baseline=False, protocols={SERVER: AFTER_NEXT})
    assert caught.value.exit_code == 3
    assert f"speaks protocol {PROTOCOL}, this side {AFTER_NEXT}" in str(caught.value)


def test_the_agent_names_a_server_of_another_version_until_that_is_upgraded() -> None:
    loop = VirtualLoop()
    wire = MemoryWire(loop, network=None)
    fleet = SimulatedFleet(
        scenario_of(boston(*QUICK)), loop=loop, wire=wire, network=None, protocols={SERVER: AFTER_NEXT}
    )
    fleet.start_server()
    fleet.start_agents()
    endpoint = fleet.agents["agent-00"].endpoint
    assert endpoint is not None
    loop.run_until(lambda: SERVER in endpoint.unlike(), deadline_s=loop.now_s() + 60)
    assert f"server speaks protocol {AFTER_NEXT}, this side {PROTOCOL}" in endpoint.unlike()[SERVER]
    assert "upgrade sordino here" in endpoint.unlike()[SERVER]
    fleet.kill_server()
    del fleet.protocols[SERVER]
    fleet.start_server()
    loop.run_until(lambda: endpoint.online(SERVER), deadline_s=loop.now_s() + 60)
    assert endpoint.unlike() == {}
    fleet.close()
