"""Budgets of simulated owners: the simulated ledgers hold them, and so do the files of a fleet of processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers_sim import boston
from sordino_agent.budget import BudgetSpec
from sordino_agent.config import load_agent_config
from sordino_common.errors import ConfigError, SordinoError
from sordino_sim.fleet_dir import write_fleet
from sordino_sim.runner import simulate
from sordino_sim.scenario import scenario_of

BUDGET = "simulation.budget={epsilon: 3.0, delta: 1.0e-5, agents: 2}"


def test_the_first_so_many_agents_have_it() -> None:
    scenario = scenario_of(boston("simulation.agents=4", BUDGET))
    assert scenario.budgets == dict.fromkeys(("agent-00", "agent-01"), BudgetSpec(epsilon=3.0, delta=1e-5))
    everybody = scenario_of(boston("simulation.agents=4", "simulation.budget={rho: 0.1, delta: 1.0e-5}"))
    assert list(everybody.budgets) == list(everybody.agents)
    assert scenario_of(boston()).budgets == {}


def test_a_budget_is_one_of_two_numbers() -> None:
    with pytest.raises(ConfigError, match="give either epsilon or rho, with delta"):
        boston("simulation.budget={epsilon: 3.0, rho: 0.1, delta: 1.0e-5}")


def test_plain_training_passes_by_who_has_a_budget() -> None:
    """Without noise, owners with a budget refuse by name; the round goes on with the others if the quorum holds."""
    job = boston("simulation.agents=5", "train.rounds=2", "train.quorum=0.5", BUDGET)
    done = simulate(job, with_baseline=False)
    assert done.summary["rounds"] == 2
    refused = str(done.events)
    assert "agent-00" in refused
    assert "without noise, which no budget can pay" in refused


def test_a_fleet_that_cant_pay_ends_the_job_by_name() -> None:
    job = boston("simulation.agents=3", "simulation.budget={epsilon: 3.0, delta: 1.0e-5}")
    with pytest.raises(SordinoError) as caught:
        simulate(job, with_baseline=False)
    assert caught.value.exit_code == 5
    assert "agent-00" in str(caught.value)


def test_the_files_of_a_fleet_have_it_too(tmp_path: Path) -> None:
    folder = write_fleet(scenario_of(boston("simulation.agents=3", BUDGET)), tmp_path / "fleet")
    budgets = {name: load_agent_config(home / "agent.yaml").budgets() for name, home in folder.agents.items()}
    mine = {"boston": BudgetSpec(epsilon=3.0, delta=1e-5)}
    assert {name: list(found.values()) for name, found in budgets.items()} == {
        "agent-00": list(mine.values()),
        "agent-01": list(mine.values()),
        "agent-02": [],
    }
