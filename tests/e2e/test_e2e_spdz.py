"""Shares on a real fleet: mosquitto, `sordino-agent run` processes with their workers, `sordino train` as a process.

Whoever is killed, by SIGKILL and in mid-session: the run goes on from its checkpoint in a new session and ends at the
same model, but for roundings; a burnt session is never entered again.
"""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from helpers_sim import EXAMPLES, QUICK_SHARES, boston_shares
from helpers_training import Training
from sordino_agent.status import read_status
from sordino_server.checkpoint_files import Tensors
from sordino_server.store import RunStore
from sordino_sim.broker import LocalBroker
from sordino_sim.fleet_dir import FleetFolder, write_fleet
from sordino_sim.processes import DEALER, AgentProcesses
from sordino_sim.runner import simulate
from sordino_sim.scenario import scenario_of

pytestmark = [pytest.mark.mqtt, pytest.mark.slow, pytest.mark.timeout(300)]

SETTINGS = (
    "train.rounds=4",
    "train.local_steps=40",
    "train.round_deadline_s=120",
    "train.join_s=60",
    "train.quorum=1.0",
    "simulation.agents=3",
    "spdz.silence_s=30",
    "spdz.checkpoint_every=20",
)


@pytest.fixture(scope="module")
def undisturbed() -> Tensors:
    return simulate(boston_shares(*SETTINGS), with_baseline=False).result.tensors


@dataclass
class Stage:
    """One fleet: its folder, broker, agents, and the trainings that were started."""

    folder: FleetFolder
    broker: LocalBroker
    agents: AgentProcesses
    trainings: list[Training] = field(default_factory=list)

    def train(self, *arguments: str) -> Training:
        if not arguments or arguments[0].startswith("--run"):
            changes = (*QUICK_SHARES, *SETTINGS)
            job = [str(EXAMPLES / "boston-spdz.yaml"), *(part for change in changes for part in ("--set", change))]
            arguments = (*job, *arguments)
        self.trainings.append(Training(self.folder, *arguments))
        return self.trainings[-1]

    def model(self, run: str) -> Tensors:
        with RunStore(self.folder.folder, wall_s=time.time) as store:
            return store.tensors(run)

    def burnt(self, name: str) -> list[bytes]:
        """The sessions that are burnt on an agent's disk, in order."""
        with closing(sqlite3.connect(self.folder.agents[name] / "state" / "journal.sqlite")) as db:
            return [row[0] for row in db.execute("SELECT session FROM sessions ORDER BY burnt_s")]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    folder = write_fleet(scenario_of(boston_shares(*SETTINGS)), tmp_path / "fleet")
    with LocalBroker(folder.broker_folder, port=folder.port) as broker, AgentProcesses(folder) as agents:
        agents.start_all()
        stage = Stage(folder, broker, agents)
        yield stage
        for training in stage.trainings:
            training.close()


def near(found: Tensors, right: Tensors) -> None:
    for name, value in right.items():
        assert np.abs(found[name] - value).max() < 0.05, name


def test_a_real_fleet_trains_on_shares(stage: Stage, undisturbed: Tensors) -> None:
    summary = stage.train().finish()
    assert (summary["steps"], summary["security"], summary["sessions"]) == (160, "active", 1)
    assert summary["mac_checks"] == 80
    near(stage.model(summary["run"]), undisturbed)


@pytest.mark.parametrize("round_", [1, 3])
def test_an_agent_that_is_killed_comes_back_and_the_run_goes_on(
    round_: int, stage: Stage, undisturbed: Tensors
) -> None:
    training = stage.train()
    training.wait_for(f"round {round_}/4: ")
    stage.agents.kill("agent-01")
    stage.agents.start("agent-01")
    summary = training.finish()
    assert summary["sessions"] == 2, training.text
    near(stage.model(summary["run"]), undisturbed)
    burnt = stage.burnt("agent-00")
    assert len(burnt) == len(set(burnt)) == 2


def test_a_worker_that_is_killed_costs_a_session(stage: Stage, undisturbed: Tensors) -> None:
    training = stage.train()
    training.wait_for("round 1/4: ")
    status = read_status(stage.folder.agents["agent-02"] / "state" / "status.json")
    assert status.worker_pid is not None
    os.kill(status.worker_pid, signal.SIGKILL)
    summary = training.finish()
    assert summary["sessions"] == 2, training.text
    assert re.search(
        r"agent-02: the (worker process was killed by SIGKILL|process that computes has lost)", training.text
    )
    near(stage.model(summary["run"]), undisturbed)


def test_a_server_that_is_killed_resumes(stage: Stage, undisturbed: Tensors) -> None:
    first = stage.train("--run", "killed-1")
    first.wait_for("round 2/4: ")
    first.kill()
    resumed = stage.train("--resume", "killed-1")
    summary = resumed.finish()
    assert summary["steps"] == 160
    near(stage.model("killed-1"), undisturbed)
    burnt = stage.burnt("agent-00")
    assert len(burnt) == len(set(burnt)) == 2


def test_a_dealer_of_its_own(tmp_path: Path, undisturbed: Tensors) -> None:
    """`sordino dealer run`: killed once, it comes back with the masks of the last checkpoint."""
    job = boston_shares(*SETTINGS, "spdz.dealer=midas")
    folder = write_fleet(scenario_of(job), tmp_path / "fleet")
    with LocalBroker(folder.broker_folder, port=folder.port) as broker, AgentProcesses(folder) as agents:
        agents.start_all()
        stage = Stage(folder, broker, agents)
        training = stage.train("--run", "midas-1", "--set", "spdz.dealer=midas")
        try:
            training.wait_for("round 1/4: ")
            agents.kill(DEALER)
            agents.start_dealer()
            summary = training.finish()
        finally:
            training.close()
        assert summary["sessions"] == 2, training.text
        near(stage.model("midas-1"), undisturbed)


def test_a_broker_that_restarts_costs_nothing(stage: Stage, undisturbed: Tensors) -> None:
    training = stage.train()
    training.wait_for("round 1/4: ")
    stage.broker.restart()
    summary = training.finish()
    assert summary["sessions"] == 1, training.text
    near(stage.model(summary["run"]), undisturbed)
