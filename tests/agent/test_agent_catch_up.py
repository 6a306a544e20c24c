"""What a task puts off until its outcome is on its way: whose time it is, and who hears of its errors."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from sordino_agent import worker
from sordino_agent.data.catalogue import MemoryCatalogue
from sordino_agent.spdz.bench import Bench
from sordino_agent.spdz.tasks import SpdzFacts, SpdzTask
from sordino_agent.tasks import DescribeTask, Done, TaskCost, decode_outcome, encode_task
from sordino_agent.workshop import Prepared, Programs, Workshop, plan_limits
from sordino_common.errors import RemoteError
from sordino_common.plan.plan import decode_plan

SHARES = SpdzTask(session=bytes(16), setup=None, events=())


class Shop:
    """A workshop whose tasks take no time; `puts_off` is done when it catches up."""

    def __init__(self, puts_off: Any = None) -> None:
        self.puts_off = puts_off

    def prepare(self, task: Any) -> Prepared:
        return Prepared(cost=TaskCost(kind=task.kind), run=lambda _: SpdzFacts(effects=()))

    def catch_up(self) -> None:
        if self.puts_off is not None:
            self.puts_off()


def perform(task: Any, caught_up_s: float) -> Done:
    outcome = worker._perform(Shop(), encode_task(task), worker._Interrupts(), caught_up_s)  # type: ignore[arg-type]
    assert isinstance(outcome, Done)
    return outcome


def test_the_time_counts_for_the_session_and_for_nobody_else() -> None:
    assert 2.0 <= perform(SHARES, 2.0).seconds < 3.0
    assert perform(DescribeTask(), 2.0).seconds < 1.0


def test_it_takes_the_time_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [5.0]
    monkeypatch.setattr("time.process_time", lambda: now_s[0])

    def put_off() -> None:
        now_s[0] += 0.25

    assert worker._catch_up(Shop(put_off)) == 0.25  # type: ignore[arg-type]
    assert worker._catch_up(Shop()) == 0.0  # type: ignore[arg-type]


def test_an_outcome_leaves_before_what_its_task_put_off_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next task is read after that; an error on the way ends nothing."""
    now_s, said = [5.0], []
    monkeypatch.setattr("time.process_time", lambda: now_s[0])
    frames = iter((encode_task(SHARES), encode_task(SHARES), None))

    def put_off() -> None:
        said.append("caught up")
        now_s[0] += 0.25
        raise RemoteError("not now")

    def read() -> bytes | None:
        said.append("read")
        return next(frames)

    def write(data: bytes | bytearray) -> None:
        outcome = decode_outcome(bytes(data))
        assert isinstance(outcome, Done)
        said.append(f"outcome, {outcome.seconds:g} s")

    worker._serve(Shop(put_off), read, write, worker._Interrupts())  # type: ignore[arg-type]
    assert said == ["read", "outcome, 0 s", "caught up", "read", "outcome, 0.25 s", "caught up", "read"]


def test_every_session_of_a_worker_catches_up() -> None:
    done: list[str] = []
    bench = Bench(catalogue=MemoryCatalogue([]), plan_of=decode_plan)
    for name in ("one", "another"):
        seat = SimpleNamespace(catch_up=partial(done.append, name))
        bench._seats[name.encode()] = seat, TaskCost(kind="spdz")  # type: ignore[assignment]
    limits = plan_limits(1 << 20)
    shop = Workshop(
        catalogue=MemoryCatalogue([]),
        programs=Programs(executor="numpy", limits=limits),
        memory_bytes=1 << 20,
        bench=bench,
    )
    shop.catch_up()
    assert done == ["one", "another"]


def test_an_error_waits_for_the_task_that_needs_it() -> None:
    def put_off() -> None:
        raise RemoteError("not now")

    assert worker._catch_up(Shop(put_off)) >= 0.0  # type: ignore[arg-type]
