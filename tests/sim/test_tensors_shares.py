"""Tensors on secret shares: what is computed, what is shown, what is refused, what is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import sordino_server as sordino
from sordino_agent.errors import Silence
from sordino_agent.policy import Policy
from sordino_agent.spdz.policy import SpdzPolicy
from sordino_common.errors import LocalError
from sordino_common.spdz.arithmetic import Arithmetic, Run
from sordino_common.spdz.errors import CommitmentError, EquivocationError, MacCheckError
from sordino_server.rounds.effects import Gather, gather
from sordino_server.tensors.errors import (
    AgentAway,
    HiddenValue,
    RemoteFailure,
    SharesLost,
    UnsupportedOperation,
    WrongPlace,
)
from sordino_server.tensors.fleet import PointerFleet
from sordino_sim.tamper import Tamper, What


@pytest.fixture(scope="module")
def fleet() -> Iterator[PointerFleet]:
    with sordino.simulate(agents=3) as fleet:
        yield fleet


def test_two_tensors_added_and_multiplied(fleet: PointerFleet) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(3, 4), torch.randn(4, 2)
    alice, bob = fleet["alice"], fleet["bob"]
    xs, ys = fleet.share(x, alice, bob), fleet.share(y, bob, alice)
    assert repr(xs) == (
        "FixedPrecisionTensor(f=14) > MPCTensor[2, active] > PointerTensor(alice:…), PointerTensor(bob:…) float32[3, 4]"
    )
    z = (xs @ ys) * 2 + 1
    assert torch.allclose(z.get(), x @ y * 2 + 1, atol=1e-3)
    assert torch.allclose(xs.get(), x, atol=2**-14)
    assert torch.allclose((xs * xs - xs).mean(dim=0).get(), (x * x - x).mean(dim=0), atol=1e-3)


def test_links(fleet: PointerFleet) -> None:
    alice, bob, carol = fleet
    xs = fleet.share(torch.ones(2), alice, bob, carol, security="passive", f=12)
    assert isinstance(xs, sordino.FixedPrecisionTensor)
    below = xs.child
    assert isinstance(below, sordino.MPCTensor)
    assert below.parent is xs
    assert repr(below).startswith("MPCTensor[3, passive] > PointerTensor(alice:…), PointerTensor(bob:…), ")
    assert [share.parent for share in below.shares] == [below] * 3
    for operation in (lambda: below + 1, lambda: below.shares[0] + 1, below.get, below.shares[0].get):
        with pytest.raises(UnsupportedOperation):
            operation()
    fixed = xs.reconstruct()
    assert repr(fixed) == "FixedPrecisionTensor(f=12) > LocalTensor > Tensor float32[2]"
    assert torch.equal(fixed.float_precision(), torch.ones(2))


def test_values_are_hidden(fleet: PointerFleet) -> None:
    xs = fleet.share(torch.ones(()), *fleet)
    for operation in (bool, float, int, lambda t: t.item(), lambda t: t.tolist(), lambda t: t.numpy(), "{:.2f}".format):
        with pytest.raises(HiddenValue, match=r"\.get\(\)"):
            operation(xs)


def test_what_shares_cannot_compute_is_refused_at_the_users_line(fleet: PointerFleet) -> None:
    xs = fleet.share(torch.ones(2, 2), *fleet)
    for operation, words in (
        (lambda: torch.relu(xs), "relu.*MPCTensor.*comparison.*sordino.sigmoid"),
        (lambda: xs > 0, r"aten::gt.*MPCTensor.*comparison of secrets; do it where the values are known"),
        (lambda: xs.abs(), r"aten::abs.*MPCTensor.*use the square"),
        (lambda: xs.exp(), r"aten::exp.*MPCTensor.*write a polynomial"),
        (lambda: xs.softmax(dim=1), "softmax.*MPCTensor"),
        (lambda: torch.sigmoid(xs), "sigmoid.*polynomial sigmoid.*sordino.sigmoid"),
        (lambda: xs / xs, "div.*MPCTensor"),
        (lambda: xs.sqrt(), "sqrt"),
    ):
        with pytest.raises(UnsupportedOperation, match=f"(?s)test_tensors_shares.py:[0-9]+: .*{words}"):
            operation()


def test_operands_are_not_brought_together_by_themselves(fleet: PointerFleet) -> None:
    alice, bob, carol = fleet
    xs = fleet.share(torch.ones(2), alice, bob)
    for other in (
        torch.ones(2),
        alice.send(torch.ones(2)),
        fleet.share(torch.ones(2), alice, carol),
        fleet.share(torch.ones(2), alice, bob, f=10),
        fleet.share(torch.ones(2), alice, bob, security="passive"),
        sordino.fix_precision(torch.ones(2)),
    ):
        with pytest.raises((WrongPlace, UnsupportedOperation)):
            xs + other
    with pytest.raises(WrongPlace, match="2 to 4 different agents"):
        fleet.share(torch.ones(2), alice)
    with pytest.raises(WrongPlace, match="beyond the 8 that is stated"):
        fleet.share(torch.full((2,), 9.0), alice, bob)


# --- opening to a member -------------------------------------------------------------------------------------------


def test_a_shared_tensor_moves_to_a_member() -> None:
    x = torch.tensor([1.5, -2.0], requires_grad=True)
    with sordino.simulate(agents=3) as fleet:
        alice, bob, carol = fleet
        xs = fleet.share(x, alice, bob)
        before = len(fleet.trace())
        product = (xs * xs).move(alice)  # computed and opened in one step, nothing of it here
        assert [sent.kind for sent in fleet.trace()[before:]] == ["plan-put", "plan-put", "spdz-step"]
        assert repr(product) == "PointerTensor(alice) float32[2], requires_grad"
        assert torch.allclose((product + 1).get(), x.detach() ** 2 + 1, atol=1e-3)
        doubled = xs.detach() * 2
        fleet.flush()
        kept = doubled.send(bob)  # what is kept, as it is
        assert torch.allclose(kept.get(), x.detach() * 2, atol=1e-3)
        view = xs.detach()[1:].move(bob)
        assert torch.allclose(view.get(), x.detach()[1:], atol=1e-3)
        with pytest.raises(
            WrongPlace, match=r"opens to a member of the committee of alice, bob, got RemoteAgent\(carol\)"
        ):
            xs.move(carol)
        store = fleet._driver.fleet.agents["bob"].core._store  # type: ignore[attr-defined]  # the simulator's
        ids = {value.cell.value.tensor_id for value in (kept, view)}
        assert all(tensor_id in store._tensors for tensor_id in ids)
        del kept, view
        (bob.send(torch.ones(1)) + 1).get()
        assert not any(tensor_id in store._tensors for tensor_id in ids)


def test_every_member_judges_what_moves() -> None:
    def fleet_with(outputs: tuple[str, ...], fetch: str = "any") -> PointerFleet:
        policy = Policy(
            jobs=("tensors", "spdz-compute", "spdz-data"),
            plans="any",
            fetch=fetch,  # type: ignore[arg-type]  # one of the words
            spdz=SpdzPolicy(outputs={"tensors": outputs}),
        )
        return sordino.simulate(agents=2, policy=policy)

    with fleet_with(("server", "alice")) as fleet:
        alice, bob = fleet
        xs = fleet.share(torch.ones(2), alice, bob)
        with pytest.raises(RemoteFailure, match=r"may not open to bob here.*policy.spdz.outputs \(tensors: \[bob\]\)"):
            xs.move(bob)
        assert torch.allclose((xs + 1).get(), torch.full((2,), 2.0), atol=1e-3)  # and all goes on
        assert torch.equal(xs.move(alice).get(), torch.ones(2))
    with fleet_with(("alice",)) as fleet:  # to alice, and not to this process, in no way
        alice, bob = fleet
        there = fleet.share(torch.ones(2), alice, bob).move(alice)
        with pytest.raises(RemoteFailure, match="may not open to server"):
            fleet.share(torch.ones(2), alice, bob).get()
        assert (there * 2).sum().get() == 4  # her policy.fetch is any
    with fleet_with(("alice",), fetch="sent") as fleet:
        alice, bob = fleet
        there = fleet.share(torch.ones(2), alice, bob).move(alice)
        with pytest.raises(RemoteFailure, match=r"listing, in policy\.fetch, all Plans that made it"):
            (there * 2).sum().get()


CHEATS = {
    "opening": MacCheckError,
    "mac": MacCheckError,
    "correction": MacCheckError,
    "equivocation": EquivocationError,
    "commitment": CommitmentError,
    "seed": CommitmentError,
}


@pytest.mark.parametrize("what", CHEATS)
def test_a_member_that_cheats_is_caught_and_nothing_opens(what: What) -> None:
    # The correction of the first step is party 0's.
    tamper = Tamper(agent=0 if what == "correction" else 1, step=0, bit=17, what=what)
    with sordino.simulate(agents=3, tamper=tamper) as fleet:
        alice, bob, carol = fleet
        xs = fleet.share(torch.ones(2), alice, bob)
        z = xs * xs
        with pytest.raises(CHEATS[what]) as caught:
            z.get()
        assert caught.value.exit_code == 4
        for operation in (lambda: (xs + 1).get(), xs.get, z.get):  # the values have died with it
            with pytest.raises(SharesLost, match="has lost its shares"):
                operation()
        assert fleet.committees.sessions == 0
        assert running(fleet) == []
        assert torch.equal(fleet.share(torch.ones(2), alice, carol).get(), torch.ones(2))
        assert torch.equal(fleet.share(torch.ones(2), alice, bob).get(), torch.ones(2))  # a new one, shared anew
    assert tamper.happened
    assert stored(fleet) == {}


def test_nobody_notices_a_cheat_without_the_check_and_it_is_named(fleet: PointerFleet) -> None:
    assert "MPCTensor[2, passive]" in repr(fleet.share(torch.ones(1), *list(fleet)[:2], security="passive"))
    with sordino.simulate(agents=2, tamper=Tamper(agent=1, step=0, bit=40)) as other:
        xs = other.share(torch.ones(2), *other, security="passive")
        assert not torch.allclose((xs * xs).get(), torch.ones(2), atol=0.1)


def test_a_step_that_meets_the_edge_of_the_ring_runs_again(
    fleet: PointerFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob, _ = fleet
    xs = fleet.share(torch.tensor([1.5, -2.0]), alice, bob)
    accept, met = Arithmetic.accept, []

    def once(self: Arithmetic, one: Run) -> str:
        if len(met) < 2:  # once for each member, as it would be
            met.append(one.round)
            return "gate 0"
        return accept(self, one)

    y = xs * xs
    monkeypatch.setattr(Arithmetic, "accept", once)
    assert torch.allclose(y.get(), torch.tensor([2.25, 4.0]), atol=1e-3)
    assert met == [0, 0]
    assert torch.allclose((y * xs).get(), torch.tensor([3.375, -8.0]), atol=1e-2)  # kept under its second attempt


# --- what is left behind -------------------------------------------------------------------------------------------


def running(fleet: PointerFleet) -> list[str]:
    driver: Any = fleet._driver
    return [label for agent in driver.fleet.agents.values() if agent.core for label in agent.core.room.running]


def stored(fleet: PointerFleet) -> dict[str, int]:
    driver: Any = fleet._driver
    counts = {name: len(agent.core._store) for name, agent in driver.fleet.agents.items() if agent.core}
    return {name: count for name, count in counts.items() if count}


def test_a_handle_that_dies_frees_what_the_members_keep() -> None:
    with sordino.simulate(agents=2) as fleet:
        xs = fleet.share(torch.ones(100), *fleet)
        for _ in range(5):
            y = xs * 2 + 1
            assert torch.allclose(y.sum().get(), torch.tensor(300.0), atol=0.1)
        assert all(count <= 4 for count in stored(fleet).values())  # what died goes with the next step
        assert 0 < fleet.committees.sessions <= 3
        assert len(running(fleet)) <= 6
    assert stored(fleet) == {}


def test_leaving_the_with_leaves_no_session_and_no_value() -> None:
    with sordino.simulate(agents=3) as fleet:
        driver: Any = fleet._driver
        cores = [agent.core for agent in driver.fleet.agents.values()]
        xs = fleet.share(torch.ones(2), *fleet)
        pending = xs * 3
        fleet.share(torch.ones(3), *list(fleet)[:2])
        assert running(fleet)
    assert all(core.room.running == () and len(core._store) == 0 for core in cores)
    with pytest.raises(LocalError, match="this fleet is closed"):
        pending.get()


def test_a_crashed_notebook_leaves_nothing_after_the_lease() -> None:
    with sordino.simulate(agents=2, lease_s=100.0) as fleet:
        fleet.share(torch.ones(2), *fleet).sum().get()
        driver: Any = fleet._driver
        cores = [agent.core for agent in driver.fleet.agents.values()]
        assert running(fleet)
        driver._loop.advance(300.0)
        assert all(core.room.running == () for core in cores)
        assert all(core.health().store_tensors == 0 for core in cores)


def test_a_session_that_is_lost_is_opened_anew_and_a_value_that_is_lost_is_told() -> None:
    with sordino.simulate(agents=2) as fleet:
        driver: Any = fleet._driver
        xs = fleet.share(torch.ones(2), *fleet)
        assert (xs * 2).sum().get() == 4.0
        for agent in driver.fleet.agents.values():  # as after a long pause
            for session in list(agent.core.room._sessions.values()):
                session.fail(Silence("no step came"))
        assert (xs * 2).sum().get() == 4.0
        driver.fleet.die("bob")
        driver.fleet.come_back("bob")
        present(fleet)
        with pytest.raises(RemoteFailure, match="never put, dropped, or its lease is over"):
            xs.get()
        assert (fleet.share(torch.ones(2), *fleet) * 2).sum().get() == 4.0


def test_an_agent_that_is_away_is_told_and_what_is_recorded_is_kept() -> None:
    with sordino.simulate(agents=3) as fleet:
        driver: Any = fleet._driver
        alice, bob, _ = fleet
        xs = fleet.share(torch.ones(2), alice, bob)
        y = (xs * 2).sum()
        cut = driver.fleet.agents["bob"]
        before, cut.core.on_message = cut.core.on_message, lambda incoming: None
        with pytest.raises(AgentAway, match="what is recorded is kept"):
            y.get()
        cut.core.on_message = before
        assert y.get() == 4.0


def present(fleet: PointerFleet) -> None:
    """Wait until everybody is there again."""
    driver: Any = fleet._driver
    everybody = Gather(purpose="agents", without=frozenset(), quorum=len(fleet), join_s=30.0, deadline_s=30.0)
    driver.drive(gather(everybody))
