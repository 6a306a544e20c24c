"""Pointers through a real broker: in one process, and a fleet directory's server with an agent that is a process."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import sordino_server as sordino
from sordino_common.errors import ConfigError, FleetUnavailable
from sordino_server.tensors.ahead import SURE

pytestmark = pytest.mark.mqtt


def test_a_program_through_a_broker() -> None:
    torch.manual_seed(2)
    x, w = torch.randn(6, 3), torch.randn(3, 1, requires_grad=True)
    with sordino.simulate(agents=2, transport="mqtt") as fleet:
        for agent in fleet:
            x_there, w_there = agent.send(x), agent.send(w)
            (x_there @ w_there).square().mean().backward()
            (x @ w).square().mean().backward()
            assert w.grad is not None
            assert torch.allclose(w_there.grad.get(), w.grad, rtol=1e-5)  # type: ignore[union-attr]
            w.grad = None


def test_a_loop_whose_steps_leave_early_through_a_broker() -> None:
    torch.manual_seed(2)
    plain, x, y = torch.nn.Linear(3, 1), torch.randn(6, 3), torch.randn(6, 1)
    there: Any = torch.nn.Linear(3, 1)
    there.load_state_dict(plain.state_dict())
    with sordino.simulate(agents=1, transport="mqtt") as fleet:
        alice = fleet["alice"]
        alice.send(there)
        x_there, y_there = alice.send(x), alice.send(y)
        ahead = []
        for turn in range(SURE + 8):
            losses: list[Any] = []
            for model, rows, targets in ((plain, x, y), (there, x_there, y_there)):
                for parameter in model.parameters():
                    parameter.grad = None
                loss = torch.nn.functional.mse_loss(model(rows), targets)
                loss.backward()
                torch.optim.SGD(model.parameters(), lr=0.2 if turn == SURE + 5 else 0.1).step()
                losses.append(loss)
                if model is there:
                    ahead.append(fleet.runner._ahead is not None)
            assert losses[1].get() == pytest.approx(losses[0].item(), rel=1e-5)
        assert ahead[SURE + 3 :] == [True, True, True, False, False]
        driver: Any = fleet._driver
        core = driver.fleet.agents["alice"].core
    assert (core.running, core.health().store_tensors) == ((), 0)


def test_ctrl_c_stops_the_task_and_leaves_the_fleet_clean_and_usable() -> None:
    with sordino.simulate(agents=1, transport="mqtt", board="pi-zero2") as fleet:
        alice, driver = fleet["alice"], fleet._driver
        core, loop = driver.fleet.agents["alice"].core, driver._loop  # type: ignore[attr-defined]
        x = alice.send(torch.ones(700, 700))
        y = x
        for _ in range(15):  # some 10 s on that board
            y = (y @ x) / 700
        total = y.sum()

        def interrupt() -> None:
            if any(label.startswith("tensors") for label in core.running):
                os.kill(os.getpid(), signal.SIGINT)
            else:  # the Plan is still on its way
                loop.call_at(loop.now_s() + 0.05, interrupt)

        loop.call_at(loop.now_s(), interrupt)
        with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT"):
            total.get()
        assert (core.running, core.health().store_tensors) == ((), 1)
        assert torch.equal((x[0] + 1).get(), torch.full((700,), 2.0))
        del y, total  # else they are computed when the fleet is left


def test_ctrl_c_in_a_step_on_shares_leaves_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    with sordino.simulate(agents=2, transport="mqtt") as fleet:
        driver: Any = fleet._driver
        rooms = [agent.core.room for agent in driver.fleet.agents.values()]
        x = fleet.share(torch.ones(2), *fleet)
        y = x * x
        run_until: Any = driver._loop.run_until
        calls = 0

        def interrupted(*args: Any, **kwargs: Any) -> bool:
            nonlocal calls
            calls += 1
            if calls == 3:  # the Plan is there, the session is open: in the step itself
                for _ in range(20):
                    run_until(lambda: False, deadline_s=driver.now_s() + 0.002)
                raise KeyboardInterrupt
            return bool(run_until(*args, **kwargs))

        monkeypatch.setattr(driver._loop, "run_until", interrupted)
        with pytest.raises(KeyboardInterrupt):
            y.get()
        monkeypatch.setattr(driver._loop, "run_until", run_until)
        assert fleet.committees.sessions <= 1  # that in which x was shared
        assert torch.allclose(y.get(), torch.ones(2), atol=1e-3)
        assert all(len(room.running) <= 2 for room in rooms)
    assert all(room.running == () for room in rooms)


def test_connect_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, FleetUnavailable)):
        sordino.connect(tmp_path / "fleet.yaml")
