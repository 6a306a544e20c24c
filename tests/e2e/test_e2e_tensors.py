"""`sordino.connect` to a fleet directory whose agents are processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import sordino_server as sordino
from helpers_sim import boston
from sordino_server.tensors.errors import RemoteFailure, WrongPlace
from sordino_sim.broker import LocalBroker
from sordino_sim.fleet_dir import write_fleet
from sordino_sim.processes import AgentProcesses
from sordino_sim.scenario import scenario_of

pytestmark = [pytest.mark.mqtt, pytest.mark.slow]


def test_pointers_to_processes(tmp_path: Path) -> None:
    folder = write_fleet(scenario_of(boston("simulation.agents=2")), tmp_path / "fleet")
    for place in folder.agents.values():
        config = yaml.safe_load((place / "agent.yaml").read_text("utf-8"))
        config["policy"]["jobs"] = [*config["policy"]["jobs"], "tensors"]
        (place / "agent.yaml").write_text(yaml.safe_dump(config), "utf-8")
    with LocalBroker(folder.broker_folder, port=folder.port), AgentProcesses(folder) as agents:
        agents.start_all()
        with sordino.connect(folder.folder / "fleet.yaml", wait_s=60.0) as fleet:
            agent = fleet["agent-00"]
            x = agent.send(torch.arange(6.0).reshape(2, 3))
            total = (x.t() @ x).sum()
            fleet.flush()
            with pytest.raises(RemoteFailure, match=r"policy\.fetch"):  # these owners fetch nothing
                total.get()
            (found, *_) = fleet.search("boston")
            rows = found[found.columns[0]]
            assert rows.shape == (found.rows,)
            (rows * 2).sum()
            with pytest.raises(RemoteFailure, match="never leave the device"):
                rows.get()
            with pytest.raises(WrongPlace, match="there are agent-00, agent-01"):
                fleet["alice"]


def test_shares_on_processes(tmp_path: Path) -> None:
    folder = write_fleet(scenario_of(boston("simulation.agents=2")), tmp_path / "fleet")
    for place in folder.agents.values():
        config = yaml.safe_load((place / "agent.yaml").read_text("utf-8"))
        config["policy"]["jobs"] = [*config["policy"]["jobs"], "tensors", "spdz-compute", "spdz-data"]
        config["policy"]["fetch"] = "any"
        config["policy"]["spdz"] = {"outputs": {"tensors": ["server"]}}
        (place / "agent.yaml").write_text(yaml.safe_dump(config), "utf-8")
    with LocalBroker(folder.broker_folder, port=folder.port), AgentProcesses(folder) as agents:
        agents.start_all()
        with sordino.connect(folder.folder / "fleet.yaml", wait_s=60.0) as fleet:
            (found, *_) = fleet.search("boston")
            rows = (found[["RM", "LSTAT"]] * 0.02).share(*fleet, ranges=1)
            w = fleet.share(torch.tensor([[1.0], [-0.5]]), *fleet).requires_grad_()
            loss = (rows @ w).mean()
            loss.backward()
            assert loss.get().isfinite()
            assert w.grad is not None
            assert fleet.get(w.grad).shape == (2, 1)
            with pytest.raises(RemoteFailure, match="never leave the device"):
                found["RM"].share(*fleet, ranges=16).get()
