"""The law of expectation: what a loop records by following its last step is what it records by looking things up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sordino_server as sordino
from sordino_server.tensors.calls import read
from sordino_server.tensors.errors import UnsupportedOperation, WrongPlace
from sordino_server.tensors.fleet import PointerFleet
from sordino_server.tensors.recorder import Recorder
from sordino_server.tensors.script import Script


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every call that is followed is looked up, every flush that is known is walked, too: both must be the same. What
    there was of both, by name."""
    said: list[str] = []
    follow, repeated = Script.follow, Recorder._repeated

    def looked_up(script: Script, args: Any, kwargs: Any, pointer: Any, owner: Any) -> Any:
        call = script.expected
        found = follow(script, args, kwargs, pointer, owner)
        if found is not None and call is not None:
            wanted = read(call.func, args, kwargs, pointer)
            assert wanted is not None
            key, pointers, numbers = wanted
            assert call.form is owner.recorder.compiler.forms[key]
            assert [id(value) for value in found[0]] == [id(entry.value()) for entry in pointers]
            assert repr(found[1]) == repr(numbers)
            assert all(entry.owner is owner for entry in pointers)
            said.append("call")
        return found

    def walked(recorder: Recorder, known: Any, outputs: Any, left: Any) -> Any:
        request = repeated(recorder, known, outputs, left)
        other = recorder._walked("all", dict(outputs), left)
        assert other is not None
        assert request == other
        assert all(line is wanted for line, wanted in zip(request.lines, other.lines, strict=True))
        said.append("flush")
        return request

    monkeypatch.setattr(Script, "follow", looked_up)
    monkeypatch.setattr(Recorder, "_repeated", walked)
    return said


def written(x: Tensor, y: Tensor, n: Any) -> Tensor:
    copy = x.clone()
    copy.mul_(n)
    copy[1:] += y[:-1]
    return copy


# Each takes two [3, 4] tensors and a number, and gives one.
OPERATIONS: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "add": lambda x, y, n: torch.add(x, y, alpha=n),
    "mul": lambda x, y, n: x * n,
    "other": lambda x, y, n: y * n,
    "clamp": lambda x, y, n: x.clamp(min=n) + y,
    "power": lambda x, y, n: x.abs().pow(n),
    "columns": lambda x, y, n: x + y.sum(0, keepdim=True),
    "rows": lambda x, y, n: x + y.sum(1, keepdim=True),
    "turned": lambda x, y, n: x.t().reshape(3, 4) - y,
    "joined": lambda x, y, n: torch.cat([x[:, :2], y[:, 2:]], dim=1),
    "parts": lambda x, y, n: torch.nn.functional.layer_norm(x, (4,)) + y,
    "dead": lambda x, y, n: (x.exp(), y.tanh())[1],
    "whole": lambda x, y, n: x + y.to(torch.int64),
    "squares": lambda x, y, n: x * x + y,
    "written": written,
}
LINES = st.tuples(
    st.sampled_from(sorted(OPERATIONS)), st.integers(0, 4), st.integers(0, 4), st.sampled_from([2, 2.0, 0.5, 0.0])
)
PROGRAMS = st.lists(LINES, min_size=1, max_size=6)
# Of each turn: which line is another one (if there is such a line), what it is, whether its result outlives the turn,
# and behind which line all is sent.
TURNS = st.lists(st.tuples(st.integers(0, 9), LINES, st.booleans(), st.integers(0, 9)), min_size=4, max_size=7)


def run(values: list[Tensor], program: list[Any], turns: list[Any], flush: Callable[[], None]) -> Iterator[Tensor]:
    """Turns of a loop, each of which goes on with what the one before gave, and what outlives them."""
    kept: list[Tensor] = []
    for place, line, keep, sent in turns:
        now = list(program)
        if place < len(now):
            now[place] = line
        for k, (name, first, second, number) in enumerate(now):
            values.append(OPERATIONS[name](values[-1 - first % len(values)], values[-1 - second % len(values)], number))
            if k == sent:
                flush()
        last = values[-1]
        if keep:
            kept.append(last)
        del values[2:]
        values[1] = last / (1 + last.abs().sum())
        yield values[1]
    yield from kept


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(program=PROGRAMS, turns=TURNS, seed=st.integers(0, 1000))
def test_following_is_looking_up(followed: list[str], program: list[Any], turns: list[Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    plain = [torch.randn(3, 4, generator=generator) for _ in range(2)]
    with sordino.simulate(agents=1) as fleet:
        there: list[Tensor] = [fleet["alice"].send(tensor) for tensor in plain]
        found = run(there, program, turns, fleet.flush)
        for want, got in zip(run(plain, program, turns, lambda: None), found, strict=True):
            assert torch.allclose(fleet.get(got), want, rtol=1e-3, atol=1e-4)


def step(fleet: PointerFleet, optimizer: str) -> Callable[[float], Any]:
    torch.manual_seed(1)
    alice = fleet["alice"]
    model = alice.send(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)))
    steps: Any = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)
    x, y = alice.send(torch.randn(6, 3)), alice.send(torch.randn(6, 1))

    def one(rate: float) -> Tensor:
        steps.param_groups[0]["lr"] = rate
        steps.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        steps.step()
        return loss

    return one


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_training_loop_is_followed(followed: list[str], optimizer: str) -> None:
    with sordino.simulate(agents=1) as fleet:
        one = step(fleet, optimizer)
        for turn in range(6):
            del followed[:]
            loss = one(0.1 / (turn + 1))
            recorded = fleet["alice"].recorder.recorded
            loss.get()
        assert followed == ["call"] * recorded + ["flush"]


def test_what_is_read_is_told_apart_by_shape_and_agent(followed: list[str]) -> None:
    with sordino.simulate(agents=2) as fleet:
        tensors = [fleet[name].send(torch.ones(n)) for name in ("alice", "bob") for n in (2, 2, 3)]
        for _ in range(3):
            for x in tensors:
                assert torch.equal((x * 2 + x).sum().get(), 3 * torch.ones(x.shape).sum())
        assert "flush" in followed


def test_code_that_is_dead_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sordino_server.tensors.recorder.PENDING_MOST", 50)
    with sordino.simulate(agents=1) as fleet:
        x, recorder = fleet["alice"].send(torch.ones(3)), fleet["alice"].recorder
        for _ in range(300):
            x * 2
        assert recorder.recorded <= 50
        assert len(recorder.script.lines) == recorder.recorded
        assert len(recorder._pending) <= 51
        assert [sent.kind for sent in fleet.trace()] == ["tensor-put"]


def test_a_refused_call_leaves_what_was_expected(followed: list[str]) -> None:
    with sordino.simulate(agents=2) as fleet:
        x, strange = fleet["alice"].send(torch.ones(3)), fleet["bob"].send(torch.ones(3))
        for turn in range(5):
            y = x * 2
            if turn > 2:
                with pytest.raises(WrongPlace):
                    y + strange
                with pytest.raises(UnsupportedOperation):
                    y.cumsum(0)
            del followed[:]
            assert torch.equal((y + x).get(), torch.full((3,), 3.0))
        assert followed == ["call", "flush"]
