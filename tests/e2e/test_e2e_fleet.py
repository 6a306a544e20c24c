"""A real fleet on this machine: mosquitto, ten `sordino-agent run` processes, `sordino train` as a process of its own.

The undisturbed result is the simulator's, computed in memory: the real fleet has to reach the same parameters, bit for
bit, also when the broker restarts or the server is killed and resumes. Every wait has a deadline, and every process is
ended by its own id.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers_sim import EXAMPLES, boston
from helpers_training import Training
from sordino_server.dashboard.source import Source
from sordino_server.store import RunStore
from sordino_sim.broker import LocalBroker
from sordino_sim.fleet_dir import FleetFolder, write_fleet
from sordino_sim.processes import AgentProcesses
from sordino_sim.runner import digest_of, simulate
from sordino_sim.scenario import scenario_of

pytestmark = [pytest.mark.mqtt, pytest.mark.timeout(300)]

KILLED = ("agent-02", "agent-05", "agent-08")

# Rounds of a second or more, so that what happens right after one began happens in its middle.
SETTINGS = (
    "model.args.hidden=[8]",
    "train.rounds=3",
    "train.local_epochs=null",
    "train.local_steps=2000",
    "train.round_deadline_s=120",
    "train.straggler_s=60",
    "train.join_s=60",
)


@pytest.fixture(scope="module")
def undisturbed() -> str:
    """Digest of the parameters that the job leads to."""
    done = simulate(boston(*SETTINGS), with_baseline=False)
    return str(done.summary["params_sha256"])


class Stage:
    """One fleet: its folder, broker, agents, and the trainings that were started."""

    def __init__(self, folder: FleetFolder, broker: LocalBroker, agents: AgentProcesses) -> None:
        self.folder = folder
        self.broker = broker
        self.agents = agents
        self.trainings: list[Training] = []

    def train(self, *arguments: str) -> Training:
        training = Training(self.folder, *arguments)
        self.trainings.append(training)
        return training

    def job(self) -> list[str]:
        return [str(EXAMPLES / "boston-fedavg.yaml"), *(part for item in SETTINGS for part in ("--set", item))]

    def digest(self, run: str) -> str:
        with RunStore(self.folder.folder, wall_s=time.time) as store:
            return digest_of(store.tensors(run))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    folder = write_fleet(scenario_of(boston(*SETTINGS)), tmp_path / "fleet")
    with LocalBroker(folder.broker_folder, port=folder.port) as broker, AgentProcesses(folder) as agents:
        agents.start_all()
        stage = Stage(folder, broker, agents)
        yield stage
        for training in stage.trainings:
            training.close()


def test_a_fleet_of_processes_reaches_the_simulators_parameters(stage: Stage, undisturbed: str) -> None:
    training = stage.train(*stage.job())
    training.wait_for(r"round 1/3")
    with Source(stage.folder.folder, version="1") as source:
        seen = source.view()  # beside the training, as `sordino top` does
        assert seen.now is not None and seen.now.status == "running" and seen.now.round >= 1
        assert len(seen.agents) == 10 and seen.count("unknown", "offline") == 0
        code, out = training.end()
        assert source.view().runs_by_status == {"done": 1}
    assert code == 0, training.text
    summary = json.loads(out)
    assert (summary["agents"], summary["rounds"], summary["dropouts"]) == (10, 3, 0)
    assert summary["bytes_up"] > 0 < summary["bytes_down"]
    assert stage.digest(summary["run"]) == undisturbed


@pytest.mark.slow
def test_three_agents_are_killed_in_mid_round(stage: Stage) -> None:
    training = stage.train(*stage.job())
    training.wait_for(r"round 1/3")
    for name in KILLED:
        stage.agents.kill(name)
    code, out = training.end()
    assert code == 0, training.text
    summary = json.loads(out)
    assert summary["rounds"] == 3
    # Whoever had answered round 1 before it was killed is missed by nobody; the others are, each by its name.
    missed = [name for name in KILLED if f"without {name}" in training.text]
    assert summary["dropouts"] == len(missed) <= len(KILLED)
    assert re.search(r"round 3/3.*agents 7/7", training.text)


@pytest.mark.slow
def test_the_broker_restarts_in_mid_round(stage: Stage, undisturbed: str) -> None:
    training = stage.train(*stage.job())
    training.wait_for(r"round 1/3")
    stage.broker.restart()
    code, out = training.end()
    assert code == 0, training.text
    summary = json.loads(out)
    assert "the broker is away" in training.text and "the broker is back" in training.text
    assert summary["dropouts"] == 0
    assert stage.digest(summary["run"]) == undisturbed


@pytest.mark.slow
def test_the_server_is_killed_and_resumes_to_the_same_parameters(stage: Stage, undisturbed: str) -> None:
    training = stage.train(*stage.job())
    run = training.wait_for(r"^run ([a-z0-9-]+):").group(1)
    training.wait_for(r"round 1/3")
    training.kill()
    resumed = stage.train("--resume", run)
    resumed.wait_for(rf"^run {run}: .* going on at round 2")
    code, out = resumed.end()
    assert code == 0, resumed.text
    summary = json.loads(out)
    assert summary["run"] == run and summary["rounds"] == 3
    assert stage.digest(run) == undisturbed


@pytest.mark.slow
def test_a_quorum_that_is_missed_names_the_agents(stage: Stage) -> None:
    for name in KILLED:
        stage.agents.kill(name)
    changes = ("train.quorum=8", "train.join_s=5", "train.round_deadline_s=30")
    training = stage.train(*stage.job(), *(part for item in changes for part in ("--set", item)))
    code, out = training.end()
    assert (code, out) == (3, ""), training.text
    for name in KILLED:
        assert name in training.text.splitlines()[-1]


@pytest.mark.slow
def test_without_a_broker_the_command_says_so(stage: Stage) -> None:
    stage.broker.stop()
    training = stage.train(*stage.job())
    code, out = training.end()
    assert (code, out) == (3, ""), training.text
    assert f"127.0.0.1:{stage.folder.port}" in training.text.splitlines()[-1]
