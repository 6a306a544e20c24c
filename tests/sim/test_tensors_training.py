"""Training through pointers: autograd and PyTorch's own optimizers give what they give here; one message a step."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import sordino_server as sordino
from sordino_agent.policy import Policy
from sordino_server.tensors.errors import RemoteFailure, WrongPlace
from sordino_server.tensors.fleet import PointerFleet

Optimizers = dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]]
OPTIMIZERS: Optimizers = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
}


def mlp() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(20, 3, generator=generator), torch.randn(20, 1, generator=generator)


def kinds(fleet: PointerFleet, since: int) -> list[str]:
    return [sent.kind for sent in fleet.trace()[since:]]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_loop_gives_what_it_gives_here(name: str) -> None:
    x, y = rows()
    plain, remote = mlp(), mlp()
    with sordino.simulate(agents=1) as fleet:
        alice = fleet["alice"]
        assert alice.send(remote) is remote
        x_there, y_there = alice.send(x), alice.send(y)
        here, there = OPTIMIZERS[name](plain.parameters()), OPTIMIZERS[name](remote.parameters())
        for _ in range(8):
            since = len(fleet.trace())
            losses = []
            for model, optimizer, inputs, targets in ((plain, here, x, y), (remote, there, x_there, y_there)):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(inputs), targets)
                loss.backward()
                optimizer.step()
                losses.append(loss)
            assert losses[1].get().item() == pytest.approx(losses[0].item(), rel=1e-5)  # type: ignore[attr-defined]
            last = kinds(fleet, since)
        assert last == ["tensor-run", "tensor-get"]  # no Plan, no drop; the loss was asked for
        fleet.get(remote)
    for one, other in zip(plain.parameters(), remote.parameters(), strict=True):
        assert type(other) is nn.Parameter
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_loop_that_asks_for_nothing_sends_one_message_a_step() -> None:
    x, y = rows()
    plain, remote = mlp(), mlp()
    with sordino.simulate(agents=1) as fleet:
        alice = fleet["alice"]
        alice.send(remote)
        x_there, y_there = alice.send(x), alice.send(y)
        here, there = OPTIMIZERS["momentum"](plain.parameters()), OPTIMIZERS["momentum"](remote.parameters())
        sent = []
        for _ in range(8):
            since = len(fleet.trace())
            for model, optimizer, inputs, targets in ((plain, here, x, y), (remote, there, x_there, y_there)):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(inputs), targets).backward()
                optimizer.step()
            sent.append(kinds(fleet, since))
        assert sent[0] == []
        assert sent[4:] == [["tensor-run"]] * 4
        fleet.get(remote)
    for one, other in zip(plain.parameters(), remote.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_step_keeps_parameters_and_loss_and_used_gradients_are_there_when_asked_for() -> None:
    x, y = rows()
    plain, remote = mlp(), mlp()
    with sordino.simulate(agents=1) as fleet:
        alice = fleet["alice"]
        alice.send(remote)
        x_there, y_there = alice.send(x), alice.send(y)
        here, there = torch.optim.SGD(plain.parameters(), lr=0.05), torch.optim.SGD(remote.parameters(), lr=0.05)
        for _ in range(3):
            for model, optimizer, inputs, targets in ((plain, here, x, y), (remote, there, x_there, y_there)):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(inputs), targets)
                loss.backward()
                optimizer.step()
            loss.get()  # type: ignore[attr-defined]
        run = [sent for sent in fleet.trace() if sent.kind == "tensor-run"][-1]
        assert run.outputs == len(list(remote.parameters())) + 1
        for one, other in zip(plain.parameters(), remote.parameters(), strict=True):
            assert one.grad is not None
            assert other.grad is not None  # of the parameters before the step
            assert torch.allclose(other.grad.get(), one.grad, rtol=1e-4, atol=1e-6)  # type: ignore[attr-defined]


def test_a_step_that_was_refused_is_the_same_plan_again() -> None:
    x, y = rows()
    with sordino.simulate(agents=1) as fleet:
        alice = fleet["alice"]
        driver: Any = fleet._driver
        core = driver.fleet.agents["alice"].core
        model, x_there, y_there = alice.send(mlp()), alice.send(x), alice.send(y)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        loss = nn.functional.mse_loss(model(x_there), y_there)
        loss.backward()
        optimizer.step()
        allowed, core._policy = core._policy, Policy(jobs=("tensors",), fetch="any")
        refused = []
        for _ in range(2):
            with pytest.raises(RemoteFailure, match=r"policy\.plans") as refusal:
                loss.get()  # type: ignore[attr-defined]
            refused += re.findall(r"[0-9a-f]{64}", str(refusal.value))
        core._policy = Policy(jobs=("tensors",), plans=(refused[0],), fetch="any")
        assert torch.isfinite(loss.get())  # type: ignore[attr-defined]
        core._policy = allowed
    assert len(set(refused)) == 1


def test_a_write_whose_memory_is_gone_does_not_keep_a_loop_from_being_sent() -> None:
    with sordino.simulate(agents=1) as fleet:
        alice = fleet["alice"]
        x, weight = alice.send(torch.ones(3)), alice.send(torch.ones(3)).requires_grad_()
        for _ in range(6):
            gone = x * 2
            gone.add_(1)
            del gone
            (gradient,) = torch.autograd.grad((weight * x).square().sum(), weight)
            weight = (weight - 0.1 * gradient).detach().requires_grad_()
        assert kinds(fleet, 0).count("tensor-run") >= 4


def test_gradients_that_add_up_over_fetches_are_computed_anew_once() -> None:
    x, y = rows()
    plain, remote = mlp(), mlp()
    with sordino.simulate(agents=1) as fleet:
        alice = fleet["alice"]
        alice.send(remote)
        x_there, y_there = alice.send(x), alice.send(y)
        here, there = torch.optim.SGD(plain.parameters(), lr=0.05), torch.optim.SGD(remote.parameters(), lr=0.05)
        for _ in range(5):
            for model, optimizer, inputs, targets in ((plain, here, x, y), (remote, there, x_there, y_there)):
                loss = nn.functional.mse_loss(model(inputs), targets)
                loss.backward()  # no zero_grad
                optimizer.step()
            loss.get()  # type: ignore[attr-defined]
        runs = [sent.nodes for sent in fleet.trace() if sent.kind == "tensor-run"]
        assert max(runs) == runs[1] < 2.5 * runs[0]
        assert runs[2] == runs[3] == runs[4] < 1.5 * runs[0]
        fleet.get(remote)
    for one, other in zip(plain.parameters(), remote.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_loop_without_an_optimizer_sends_one_message_a_step_too() -> None:
    x, y = rows()
    start = torch.zeros(3, 1)
    with sordino.simulate(agents=1) as fleet:
        alice = fleet["alice"]
        weights = [start.clone().requires_grad_(), alice.send(start).requires_grad_()]
        since = len(fleet.trace()) + 2
        for _ in range(6):
            for k, (inputs, targets) in enumerate(((x, y), (alice.send(x), alice.send(y)))):
                loss = nn.functional.mse_loss(inputs @ weights[k], targets)
                (gradient,) = torch.autograd.grad(loss, weights[k])
                weights[k] = (weights[k] - 0.1 * gradient).detach().requires_grad_()
        assert kinds(fleet, since).count("tensor-run") == 5
        assert torch.allclose(weights[1].get(), weights[0], rtol=1e-4, atol=1e-6)  # type: ignore[attr-defined]


def test_gradients_are_those_of_pytorch() -> None:
    def program(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(x @ w) + torch.sigmoid(x).sum(dim=1, keepdim=True)
        return (hidden.softmax(dim=1)[:, 1] * hidden.clamp(-1, 1).mean(dim=1)).sum()

    torch.manual_seed(3)
    x, w = torch.randn(5, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    with sordino.simulate(agents=1) as fleet:
        alice = fleet["alice"]
        x_there, w_there = alice.send(x), alice.send(w)
        assert x_there.requires_grad
        assert x_there.is_leaf
        program(x, w).backward()
        program(x_there, w_there).backward()
        for here, there in ((x, x_there), (w, w_there)):
            assert here.grad is not None
            assert there.grad is not None
            assert torch.allclose(there.grad.get(), here.grad, rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]
        (second,) = torch.autograd.grad((w_there**3).sum(), w_there, create_graph=True)
        (third,) = torch.autograd.grad(second.sum(), w_there)
        assert torch.allclose(third.get(), 6 * w.detach(), rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]


def test_a_convolutional_network_trains() -> None:
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(18, 3))
    remote = copy.deepcopy(plain)
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 2, 1, 2])
    with sordino.simulate(agents=1) as fleet:
        alice = fleet["alice"]
        alice.send(remote)
        images_there, labels_there = alice.send(images), alice.send(labels)
        for model, x, y in ((plain, images, labels), (remote, images_there, labels_there)):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        fleet.get(remote)
    for one, other in zip(plain.parameters(), remote.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_shared_parameters_stay_shared_and_a_failed_send_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    before = list(model.parameters())
    with sordino.simulate(agents=1) as fleet:
        model[1].register_buffer("odd", torch.ones(2, dtype=torch.complex64))
        with pytest.raises(WrongPlace):
            fleet.send(model, fleet["alice"])
        assert [id(p) for p in model.parameters()] == [id(p) for p in before]
        del model[1]._buffers["odd"]
        fleet.send(model, fleet["alice"])
        assert model[0].weight is model[1].weight
        assert isinstance(model[0].bias, sordino.PointerTensor)
        fleet.get(model)
        assert model[0].weight is model[1].weight
        assert torch.equal(model[0].weight, before[0])
