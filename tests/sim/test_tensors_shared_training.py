"""Training on shares in eager style: PyTorch's losses and parameters, a step a flush, data that stays away."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sordino_server as sordino
from sordino_agent.policy import Policy
from sordino_agent.spdz.policy import SpdzPolicy
from sordino_common.errors import PlanError
from sordino_server.tensors.errors import RemoteFailure, UnsupportedOperation, WrongPlace
from sordino_server.tensors.fleet import PointerFleet

RANGES = sordino.Ranges(x=6, params=4, values=16, updates=0.25, preactivations=8)


def mlp() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 8), nn.Sigmoid(), nn.Linear(8, 1))


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(16, 3, generator=generator).clamp(-4, 4)
    return x, (x @ torch.tensor([[1.0], [-0.5], [0.25]])).tanh()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, steps: int
) -> list[torch.Tensor]:
    losses = []
    with sordino.polynomial_activations(degree=3, interval=8):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().get() if isinstance(loss, sordino.ChainTensor) else loss.detach())
    return losses


def steps(fleet: PointerFleet) -> list[int]:
    return [sent.nodes for sent in fleet.trace() if sent.kind == "spdz-step" and sent.nodes]


def burnt(fleet: PointerFleet) -> int:
    """How many sessions alice has taken part in."""
    driver: Any = fleet._driver
    (count,) = driver.fleet.agents["alice"].journal._one("SELECT count(*) FROM sessions")
    return int(count)


def test_a_training_loop_gives_what_it_gives_here() -> None:
    x, y = rows()
    plain = mlp()
    remote = copy.deepcopy(plain)
    with sordino.simulate(agents=3) as fleet:
        alice, bob, _ = fleet
        xs = fleet.share(x, alice, bob, ranges=RANGES)
        ys = fleet.share(y, alice, bob, ranges=RANGES)
        assert fleet.share(remote, alice, bob, ranges=RANGES) is remote
        assert "MPCTensor[2, active]" in repr(remote[0].weight)
        assert remote[0].weight.requires_grad
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (plain, remote)]
        wanted = train(plain, optimizers[0], x, y, 8)
        got = train(remote, optimizers[1], xs, ys, 8)
        for one, other in zip(wanted, got, strict=True):
            assert torch.allclose(one, other, atol=2e-3)
        # The first step has no momentum yet; the second and all after it are one circuit, in one session.
        assert len(steps(fleet)) == 8
        assert len(set(steps(fleet)[1:])) == 1
        lowered, sessions = fleet.committees.programs.lowered, burnt(fleet)
        assert sessions <= 5  # x, y, the parameters; the first step; all others
        train(remote, optimizers[1], xs, ys, 1)
        train(plain, optimizers[0], x, y, 1)
        assert fleet.committees.programs.lowered == lowered
        assert burnt(fleet) == sessions
        assert fleet.get(remote) is remote
    for one, other in zip(plain.parameters(), remote.parameters(), strict=True):
        assert type(other) is nn.Parameter
        assert torch.allclose(one, other, atol=2e-3)


def test_gradients_are_those_of_pytorch() -> None:
    torch.manual_seed(3)
    x, w = torch.randn(5, 4), torch.randn(4, 3)
    with sordino.simulate(agents=3) as fleet:
        found = []
        ranges = sordino.Ranges(x=4, preactivations=8)
        for a, b in ((x, w), (fleet.share(x, *fleet, ranges=ranges), fleet.share(w, *fleet, ranges=ranges))):
            a, b = a.requires_grad_(), b.requires_grad_()
            hidden = a @ b
            loss = (hidden * hidden).mean() + sordino.sigmoid(hidden, interval=8).sum() * 0.25
            gradients = torch.autograd.grad(loss, (a, b))
            found.append([loss, *gradients])
        for plain, shared in zip(*found, strict=True):
            assert torch.allclose(fleet.get(shared), plain, atol=0.02, rtol=0.01)


# --- data that this process never sees -----------------------------------------------------------------------------

X = np.array([[1.0, 2.0], [0.5, -1.0], [-2.0, 0.25], [0.0, 1.5]])
DATA = {"alice": {"demo": {"x": X, "k": np.arange(4)}}}


def simulated(**policy: Any) -> PointerFleet:
    fields = {
        "jobs": ("describe", "tensors", "spdz-compute", "spdz-data"), "plans": "any", "fetch": "any", "min_rows": 1,
        "spdz": SpdzPolicy(outputs={"tensors": ("server",)}),
    }  # fmt: skip
    return sordino.simulate(agents=3, data=DATA, policy=Policy(**{**fields, **policy}))


def test_a_column_is_shared_by_its_owner() -> None:
    with simulated() as fleet:
        alice, bob, carol = fleet
        xs = alice.dataset("demo")["x"].share(alice, bob)
        assert repr(xs).startswith("FixedPrecisionTensor(f=14) > MPCTensor[2, active] > PointerTensor(alice:…)")
        assert torch.allclose(xs.sum(0).get(), torch.tensor(X.sum(0)).float(), atol=1e-3)
        with pytest.raises(
            RemoteFailure, match="alice refuses: policy: these are rows of a dataset, which never leave"
        ):
            xs.get()
        scaled = (alice.dataset("demo")["x"] * 0.5).fix_precision(f=12)
        assert repr(scaled) == "FixedPrecisionTensor(f=12) > PointerTensor(alice) float32[4, 2]"
        assert "FixedPrecisionTensor(f=12)" in repr(scaled.share(alice, carol))
        assert repr(scaled.float_precision()) == "PointerTensor(alice) float32[4, 2]"
        with pytest.raises(UnsupportedOperation, match="compute before fix_precision"):
            scaled + 1
        with pytest.raises(WrongPlace, match="committees of which alice is a member"):
            alice.dataset("demo")["x"].share(bob, carol)
        with pytest.raises(WrongPlace, match=r"on shares numbers are floats; convert it there with \.float"):
            alice.dataset("demo").to("int64")["k"].share(alice, bob)
        with pytest.raises(RemoteFailure, match=r"alice: a value is beyond .*ranges=\.\.\."):
            alice.dataset("demo")["x"].share(alice, bob, ranges=1)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"jobs": ("describe", "tensors", "spdz-compute")}, "jobs of kind `spdz-data` are not served here"),
        ({"jobs": ("describe", "tensors", "spdz-data")}, "jobs of kind `spdz-compute` are not served here"),
        ({"datasets": {"demo": ("tensors",)}}, "may not be used for `spdz-data` here"),
        ({"spdz": SpdzPolicy(min_committee=3)}, "demands 3 compute agents"),
        ({"spdz": SpdzPolicy(zones=2)}, r"policy\.spdz\.zones"),
        ({"spdz": SpdzPolicy(dealers=("hub",))}, "server may not deal for this device"),
    ],
)
def test_what_the_owner_does_not_allow_is_not_shared(policy: dict[str, Any], words: str) -> None:
    with simulated(**policy) as fleet:
        alice, bob, _ = fleet
        x = alice.dataset("demo")["x"]
        with pytest.raises(RemoteFailure, match=words) as refusal:
            x.share(alice, bob)
        assert "test_tensors_shared_training.py" in str(refusal.value)
        assert torch.equal((alice.send(torch.ones(2)) + 1).get(), torch.full((2,), 2.0))


def test_nothing_opens_that_a_member_does_not_allow() -> None:
    with simulated(spdz=SpdzPolicy()) as fleet:
        alice, bob, _ = fleet
        xs = fleet.share(torch.ones(2), alice, bob)
        y = xs * xs
        with pytest.raises(RemoteFailure, match=r"policy\.spdz\.outputs \(tensors: \[server\]\)"):
            y.get()
        fleet.flush()
    with simulated(fetch="sent") as fleet:
        alice, bob, _ = fleet
        total = alice.dataset("demo")["x"].share(alice, bob).sum()
        with pytest.raises(RemoteFailure, match="computed from rows of a dataset"):
            total.get()


def test_what_lowering_refuses_has_the_users_line_and_says_what_to_state() -> None:
    with sordino.simulate(agents=2) as fleet:
        big = fleet.share(torch.ones(64, 64), *fleet, ranges=4000)
        with pytest.raises(PlanError, match=r"test_tensors_shared_training\.py:\d+: .*Ranges"):
            ((big @ big) @ (big @ big)).sum().get()
        xs = fleet.share(torch.ones(4), *fleet, ranges=64)
        fine = xs + 1  # waits beside what can't be computed
        with pytest.raises(PlanError, match=r"may reach 64 by the stated ranges.*Ranges\(preactivations=\.\.\.\)"):
            sordino.sigmoid(xs).get()
        assert torch.equal(fine.get(), torch.full((4,), 2.0))
        with pytest.raises(WrongPlace, match=r"buffer 1\.num_batches_tracked of the module is torch\.int64"):
            fleet.share(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), *fleet)
