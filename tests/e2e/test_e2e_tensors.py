"""`sordino.connect` to a fleet directory whose agents are processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import sordino_server as sordino
from helpers_sim import boston
from sordino_common.messages import Health, HealthReport
from sordino_server.tensors.errors import RemoteFailure, WrongPlace
from sordino_sim.broker import LocalBroker
from sordino_sim.fleet_dir import FleetFolder, write_fleet
from sordino_sim.processes import AgentProcesses
from sordino_sim.scenario import scenario_of

pytestmark = [pytest.mark.mqtt, pytest.mark.slow]


def tensor_fleet(place: Path, agents: int) -> FleetFolder:
    """A fleet directory whose owners let tensors be sent and computed with."""
    folder = write_fleet(scenario_of(boston(f"simulation.agents={agents}")), place)
    for agent in folder.agents.values():
        config = yaml.safe_load((agent / "agent.yaml").read_text("utf-8"))
        config["policy"]["jobs"] = [*config["policy"]["jobs"], "tensors"]
        (agent / "agent.yaml").write_text(yaml.safe_dump(config), "utf-8")
    return folder


def test_ctrl_c_stops_the_worker_and_frees_what_it_would_leave(tmp_path: Path) -> None:
    folder = tensor_fleet(tmp_path / "fleet", 1)
    with LocalBroker(folder.broker_folder, port=folder.port), AgentProcesses(folder) as agents:
        agents.start_all()
        with sordino.connect(folder.folder, wait_s=60.0) as fleet:
            (agent,) = fleet
            driver: Any = fleet._driver
            reactor, conductor = driver._fleet.reactor, driver._fleet.conductor
            x = agent.send(torch.ones(1500, 1500))
            y = x
            for _ in range(300):  # minutes
                y = (y @ x) / 1500
            total = y.sum()
            del y

            def interrupt() -> None:
                if conductor.waiting is not None and conductor.waiting.purpose == "tensors":
                    os.kill(os.getpid(), signal.SIGINT)
                else:  # the Plan is still on its way
                    reactor.call_at(reactor.now_s() + 0.2, interrupt)

            reactor.call_at(reactor.now_s(), interrupt)
            with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT"):
                fleet.flush()
            report = fleet._ask(agent, "health", Health(), HealthReport)
            assert isinstance(report, HealthReport)
            assert (report.running, report.store_tensors) == ((), 1)
            del total
            (x[0] + 1).sum()
            fleet.flush()  # the next one is computed


def test_pointers_to_processes(tmp_path: Path) -> None:
    folder = tensor_fleet(tmp_path / "fleet", 2)
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
            model = agent.send(torch.nn.Linear(3, 1))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            ahead = []
            for turn in range(10):  # the last ones leave when their backward passes begin; one is not what was foreseen
                optimizer.zero_grad()
                model(x).square().mean().backward()
                ahead.append(fleet.runner._ahead is not None)
                if turn != 8:
                    optimizer.step()
                fleet.flush()
                assert fleet.runner._ahead is None
            assert ahead[-3:] == [True, True, False]
            report = fleet._ask(agent, "health", Health(), HealthReport)
            assert isinstance(report, HealthReport)
            assert report.running == ()


def test_shares_on_processes(tmp_path: Path) -> None:
    folder = write_fleet(scenario_of(boston("simulation.agents=2")), tmp_path / "fleet")
    for place in folder.agents.values():
        config = yaml.safe_load((place / "agent.yaml").read_text("utf-8"))
        config["policy"]["jobs"] = [*config["policy"]["jobs"], "tensors", "spdz-compute", "spdz-data"]
        config["policy"]["fetch"] = "any"
        config["policy"]["spdz"] = {"outputs": {"tensors": ["server", "agent-01"]}}
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
            predictions = rows.detach() @ w.detach()
            there = predictions.move(fleet["agent-01"])  # and not here
            assert there.mean().get() == pytest.approx(loss.get().item(), abs=1e-2)
            with pytest.raises(RemoteFailure, match=r"may not open to agent-00 here.*tensors: \[agent-00\]"):
                predictions.move(fleet["agent-00"])
