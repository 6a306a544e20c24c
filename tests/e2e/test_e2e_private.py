"""Private jobs over a real broker with real agent processes, helpers among them: the budget is on their disks."""

from __future__ import annotations

from pathlib import Path

import pytest

from sordino_common.errors import BudgetRefused
from sordino_server.job import Job, load_job
from sordino_sim.runner import simulate

EXAMPLES = Path(__file__).parents[2] / "examples"
FEW = ("simulation.agents=5", "train.join_s=60", "train.round_deadline_s=60")

pytestmark = [pytest.mark.mqtt, pytest.mark.slow]


def job(name: str, *overrides: str) -> Job:
    return load_job(EXAMPLES / f"{name}.yaml", overrides=(*FEW, *overrides))


def test_noised_gradients_of_real_agents_keep_their_epsilon() -> None:
    summary = simulate(job("boston-dp", "train.rounds=3"), transport="processes").summary
    privacy = summary["privacy"]
    assert (summary["rounds"], summary["agents"], privacy["releases"]) == (3, 5, 3)
    assert privacy["epsilon"] <= 0.5
    assert summary["security"] == "secure-aggregation"
    assert summary["metrics"]["test_mse"] > 0.0


def test_statistics_of_real_agents() -> None:
    summary = simulate(job("boston-statistics", "statistics.count={}"), transport="processes").summary
    assert summary["privacy"]["releases"] == 1
    assert 300 < summary["statistics"]["count"]["rows"] < 500
    assert set(summary["statistics"]["ridge"]["coefficients"]) == {"RM", "LSTAT", "PTRATIO"}


def test_real_agents_that_cant_pay_end_it_by_name() -> None:
    with pytest.raises(BudgetRefused, match="agent-00") as caught:
        simulate(job("boston-statistics", "simulation.budget={epsilon: 0.2, delta: 1.0e-5}"), transport="processes")
    assert caught.value.exit_code == 5
