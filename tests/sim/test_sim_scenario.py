from pathlib import Path

import numpy as np
import pytest

from sordino_common.errors import ConfigError
from sordino_server.job import Job, load_job
from sordino_server.public_data import load_public, split_rows
from sordino_sim.faults import TransportName
from sordino_sim.network import BROKER
from sordino_sim.scenario import agent_names, scenario_of

TRANSPORTS: tuple[TransportName, ...] = ("memory", "mqtt", "processes")
EXAMPLES = Path(__file__).parents[2] / "examples"


def job(*overrides: str) -> Job:
    return load_job(EXAMPLES / "boston-fedavg.yaml", overrides=overrides)


def test_a_mix_of_boards_is_dealt_out_in_turn() -> None:
    scenario = scenario_of(job("simulation.agents=5", "simulation.profile='pi3:2,pi-zero2'"))
    assert [board.name for board in scenario.boards.values()] == ["pi3", "pi3", "pi-zero2", "pi3", "pi3"]
    assert scenario.describe("memory")["profile"] == {"pi3": 4, "pi-zero2": 1}


def test_the_jobs_figures_replace_those_of_the_board() -> None:
    scenario = scenario_of(
        job("simulation.profile=pi3", "simulation.network.latency_s=0.5", "simulation.network.jitter_s=0")
    )
    network = scenario.network(server="server")
    assert network.link("agent-00").latency_s == 0.5 and network.link("agent-00").up_bps == 94e6
    assert network.link("server").latency_s == 0.0005
    assert network.deliveries("agent-00", BROKER, 0, 0.0)[0] == pytest.approx(0.5, abs=1e-4)
    assert scenario.describe("memory")["network"] == {"latency_s": 0.5, "jitter_s": 0.0}


def test_what_a_transport_does_not_simulate_is_not_said_to_be_simulated() -> None:
    scenario = scenario_of(job("simulation.profile=pi3", "simulation.network.loss=0.1"))
    assert scenario.without_effect("memory") == []
    assert [setting for setting, _ in scenario.without_effect("mqtt")] == ["simulation.network"]
    assert [setting for setting, _ in scenario.without_effect("processes")] == [
        "simulation.profile",
        "simulation.network",
    ]
    assert scenario_of(job()).without_effect("processes") == []
    said = {name: (scenario.describe(name)["profile"], scenario.describe(name)["network"]) for name in TRANSPORTS}
    assert said == {"memory": ("pi3", {"loss": 0.1}), "mqtt": ("pi3", None), "processes": (None, None)}


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_every_row_is_with_one_agent_and_the_test_rows_are_the_baselines(partition: str) -> None:
    scenario = scenario_of(job(f"simulation.partition={partition}", "simulation.alpha=0.1", "train.seed=4"))
    tables = scenario.tables()
    assert tuple(tables) == agent_names(10) == scenario.agents
    source = load_public("boston")
    train, test = split_rows(source.rows, 0.2, 4)
    for split, expected in (("train", train), ("test", test)):
        found = np.concatenate([table.column("MEDV")[table.rows(split)] for table in tables.values()])  # type: ignore[arg-type]
        other = np.concatenate([table.column("LSTAT")[table.rows(split)] for table in tables.values()])  # type: ignore[arg-type]
        pairs = sorted(zip(found.tolist(), other.tolist(), strict=True))
        assert pairs == sorted(zip(source.columns["MEDV"][expected], source.columns["LSTAT"][expected], strict=True))


def test_names_sort_as_they_count() -> None:
    assert agent_names(3) == ("agent-00", "agent-01", "agent-02")
    assert list(agent_names(1000)) == sorted(agent_names(1000))
    assert agent_names(1000)[-1] == "agent-999"


@pytest.mark.parametrize("name", ["pi9", "pi3:0", "pi3:x", ""])
def test_a_profile_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="profile"):
        scenario_of(job(f"simulation.profile='{name}'" if name else "simulation.profile=','"))


def test_more_agents_than_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="405 rows for 406 agents"):
        scenario_of(job("simulation.agents=406")).tables()


def test_a_column_that_the_source_lacks_is_named_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"no column 'HEIGHT'.*CRIM"):
        scenario_of(job("data.target=HEIGHT")).tables()
