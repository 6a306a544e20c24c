"""Chaos on real processes: agents and helpers killed and started again at random, the broker restarted, a disk that is
full, a ledger that is damaged. Afterwards the state on the devices' disks is held against what the server recorded.

`make soak` plays five seeds.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from helpers_disk import fill, small_disk
from helpers_training import Training
from sordino_agent.ledger import Ledger
from sordino_server.job import Job, load_job
from sordino_server.store import RunStore
from sordino_sim.broker import LocalBroker
from sordino_sim.fleet_dir import FleetFolder, write_fleet
from sordino_sim.processes import AgentProcesses
from sordino_sim.scenario import scenario_of

pytestmark = [pytest.mark.mqtt, pytest.mark.slow, pytest.mark.timeout(600)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "boston-dp.yaml"
SETTINGS = (
    "simulation.agents=5",
    "simulation.budget={epsilon: 40.0, delta: 1.0e-5}",
    "train.rounds=4",
    "train.evaluate_every=0",
    "train.quorum=2",
    "train.retries=3",
    "train.join_s=60",
    "train.round_deadline_s=60",
    "train.straggler_s=10",
    "secure_aggregation.minimum=2",
)


def job() -> Job:
    return load_job(EXAMPLE, overrides=SETTINGS)


def arguments(*more: str) -> list[str]:
    return [str(EXAMPLE), *(part for item in (*SETTINGS, *more) for part in ("--set", item))]


@pytest.fixture
def folder(tmp_path: Path) -> FleetFolder:
    return write_fleet(scenario_of(job()), tmp_path / "fleet")


@pytest.fixture
def running(folder: FleetFolder) -> Iterator[tuple[LocalBroker, AgentProcesses]]:
    with LocalBroker(folder.broker_folder, port=folder.port) as broker, AgentProcesses(folder) as agents:
        agents.start_all()
        yield broker, agents


def check(folder: FleetFolder, run: str) -> int:
    """The law of `helpers_chaos`, of what is on disk. Returns how many answers the server has counted."""
    with RunStore(folder.folder, wall_s=time.time) as store:
        records = store.records(run)
        begun = store.begun(run)
    counted = 0
    for name, home in folder.agents.items():
        answered = sum(record.shares[name].outcome == "answered" for record in records if name in record.shares)
        ledger = Ledger(home / "state" / "ledger.sqlite", read_only=True)
        entries = list(ledger.entries())
        ledger.close()
        assert len(entries) >= answered, (name, len(entries), answered)
        counted += answered
    for name, home in folder.helpers.items():
        with closing(sqlite3.connect(home / "state" / "sums.sqlite")) as db:
            rows = db.execute("SELECT session, run, number FROM answered").fetchall()
        assert len({session for session, _, _ in rows}) == len({row[1:] for row in rows}) == len(rows), name
    assert begun >= len(records)
    return counted


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5 if os.environ.get("SORDINO_SOAK") else 1))
def test_processes_are_killed_at_random_and_nothing_is_released_twice(
    folder: FleetFolder, running: tuple[LocalBroker, AgentProcesses], seed: int
) -> None:
    broker, agents = running
    rng = random.Random(f"sordino-e2e-chaos|{seed}")
    names = [*folder.agents, *folder.helpers]
    training = Training(folder, *arguments())
    run = training.wait_for(r"^run ([a-z0-9-]+):").group(1)
    codes = []
    try:
        for _ in range(4):
            training.wait_for(r"round \d/4|agent-\d\d is online")
            for _ in range(2):
                name = rng.choice(names)
                agents.kill(name)
                agents.start(name)
            if rng.random() < 0.5:
                broker.restart()
        for _ in range(5):
            code, _ = training.end()
            codes.append(code)
            if code == 0:
                break
            assert code == 3, training.text
            assert "--resume" in training.text.splitlines()[-1] or "missing" in training.text.splitlines()[-1]
            training.close()
            training = Training(folder, "--resume", run)
    finally:
        training.close()
    assert codes[-1] == 0, (codes, training.text)
    assert check(folder, run) > 0


def test_a_full_disk_and_a_damaged_ledger_are_named(folder: FleetFolder, tmp_path: Path) -> None:
    """agent-00's state is on a disk that is full when the release is to be charged: the server is told why, and goes on
    with the others. Then its ledger is cut short: it does not start."""
    home = folder.agents["agent-00"]
    with small_disk(tmp_path / "small", size="2m") as disk:
        (home / "state").rename(tmp_path / "old")
        (home / "state").symlink_to(disk)
        for path in (tmp_path / "old").iterdir():
            (disk / path.name).write_bytes(path.read_bytes())
            (disk / path.name).chmod(0o600)
        with LocalBroker(folder.broker_folder, port=folder.port), AgentProcesses(folder) as agents:
            agents.start_all()
            training = Training(folder, *arguments("train.rounds=30"))
            try:
                training.wait_for(r"round 2/30: agents 5/5")
                fill(disk)
                code, out = training.end()
            finally:
                training.close()
            assert code == 0, training.text
            assert "agent-00" in training.text and "free some room" in training.text, training.text
            (disk / "ballast").unlink()
        check(folder, json.loads(out)["run"])
        state = disk / "ledger.sqlite"
        state.write_bytes(state.read_bytes()[:5000])
        command = [sys.executable, "-m", "sordino_agent", "run", str(home)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2, done.stderr
        assert "ledger.sqlite: the privacy ledger" in done.stderr.splitlines()[-1]
