"""Steps that leave before they are recorded to their end: what they give, and what becomes of those that were wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import sordino_server as sordino
from sordino_agent.policy import Policy
from sordino_server.conductor import Conductor
from sordino_server.tensors.ahead import SURE, Foresight
from sordino_server.tensors.errors import AgentAway, RemoteFailure
from sordino_server.tensors.fleet import PointerFleet

TOLD = SURE + 4  # steps of a loop until one is sent ahead: two are looked up, one is the first that is known
KEPT = 2 * 4 + 2 + 1  # the parameters, those that the last gradients are of, rows, loss
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.5, weight_decay=0.01),
    "Adam": partial(torch.optim.Adam, lr=0.1),
}


class Loop:
    """A model, its optimizer and rows, here (`agent` None) or on an agent; a step in parts."""

    def __init__(self, agent: Any = None, optimizer: str = "SGD") -> None:
        torch.manual_seed(3)
        self.model: Any = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        x, y = torch.randn(6, 3), torch.randn(6, 1)
        if agent is not None:
            self.model, x, y = agent.send(self.model), agent.send(x), agent.send(y)
        self.x, self.y = x, y
        self.optimizer: Any = OPTIMIZERS[optimizer](self.model.parameters())
        self.loss: Any = None

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.loss = nn.functional.mse_loss(self.model(self.x), self.y)
        self.loss.backward()

    def finish(self) -> Any:
        self.optimizer.step()
        return self.loss.get()

    def step(self, rate: float = 0.1) -> Any:
        self.optimizer.param_groups[0]["lr"] = rate
        self.backward()
        self.optimizer.step()
        return self.loss


def there(fleet: PointerFleet, name: str = "alice") -> Any:
    driver: Any = fleet._driver
    return driver.fleet.agents[name].core


@contextmanager
def sent_ahead(fleet: PointerFleet, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What happens: `ahead` a run leaves early, `right` it was the flush, `wrong` it was not."""
    said: list[str] = []
    begin, right, wrong = fleet._driver.begin, Foresight.right, Foresight.wrong
    with monkeypatch.context() as patch:
        patch.setattr(fleet._driver, "begin", lambda turn: said.append("ahead") or begin(turn))
        patch.setattr(Foresight, "right", lambda foresight: said.append("right") or right(foresight))
        patch.setattr(Foresight, "wrong", lambda foresight: said.append("wrong") or wrong(foresight))
        yield said


def test_a_step_leaves_when_its_backward_pass_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Loop()
    with sordino.simulate(agents=1) as fleet, sent_ahead(fleet, monkeypatch) as said:
        loop = Loop(fleet["alice"])
        for turn in range(TOLD + 3):
            del said[:]
            since = len(fleet.trace())
            loop.backward()
            begun = list(said)
            loop.optimizer.step()
            assert loop.loss.get() == pytest.approx(plain.step().item(), rel=1e-5)
            kinds = [sent.kind for sent in fleet.trace()[since:] if sent.kind != "plan-put"]
            assert kinds == ["tensor-run", "tensor-get"]
            assert fleet.trace()[-2].lines != ()
            assert (begun, said) == ((["ahead"], ["ahead", "right"]) if turn >= TOLD - 1 else ([], []))
        assert there(fleet).health().store_tensors == KEPT


def test_momentum_is_read_late_and_foreseen_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Loop(optimizer="momentum")
    with sordino.simulate(agents=1) as fleet, sent_ahead(fleet, monkeypatch) as said:
        loop = Loop(fleet["alice"], "momentum")
        for _ in range(TOLD + SURE + 5):
            since = len(fleet.trace())
            assert loop.step().get() == pytest.approx(plain.step().item(), rel=1e-4)
        assert [sent.kind for sent in fleet.trace()[since:]] == ["tensor-run", "tensor-get"]
        assert said[-4:] == ["ahead", "right"] * 2
        del said[:]
        buffers = [state["momentum_buffer"] for state in loop.optimizer.state.values()]
        with torch.no_grad():
            for buffer, other in zip(buffers, plain.optimizer.state.values(), strict=True):
                buffer.zero_()
                other["momentum_buffer"].zero_()
        fleet.flush()
        for _ in range(2):
            assert loop.step().get() == pytest.approx(plain.step().item(), rel=1e-4)
    assert "right" not in said


@pytest.mark.parametrize(("optimizer", "rate"), [("Adam", lambda turn: 0.1), ("SGD", lambda turn: 0.1 / (turn + 1))])
def test_numbers_that_change_are_not_foreseen(
    optimizer: str, rate: Callable[[int], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Loop(optimizer=optimizer)
    with sordino.simulate(agents=1) as fleet, sent_ahead(fleet, monkeypatch) as said:
        loop = Loop(fleet["alice"], optimizer)
        for turn in range(TOLD + 3):
            assert loop.step(rate(turn)).get() == pytest.approx(plain.step(rate(turn)).item(), rel=1e-4)
        assert said == []


def test_a_run_for_nothing_is_called_off_unseen_and_makes_the_next_one_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Loop()
    with sordino.simulate(agents=1) as fleet, sent_ahead(fleet, monkeypatch) as said:
        loop, core = Loop(fleet["alice"]), there(fleet)
        came: list[str] = []
        on_message = Conductor.on_message

        def heard(conductor: Conductor, incoming: Any) -> None:
            came.append(incoming.message.kind)
            on_message(conductor, incoming)

        monkeypatch.setattr(Conductor, "on_message", heard)
        for rate in [0.1] * TOLD + [0.2] + [0.1] * (2 * SURE) + [0.1] * 6:
            assert loop.step(rate).get() == pytest.approx(plain.step(rate).item(), rel=1e-4)
        first_wrong = said.index("wrong")
        assert said[: first_wrong + 1] == ["ahead", "right", "ahead", "wrong"]
        again = said[first_wrong + 1 :]
        assert again == ["ahead", "right"] * (len(again) // 2)
        assert 0 < len(again) // 2 <= 6
        assert came.count("tensor-value") == TOLD + 1 + 2 * SURE + 6  # what nobody asked for was not told
        assert core.health().store_tensors == KEPT
        assert core.running == ()


# What a turn of a loop does besides, or instead.
TURNS: dict[str, Callable[[Loop], Any]] = {
    "step": lambda loop: loop.step(),
    "faster": lambda loop: loop.step(0.3),
    "looks": lambda loop: (loop.backward(), loop.loss)[1],
    "asks for a gradient": lambda loop: (loop.step(), loop.model[0].weight.grad)[1],
    "looks twice": lambda loop: (loop.backward(), loop.backward(), loop.optimizer.step(), loop.loss)[3],
    "predicts": lambda loop: loop.model(loop.x).sum(),
    "predicts after": lambda loop: (loop.backward(), loop.optimizer.step(), loop.model(loop.x).sum())[2],
    "adds": lambda loop: (loop.backward(), loop.loss.detach() + loop.y.sum())[1],
    "drops": lambda loop: (loop.backward(), setattr(loop, "loss", None), loop.y.mean())[2],
    "clips": lambda loop: (
        loop.backward(),
        torch.nn.utils.clip_grad_value_(loop.model.parameters(), 0.01, foreach=False),
        loop.optimizer.step(),
        loop.loss,
    )[3],
}
PROGRAMS = st.lists(
    st.tuples(st.sampled_from(["step", *sorted(TURNS)]), st.integers(1, 6), st.booleans()), min_size=2, max_size=6
)


@pytest.mark.parametrize(("agents", "optimizer", "examples"), [(1, "SGD", 6), (1, "momentum", 4), (2, "SGD", 4)])
def test_whatever_comes_of_it_is_what_pytorch_gives(
    monkeypatch: pytest.MonkeyPatch, agents: int, optimizer: str, examples: int
) -> None:
    monkeypatch.setattr("sordino_server.tensors.ahead.SURE", 1)
    seen: list[str] = []

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(program=PROGRAMS)
    def law(program: list[tuple[str, int, bool]]) -> None:
        plain = [Loop(optimizer=optimizer) for _ in range(agents)]
        with sordino.simulate(agents=agents) as fleet, sent_ahead(fleet, monkeypatch) as said:
            loops = [Loop(agent, optimizer) for agent in fleet]
            turns = [(TURNS[name], flush) for name, times, flush in program for _ in range(times)]
            for turn, flush in turns:
                got = [turn(loop) for loop in loops]
                if flush:
                    fleet.flush()
                for mine, want in zip(got, [turn(loop) for loop in plain], strict=True):
                    assert torch.allclose(mine.get(), want, rtol=1e-3, atol=1e-5)
            for loop, other in zip(loops, plain, strict=True):
                for mine, want in zip(loop.model.parameters(), other.model.parameters(), strict=True):
                    assert torch.allclose(mine.get(), want, rtol=1e-3, atol=1e-5)
            cores = [there(fleet, agent.name) for agent in fleet]
            seen.extend(said)
        assert [core.health().store_tensors for core in cores] == [0] * agents
        assert all(core.running == () for core in cores)

    law()
    assert {"ahead", "right", "wrong"} <= set(seen)


def until_ahead(fleet: PointerFleet) -> Loop:
    """A loop whose next backward pass sends its step."""
    loop = Loop(fleet["alice"])
    for _ in range(TOLD):
        loop.step().get()
    return loop


def told(error: type[Exception], act: Callable[[], object]) -> str:
    with pytest.raises(error) as found:
        act()
    return str(found.value)


def test_what_is_refused_ahead_is_told_as_if_it_had_not_been(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    for looks_ahead in (True, False):
        with sordino.simulate(agents=1) as fleet, sent_ahead(fleet, monkeypatch) as said:
            loop, core = until_ahead(fleet), there(fleet)
            fleet.runner._looks_ahead = looks_ahead
            del said[:]
            core._policy, allowed = Policy(jobs=("tensors",), fetch="any"), core._policy
            loss = loop.step()
            texts.append(told(RemoteFailure, loss.get))
            assert said == (["ahead", "wrong"] if looks_ahead else [])
            core._policy = allowed
            plain = [Loop().step() for _ in range(1)]
            assert loss.get() < plain[0]
            assert core.health().store_tensors == KEPT
    assert texts[0] == texts[1]
    assert "policy.plans" in texts[0]
    assert f"recorded from {__file__}" in texts[0]


def test_who_is_away_when_a_step_leaves_is_asked_again() -> None:
    texts = []
    for looks_ahead in (True, False):
        with sordino.simulate(agents=1) as fleet:
            loop, driver = until_ahead(fleet), fleet._driver
            fleet.runner._looks_ahead = looks_ahead
            driver.fleet.leave("alice")  # type: ignore[attr-defined]
            driver._loop.advance(30.0)  # type: ignore[attr-defined]
            texts.append(told(AgentAway, loop.step().get))
            fleet.close(flush=False)
    assert texts[0] == texts[1]
    assert "what is recorded is kept" in texts[0]


@pytest.mark.parametrize("when", ["begins", "ends", "is called off"])
def test_ctrl_c_leaves_nothing_of_a_step_that_was_sent_ahead(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    with sordino.simulate(agents=1) as fleet:
        driver: Any = fleet._driver
        loop, core = until_ahead(fleet), there(fleet)
        run_until: Any = driver._loop.run_until

        def interrupted(*args: Any, **kwargs: Any) -> bool:
            monkeypatch.setattr(driver._loop, "run_until", run_until)
            run_until(lambda: False, deadline_s=driver.now_s() + 0.002)
            raise KeyboardInterrupt

        if when == "begins":
            start = Conductor.start

            def begun(*args: Any, **kwargs: Any) -> None:
                monkeypatch.setattr(Conductor, "start", start)
                start(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGINT)

            monkeypatch.setattr(Conductor, "start", begun)
        else:
            loop.backward()
            assert fleet.runner._ahead is not None
            monkeypatch.setattr(driver._loop, "run_until", interrupted)
        acts = {"begins": loop.backward, "ends": loop.finish, "is called off": lambda: loop.y.sum().get()}
        with pytest.raises(KeyboardInterrupt):
            acts[when]()
        assert fleet.runner._ahead is None
        assert core.running == ()
        loop.optimizer.step()
        assert loop.loss.get().isfinite()
        assert loop.step().get().isfinite()
    assert core.health().store_tensors == 0


def test_a_fleet_that_is_left_in_the_middle_of_a_step_is_left_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    with sordino.simulate(agents=1) as fleet, sent_ahead(fleet, monkeypatch) as said:
        loop, core = until_ahead(fleet), there(fleet)
        loop.backward()
        assert said[-1] == "ahead"
        fleet.close(flush=False)  # as an error in the program does
        assert said[-1] == "wrong"
        assert core.running == ()
        assert core.health().store_tensors == 0
