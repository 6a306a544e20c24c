"""Data that this process never sees: columns by pointer, and what may leave of them. Garbage and leases."""

from __future__ import annotations

import os
import re
import signal
from typing import Any

import numpy as np
import pytest
import torch

import sordino_server as sordino
from sordino_agent.policy import Policy
from sordino_server.tensors.errors import AgentAway, RemoteFailure, WrongPlace
from sordino_server.tensors.fleet import PointerFleet

X = np.arange(24.0).reshape(12, 2)
Y = X @ np.array([1.0, -2.0]) + 3.0
DATA = {"alice": {"demo": {"x": X, "y": Y, "k": np.arange(12)}}}


def simulated(**policy: Any) -> PointerFleet:
    return sordino.simulate(
        agents=("alice", "bob"),
        data=DATA,
        policy=Policy(**{"jobs": ("describe", "tensors"), "plans": "any", "fetch": "any", **policy}),
    )


def core_of(fleet: PointerFleet, name: str = "alice") -> Any:
    driver: Any = fleet._driver
    return driver.fleet.agents[name].core


def stored(fleet: PointerFleet) -> int:
    return int(core_of(fleet).health().store_tensors)


def test_columns_by_name() -> None:
    with simulated() as fleet:
        demo = fleet["alice"].dataset("demo")
        assert (demo.columns, len(demo), demo.rows) == (("x", "y", "k"), 12, 12)
        x, y, both = demo["x"], demo["y"], demo[["k", "y"]]
        assert (repr(x), y.shape, both.shape) == ("PointerTensor(alice) float32[12, 2]", (12,), (12, 2))
        assert torch.allclose(x.sum(0).get(), torch.tensor(X.sum(0)).float())
        assert torch.allclose(both.mean(0).get(), torch.tensor([5.5, Y.mean()]).float())
        assert demo.to("int64")["k"].sum().get() == 66
        assert [(each.agent.name, each.name) for each in fleet.search("demo")] == [("alice", "demo")]
        assert fleet.search("other") == ()


def test_search_by_tag_or_name_leaves_out_who_is_away() -> None:
    data = {"alice": {"houses": {"x": X}}, "bob": {"flats": {"x": X}}}
    with sordino.simulate(agents=3, data=data, tags=("housing", "2024")) as fleet:
        for tag, names in (("housing", ["houses", "flats"]), ("2024", ["houses", "flats"]), ("flats", ["flats"])):
            assert [found.name for found in fleet.search(tag)] == names
        assert [found.agent.name for found in fleet.search("housing")] == ["alice", "bob"]
        driver: Any = fleet._driver
        driver.fleet.leave("alice")
        driver._loop.advance(30.0)
        assert [found.agent.name for found in fleet.search("housing")] == ["bob"]


def test_what_is_not_there_is_told() -> None:
    with simulated(min_rows=13) as fleet:
        with pytest.raises(WrongPlace, match="no dataset 'demo' on bob; there are: none"):
            fleet["bob"].dataset("demo")
        demo = fleet["alice"].dataset("demo")
        with pytest.raises(WrongPlace, match="has no column 'z'"):
            demo["z"]
        with pytest.raises(WrongPlace, match="name one column, or several"):
            demo[[]]
        with pytest.raises(RemoteFailure, match=r"a load over 12 rows; policy\.min_rows on the device is 13"):
            demo["x"]
    with simulated(datasets={"demo": ("train",)}) as fleet, pytest.raises(RemoteFailure, match=r"policy\.datasets"):
        fleet["alice"].dataset("demo")["x"]


def test_rows_never_leave_whatever_the_policy() -> None:
    with simulated() as fleet:
        x = fleet["alice"].dataset("demo")["x"]
        with pytest.raises(RemoteFailure, match="rows of a dataset, which never leave the device, whatever its policy"):
            x.get()
        with pytest.raises(RemoteFailure, match="rows of a dataset"):
            x.move(fleet["bob"])


def test_what_comes_of_rows_leaves_only_if_all_its_plans_are_listed() -> None:
    with simulated(fetch="sent") as fleet:
        alice = fleet["alice"]
        sent = alice.send(torch.ones(2))
        assert torch.equal((sent * 3).get(), torch.full((2,), 3.0))
        total = alice.dataset("demo")["x"].sum()
        with pytest.raises(RemoteFailure, match=r"computed from rows of a dataset; .* listing, in policy\.fetch") as e:
            total.get()
        plans = tuple(re.findall(r"[0-9a-f]{64}", str(e.value)))
        assert plans == (fleet.trace()[-2].plan_id.hex(),)  # type: ignore[union-attr]
        with pytest.raises(RemoteFailure, match="computed from rows"):
            (total * 0 + sent.sum()).get()  # also where nothing of them is left
    with simulated(fetch=plans) as fleet:
        alice = fleet["alice"]
        x = alice.dataset("demo")["x"]
        assert x.sum().get() == X.sum()
        first = x * alice.send(torch.tensor([1.0, 0.0]))
        fleet.flush()  # a Plan that is not listed, then one that is
        with pytest.raises(RemoteFailure, match="listing"):
            first.sum().get()


def test_a_model_learns_from_rows_that_stay() -> None:
    torch.manual_seed(4)
    with simulated() as fleet:
        demo = fleet["alice"].dataset("demo")
        x, y = demo["x"] / 24, demo["y"].unsqueeze(1)
        model = fleet.send(torch.nn.Linear(2, 1), fleet["alice"])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.get().item())  # type: ignore[attr-defined]
        fleet.get(model)
    assert losses[-1] < losses[0] / 20


def test_a_budget_refuses_a_load() -> None:
    with simulated() as fleet:
        demo = fleet["alice"].dataset("demo")
        core_of(fleet)._ledger.budgets = {"demo": "epsilon 1"}
        with pytest.raises(RemoteFailure, match="has a privacy budget"):
            demo["x"]


@pytest.mark.soak
def test_many_sends_and_drops_leave_the_store_empty() -> None:
    count = 10_000 if os.environ.get("SORDINO_SOAK") else 4_200
    with simulated() as fleet:
        alice, core = fleet["alice"], core_of(fleet)
        one = torch.ones(1)
        for _ in range(count):
            alice.send(one)
        assert stored(fleet) <= 4098  # a message of ids was full, once or more
        (alice.send(one) + 1).get()
        while alice.recorder.forgotten:
            fleet._drop(alice)
        assert (stored(fleet), core._store.used_bytes) == (0, 0)


def test_a_killed_client_leaks_nothing_beyond_the_lease() -> None:
    fleet = sordino.simulate(agents=1, lease_s=100.0)
    driver: Any = fleet._driver
    kept = fleet["alice"].send(torch.ones(5))
    assert stored(fleet) == 1
    core = core_of(fleet)
    driver.fleet.kill_server()
    driver._loop.advance(101.0)
    core._store.expire(driver._loop.now_s())
    assert core.health().store_tensors == 0
    del kept
    driver.close()


def test_leases_are_renewed_while_something_is_sent_and_their_end_is_told() -> None:
    with sordino.simulate(agents=1, lease_s=100.0) as fleet:
        driver: Any = fleet._driver
        alice = fleet["alice"]
        x = alice.send(torch.ones(2))
        for _ in range(4):
            driver._loop.advance(60.0)
            assert torch.equal((x + 1).get(), torch.full((2,), 2.0))
        assert [sent.kind for sent in fleet.trace()].count("tensor-renew") == 4
        driver._loop.advance(101.0)
        with pytest.raises(RemoteFailure, match="never put, dropped, or its lease is over"):
            (x + 1).get()


def test_ctrl_c_during_a_long_evaluation_leaves_no_task_and_no_value() -> None:
    with sordino.simulate(agents=2, board="pi-zero2") as fleet:
        driver: Any = fleet._driver
        cores = [core_of(fleet, agent.name) for agent in fleet]
        held = [agent.send(torch.ones(700, 700)) for agent in fleet]
        results = []
        for x in held:
            y = x
            for _ in range(6):  # 4 s on that board
                y = (y @ x) / 700
            results.append(y.sum())
        del x, y

        def interrupt() -> None:
            assert all(core.running for core in cores)
            os.kill(os.getpid(), signal.SIGINT)

        started_s = driver.now_s()
        driver._loop.call_at(started_s + 1.0, interrupt)
        with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT"):
            fleet.flush()
        assert driver.now_s() < started_s + 2.0  # nobody was waited for
        assert [core.running for core in cores] == [(), ()]
        assert [core.health().store_tensors for core in cores] == [1, 1]
        assert [result.get() for result in results] == [700.0**2] * 2  # what was recorded is kept
    assert [core.health().store_tensors for core in cores] == [0, 0]


def test_ctrl_c_while_columns_are_loaded_leaves_nothing() -> None:
    with simulated() as fleet:
        driver: Any = fleet._driver
        demo = fleet["alice"].dataset("demo")
        driver._loop.call_at(driver.now_s() + 1e-3, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            demo["x"]
        assert (core_of(fleet).running, stored(fleet)) == ((), 0)


def test_ctrl_c_leaves_the_with_with_everything_freed() -> None:
    with pytest.raises(KeyboardInterrupt), simulated() as fleet:  # noqa: PT012  # what is in the with is the point
        core, kept = core_of(fleet), fleet["alice"].dataset("demo")["x"]
        total = kept.sum()
        raise KeyboardInterrupt
    assert core.health().store_tensors == 0
    del total


def test_a_restarted_agent_gets_the_plan_again_and_has_lost_its_tensors() -> None:
    with sordino.simulate(agents=1) as fleet:
        driver: Any = fleet._driver
        alice = fleet["alice"]
        old = alice.send(torch.ones(2))
        assert (old + 1).sum().get() == 4
        driver.fleet.die("alice")
        driver._loop.advance(1.0)
        driver.fleet.come_back("alice")
        driver._loop.advance(5.0)
        new = alice.send(torch.ones(2))
        assert (new + 1).sum().get() == 4  # the Plan was known, and is not there: put again
        with pytest.raises(RemoteFailure, match="unknown-tensor"):
            old.get()


def test_an_agent_that_is_away_is_named_and_what_was_recorded_is_kept() -> None:
    with sordino.simulate(agents=1) as fleet:
        driver: Any = fleet._driver
        alice = fleet["alice"]
        x = alice.send(torch.ones(2))
        y = x + 1
        driver.fleet.leave("alice")
        driver._loop.advance(30.0)
        with pytest.raises(AgentAway, match=r"computing on alice .*offline; what is recorded is kept"):
            y.get()
        fleet.close(flush=False)
