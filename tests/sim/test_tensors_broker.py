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


def test_ctrl_c_leaves_the_fleet_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    with sordino.simulate(agents=1, transport="mqtt") as fleet:
        alice, driver = fleet["alice"], fleet._driver
        x = alice.send(torch.ones(2))
        run_until: Any = driver._loop.run_until  # type: ignore[attr-defined]

        def interrupted(*_: object, **__: object) -> bool:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the signal comes first")

        y = x + 1
        monkeypatch.setattr(driver._loop, "run_until", interrupted)  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            y.get()
        monkeypatch.setattr(driver._loop, "run_until", run_until)  # type: ignore[attr-defined]
        assert torch.equal(y.get(), torch.full((2,), 2.0))


def test_connect_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, FleetUnavailable)):
        sordino.connect(tmp_path / "fleet.yaml")
