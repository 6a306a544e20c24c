"""Batches of rows that lie on several agents: what an epoch is, what is sent for it, a fleet that learns with it."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

import sordino_server as sordino
from sordino_agent.policy import Policy
from sordino_server.tensors.errors import RemoteFailure, WrongPlace
from sordino_server.tensors.fleet import PointerFleet

OPEN = Policy(jobs=("describe", "tensors"), plans="any", fetch="any")
ROWS = {"alice": 10, "bob": 7, "carol": 3}


def numbered(fleet: PointerFleet) -> list[tuple[Any, Any]]:
    """Rows that say who has them: 100 times the agent's number, and the row's."""
    parts = []
    for k, (name, rows) in enumerate(ROWS.items()):
        x = 100.0 * k + torch.arange(float(rows))
        parts.append((fleet[name].send(x[:, None].repeat(1, 2)), fleet[name].send(x)))
    return parts


def seen(loader: Any) -> list[tuple[str, list[int]]]:
    found = []
    for batch in loader:
        x, y = batch
        assert torch.equal(x.get()[:, 1], y.get())
        found.append((batch.agent.name, [int(v) % 100 for v in y.get()]))
    return found


def test_an_epoch_has_each_row_once_and_leftovers_begin_the_next() -> None:
    with sordino.simulate(agents=3) as fleet:
        loader = sordino.federated_loader(numbered(fleet), batch_rows=4, seed=3)
        assert loader.rows == ROWS
        counts: dict[str, Counter[int]] = {name: Counter() for name in ROWS}
        lengths = []
        for _ in range(4):
            expected = len(loader)
            epoch = seen(loader)
            assert len(epoch) == expected
            lengths.append(expected)
            for name, rows in epoch:
                assert len(rows) == 4
                counts[name].update(rows)
        assert lengths == [2 + 1 + 0, 3 + 2 + 1, 2 + 2 + 1, 3 + 2 + 1]
        for name, rows in ROWS.items():
            assert sorted(counts[name]) == list(range(rows))
            assert max(counts[name].values()) - min(counts[name].values()) <= 1  # each row once in each pass


def test_the_order_is_drawn_anew_each_epoch_the_same_for_a_seed_and_another_one_for_each_agent() -> None:
    def epochs(**options: Any) -> list[list[tuple[str, list[int]]]]:
        with sordino.simulate(agents=2) as fleet:
            x = torch.arange(8.0)
            sources = [(agent.send(x[:, None].repeat(1, 2)), agent.send(x)) for agent in fleet]
            loader = sordino.federated_loader(sources, batch_rows=4, **options)
            return [seen(loader), seen(loader)]

    first, second = epochs(seed=1)
    assert [name for name, _ in first] == ["alice", "bob", "alice", "bob"]  # in turns
    assert first != second
    assert first[0][1] + first[2][1] != first[1][1] + first[3][1]
    assert epochs(seed=1) == [first, second]
    assert epochs(seed=2) != [first, second]
    assert epochs(shuffle=False)[1] == [
        (name, rows) for rows in ([0, 1, 2, 3], [4, 5, 6, 7]) for name in ("alice", "bob")
    ]


def test_what_is_left_is_dropped_if_that_is_asked_for() -> None:
    with sordino.simulate(agents=3) as fleet:
        loader = sordino.federated_loader(numbered(fleet), batch_rows=3, drop_last=True)
        for _ in range(2):
            assert len(loader) == 3 + 2 + 1
            assert len({(name, row) for name, rows in seen(loader) for row in rows}) == 18
        with pytest.raises(
            WrongPlace, match=r"source 2 on carol has 3 rows and would never give a batch of 4; take sm"
        ):
            sordino.federated_loader(numbered(fleet), batch_rows=4, drop_last=True)


def test_a_plain_loop_with_averages_by_hand_learns_and_sends_one_message_a_step() -> None:
    generator = np.random.default_rng(5)
    w = np.array([1.0, -2.0, 0.5])
    data: dict[str, Any] = {}
    for k, (name, rows) in enumerate({"alice": 40, "bob": 24, "carol": 32}.items()):
        x = generator.normal(size=(rows, 3)) + 0.2 * k
        data[name] = {"lines": {"x": x, "y": (x @ w + 3.0)[:, None]}}
    torch.manual_seed(6)
    model = torch.nn.Linear(3, 1)
    with sordino.simulate(agents=3, data=data, policy=OPEN) as fleet:
        loader = sordino.federated_loader(fleet.search("lines"), ["x", "y"], batch_rows=8, seed=4)
        shares = {name: rows / sum(loader.rows.values()) for name, rows in loader.rows.items()}
        for epoch in range(6):
            there = {agent.name: agent.send(copy.deepcopy(model)) for agent in loader.agents}
            optimizers = {name: torch.optim.SGD(local.parameters(), lr=0.1) for name, local in there.items()}
            since = len(fleet.trace())
            for batch in loader:
                x, y = batch
                optimizers[batch.agent.name].zero_grad()
                torch.nn.functional.mse_loss(there[batch.agent.name](x), y).backward()
                optimizers[batch.agent.name].step()
            if epoch:
                sent = Counter(entry.kind for entry in fleet.trace()[since:])
                assert sent == {"tensor-run": 12 - 3, "tensor-put": 6}  # the last step of each goes with what follows
            states = {name: fleet.get(local).state_dict() for name, local in there.items()}
            model.load_state_dict(
                {key: sum(shares[name] * state[key] for name, state in states.items()) for key in model.state_dict()}
            )
        with pytest.raises(RemoteFailure, match="never leave the device"):
            fleet["alice"].dataset("lines")["x"].get()
    assert torch.allclose(model.weight.detach(), torch.tensor(w).float()[None], atol=0.1)


def test_sources_that_do_not_fit_are_told() -> None:
    with sordino.simulate(
        agents=2, data={"alice": {"d": {"x": np.ones((4, 2)), "y": np.ones(4)}}}, policy=OPEN
    ) as fleet:
        alice, bob = fleet["alice"], fleet["bob"]
        rows, other = alice.send(torch.ones(4, 2)), bob.send(torch.ones(4, 3))
        for sources, columns, words in (
            ([], (), "no sources"),
            ([()], (), "source 0 is nothing; expected a dataset or pointers to rows"),
            ([(torch.ones(3),)], (), "source 0 is Tensor; expected a dataset"),
            ([(rows,), (other,)], (), "source 1 has rows of PointerTensor"),
            ([(rows, other)], (), "are on one agent and have as many rows"),
            ([(rows, alice.send(torch.ones(3)))], (), "are on one agent and have as many rows"),
            ([(rows,)], ("x",), "columns are of datasets"),
            ([alice.dataset("d")], (), r"name the columns of dataset 'd'.*it has \('x', 'y'\)"),
            ([alice.dataset("d")], ("z",), "has no column 'z'"),
        ):
            with pytest.raises(WrongPlace, match=words):
                sordino.federated_loader(sources, columns, batch_rows=2)  # type: ignore[arg-type]  # some are wrong
        with pytest.raises(WrongPlace, match="batch_rows is 0"):
            sordino.federated_loader([(rows,)], batch_rows=0)
