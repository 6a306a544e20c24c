"""Has runs carried out by agents; one of them may be under way before it is asked for (`ahead`)."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol, TypeVar

from sordino_common.errors import SordinoError
from sordino_common.messages import Message, TensorGet
from sordino_server.rounds.effects import Answers, Effect, Result
from sordino_server.rounds.spdz import World
from sordino_server.tensors import messages
from sordino_server.tensors.ahead import Ahead
from sordino_server.tensors.messages import Run, Terms
from sordino_server.tensors.recorder import Recorder, Request

T = TypeVar("T")

STOP_S: Final = 10.0  # to free and to stop needs no computing
DROP_MOST: Final = 4096  # as messages.TensorIds


class Driver(Protocol):
    """A connection, and the loop under it."""

    @property
    def members(self) -> Sequence[str]:
        """Names of the agents."""
        ...

    def drive(self, generator: Generator[Effect, Result, T]) -> T:
        """Run a round generator to its end."""
        ...

    def begin(self, generator: Generator[Effect, Result, Any]) -> bool:
        """Run a round generator until it waits for answers: what it asks has left. Whether it does wait; then `finish`
        or `abandon` has to come before the next one."""
        ...

    def also(self, name: str, message: Message) -> bool:
        """Send `name` a message behind what the generator that has begun asks it (`Ask.behind`); False, and nothing is
        sent, if that is answered already."""
        ...

    def finish(self) -> Any:
        """Run the generator that has begun to its end."""
        ...

    def abandon(self) -> None:
        """Wait no more for what the generator that has begun asks."""
        ...

    def now_s(self) -> float: ...

    def world(self) -> World:
        """What computing on shares needs of it: who deals, with which generator."""
        ...

    def close(self) -> None: ...


class Agent(Protocol):
    """What is to be known of an agent. `plans`: ids of those that it has seen."""

    name: str
    recorder: Recorder
    plans: set[bytes]


class Runner:
    """Runs of the agents of a connection. `random(n)`: n bytes for ids. `note` is told of every run
    that is sent, and whether its first output is asked for behind it."""

    def __init__(
        self,
        driver: Driver,
        terms: Terms,
        agents: Mapping[str, Agent],
        *,
        random: Callable[[int], bytes],
        note: Callable[[str, Run, bool], None],
    ) -> None:
        self._driver = driver
        self._terms = terms
        self._agents = agents
        self._random = random
        self._note = note
        self._ahead: Ahead | None = None
        self._looks_ahead = True

    def drive(self, generator: Generator[Effect, Result, T]) -> T:
        """As `Driver.drive`. Of what was sent ahead nothing is under way any more."""
        self.call_ahead_off()
        return self._driver.drive(generator)

    def prepared(self, agent: Agent, request: Request, *, get: bool) -> Run:
        """The request's run, which may be under way already."""
        ahead = self._ahead
        if ahead is not None and ahead.is_that_of(agent.name, request):
            return Run(request=request, ids=ahead.run.ids, drops=ahead.run.drops, get=get)
        ids, drops = self._new_ids(len(request.outputs)), taken(agent.recorder.forgotten)
        return Run(request=request, ids=ids, drops=drops, get=get)

    def carry_out(self, runs: dict[str, Run]) -> Answers:
        """Have all runs done. One that had to be sent anew has other ids in `runs` afterwards."""
        ahead = self._ahead
        if ahead is not None and ahead.agent in runs and runs[ahead.agent].ids is ahead.run.ids:
            return self._carry_out_with(ahead.agent, runs)
        for name, run in runs.items():
            self._note(name, run, run.get)
        return self.drive(messages.run_all(self._terms, runs, lambda name: self._agents[name].plans))

    def _carry_out_with(self, name: str, runs: dict[str, Run]) -> Answers:
        """The run of `name` is under way. If nothing comes of it, it is sent once more as if it never had been, so that
        what a user is told holds now, and not when a backward pass began."""
        recorder, run = self._agents[name].recorder, runs[name]
        asked = run.get and self._driver.also(name, TensorGet(tensor_id=run.ids[0]))
        self._note(name, run, asked)
        self._ahead, since_s = None, self._driver.now_s()
        first: Answers = self._driver.finish()
        in_vain = self._driver.now_s() - since_s > self._terms.deadline_s / 2  # not twice
        if name in first.refusals or (name in first.missing and not in_vain):
            recorder.foresight.wrong()
            recorder.forgotten.extend(run.ids)  # they may come to be
            runs[name] = replace(run, ids=self._new_ids(len(run.ids)))
            return self.carry_out(runs)
        recorder.foresight.right()
        others = {other: run for other, run in runs.items() if other != name}
        if not others:
            return first
        rest = self.carry_out(others)
        return Answers(
            replies={**first.replies, **rest.replies},
            refusals=rest.refusals,
            missing={**first.missing, **rest.missing},
            behind={**first.behind, **rest.behind},
        )

    def look_ahead(self, agent: Agent) -> None:
        """A backward pass begins on this agent: send the run with which the step will end, if that is foreseen."""
        recorder = agent.recorder
        if self._ahead is not None or not self._looks_ahead:
            return
        step = recorder.foresight.next(recorder.script)
        if step is None or step.compiled.traced.plan_id not in agent.plans:
            return
        request = Request(compiled=step.compiled, inputs=step.inputs, outputs=(), numbers=step.numbers, lines=())
        run = Run(request=request, ids=self._new_ids(step.outputs), drops=taken(recorder.forgotten))
        self._ahead = Ahead(agent=agent.name, run=run)
        try:
            waits = self._driver.begin(
                messages.run_all(self._terms, {agent.name: run}, lambda name: self._agents[name].plans)
            )
        except BaseException:  # Ctrl-C: nobody knows whether it has left
            with contextlib.suppress(KeyboardInterrupt):
                self.call_ahead_off()
            raise
        if not waits:  # nobody is there to answer
            self.call_ahead_off()

    def stop(self) -> None:
        """Nothing is sent ahead any more."""
        self._looks_ahead = False
        self.call_ahead_off()

    def call_ahead_off(self) -> None:
        """The run that is under way, if there is one, is not what was recorded, or something else comes first."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return
        recorder = self._agents[ahead.agent].recorder
        recorder.foresight.wrong()
        recorder.forgotten.extend(ahead.run.drops)  # they may still be there
        self._note(ahead.agent, ahead.run, False)
        self._driver.abandon()
        self.call_off({ahead.agent: ahead.run.ids})

    def call_off(self, tasks: Mapping[str, tuple[bytes, ...]]) -> None:
        """No task that was to give these ids goes on, and what it has left is freed. Where that can't be said, the ids
        are forgotten later, or leases end."""
        answered: frozenset[str] = frozenset()
        terms = replace(self._terms, deadline_s=min(self._terms.deadline_s, STOP_S))
        try:
            with contextlib.suppress(SordinoError):
                answered = frozenset(self.drive(messages.call_off(terms, tasks)).replies)
        finally:
            for name, ids in tasks.items():
                if name not in answered:
                    self._agents[name].recorder.forgotten.extend(ids)

    def _new_ids(self, count: int) -> tuple[bytes, ...]:
        drawn = self._random(16 * count)
        return tuple([drawn[k : k + 16] for k in range(0, 16 * count, 16)])


def taken(ids: deque[bytes]) -> tuple[bytes, ...]:
    """What is to be forgotten, as far as one message takes it; it is out of `ids` then."""
    found: list[bytes] = []
    while ids and len(found) < DROP_MOST:
        found.append(ids.popleft())
    return tuple(found)
