from pathlib import Path

import numpy as np
import pytest

from sordino_common.errors import ConfigError
from sordino_sim.network import BROKER
from sordino_sim.scenario import load_scenario

AGENTS = [f"agent-{index}" for index in range(5)]


def test_a_mix_of_boards_is_dealt_out_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text("profile: {pi3: 2, pi-zero2: 1}\ndata: {split: dirichlet, alpha: 0.2}\n")
    scenario = load_scenario(path)
    assert [board.name for board in scenario.profiles(AGENTS).values()] == ["pi3", "pi3", "pi-zero2", "pi3", "pi3"]
    parts = scenario.split(np.arange(60) % 3, agents=5, seed=1)
    assert sorted(np.concatenate(parts).tolist()) == list(range(60))


def test_figures_replace_those_of_the_board() -> None:
    scenario = load_scenario(None, overrides=["profile=pi3", "network.latency_s=0.5", "network.jitter_s=0"])
    network = scenario.simulated_network(AGENTS, server="server", seed=1)
    assert network.link("agent-0").latency_s == 0.5 and network.link("agent-0").up_bps == 94e6
    assert network.link("server").latency_s == 0.0005
    assert network.deliveries("agent-0", BROKER, 0, 0.0)[0] == pytest.approx(0.5, abs=1e-4)
    assert scenario.describe()["network"] == {"latency_s": 0.5, "jitter_s": 0}


def test_a_partition_names_its_agents(tmp_path: Path) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text("network: {partitions: [{start_s: 1, end_s: 4, agents: [agent-1]}]}\n")
    network = load_scenario(path).simulated_network(AGENTS, server="server", seed=1)
    assert network.deliveries(BROKER, "agent-1", 10, 2.0)[0] > 4.0 > network.deliveries(BROKER, "agent-2", 10, 2.0)[0]


@pytest.mark.parametrize(
    ("override", "text"),
    [("profile=pi9", "pi9"), ("profile={}", "empty mix"), ("network.loss=1.5", "loss"), ("data.split=odd", "split")],
)
def test_what_is_wrong_is_refused(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_scenario(None, overrides=[override]).profiles(AGENTS)
