"""What goes to the agents, as round generators: puts, Plans, runs, fetches. No I/O.

Rounds: a flush is one message to each agent that has something to do (`tensor-run`, which also carries the ids that
nobody needs any more), after one more (`plan-put`) the first time that an agent sees a Plan. Who fetches a result asks
for it right behind the run (`tensor-get`), so that run and fetch are one round trip.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from sordino_common.messages import (
    Array,
    Cancel,
    Message,
    PlanPut,
    PlanReady,
    Refused,
    TensorDrop,
    TensorDropped,
    TensorGet,
    TensorRun,
    TensorStored,
    task_of,
)
from sordino_common.plan.arrays import from_numpy
from sordino_server.rounds.effects import Answers, Ask, Effect, Result, ask, tell
from sordino_server.tensors.errors import AgentAway, RemoteFailure
from sordino_server.tensors.recorder import Request
from sordino_server.waits import printable

# Refusals after which the same command may succeed: the device is busy or full, or its owner may allow it.
_PASSING: Final = ("busy", "limit", "draining", "policy", "budget", "worker")
NOTHING: Final[Mapping[str, Message]] = {}
Turn = Generator[Effect, Result, Answers]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Of a connection: how long to wait for an answer, how long tensors are kept on agents."""

    deadline_s: float
    lease_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A request with the ids that its outputs will have. `get`: its first output is asked for right behind it."""

    request: Request
    ids: tuple[bytes, ...]
    drops: tuple[bytes, ...]
    get: bool = False

    def message(self, terms: Terms) -> TensorRun:
        request = self.request
        inputs: list[bytes] = []
        for value in request.inputs:
            assert value.stored is not None
            inputs.append(value.stored.tensor_id)
        values: list[Array] = [
            from_numpy(np.asarray(request.numbers[index], dtype=dtype)) for index, dtype in request.compiled.lifted
        ]
        return TensorRun(
            plan_id=request.compiled.traced.plan_id,
            inputs=tuple(inputs),
            outputs=self.ids,
            values=tuple(values),
            drops=self.drops,
            lease_s=terms.lease_s,
        )


def question(
    terms: Terms,
    purpose: str,
    messages: Mapping[str, Message],
    expects: type[Message],
    behind: Mapping[str, Message] = NOTHING,
) -> Turn:
    """Ask agents, all of them, and wait until each has answered, refused, or is lost. `behind`: see `Ask`."""
    answers = yield from ask(
        Ask(
            purpose=purpose,
            messages=messages,
            expects=expects,
            quorum=len(messages),
            deadline_s=terms.deadline_s,
            straggler_s=terms.deadline_s,
            behind=behind,
        )
    )
    return answers


def run_all(
    terms: Terms, runs: Mapping[str, Run], known: Callable[[str], set[bytes]]
) -> Generator[Effect, Result, Answers]:
    """Run each agent's request. `known(name)`: Plans that the agent has seen, kept up to date here. An agent that has
    forgotten the Plan gets it once more."""
    refusals: dict[str, str] = {}
    missing: dict[str, str] = {}
    replies: dict[str, Message] = {}
    behind: dict[str, Message] = {}
    left = dict(runs)
    for _ in range(2):
        puts: dict[str, Message] = {}
        for name, run in left.items():
            traced = run.request.compiled.traced
            if traced.plan_id not in known(name):
                puts[name] = PlanPut(plan=traced.data)
        if puts:
            ready = yield from question(terms, "plans", puts, PlanReady)
            for name in ready.replies:
                known(name).add(runs[name].request.compiled.traced.plan_id)
            refusals.update(ready.refusals)
            missing.update(ready.missing)
            left = {name: run for name, run in left.items() if name not in puts or name in ready.replies}
        if not left:
            break
        commands: dict[str, Message] = {}
        gets: dict[str, Message] = {}
        for name, run in left.items():
            commands[name] = run.message(terms)
            if run.get:
                gets[name] = TensorGet(tensor_id=run.ids[0])
        answers = yield from question(terms, "tensors", commands, TensorStored, gets)
        replies.update(answers.replies)
        behind.update(answers.behind)
        missing.update(answers.missing)
        if not answers.refusals:
            return Answers(replies=replies, refusals=refusals, missing=missing, behind=behind)
        unknown = {name for name, reason in answers.refusals.items() if reason.startswith("unknown-plan:")}
        for name in unknown:
            known(name).discard(runs[name].request.compiled.traced.plan_id)
        refusals.update({name: why for name, why in answers.refusals.items() if name not in unknown})
        left = {name: run for name, run in left.items() if name in unknown}
    refusals.update(dict.fromkeys(left, "unknown-plan: the agent forgets the Plan as soon as it has it"))
    return Answers(replies=replies, refusals=refusals, missing=missing, behind=behind)


def call_off(terms: Terms, tasks: Mapping[str, tuple[bytes, ...]]) -> Turn:
    """Stop each agent's task whose outputs were to have these ids, and have the ids forgotten: the task is over when
    that is answered, or will never begin."""
    for name, ids in tasks.items():
        yield from tell(name, Cancel(run=task_of(ids[0]), round=None))
    drops = {name: TensorDrop(tensor_ids=ids) for name, ids in tasks.items()}
    return (yield from question(terms, "stopping", drops, TensorDropped))


def failure(name: str, answers: Answers, *, what: str, lines: tuple[str, ...] = ()) -> AgentAway | RemoteFailure:
    """Why there is no reply of `name`, as an error with the agent's own reason and the user's lines."""
    place = ""
    if lines:
        place = f" (recorded at {lines[0]})" if len(lines) == 1 else f" (recorded from {lines[0]} to {lines[-1]})"
    if name in answers.missing:
        return AgentAway(
            f"{what} on {name}{place}: {answers.missing[name]}; what is recorded is kept, "
            f"and goes with the next attempt"
        )
    return _refused(name, answers.refusals[name], what=f"{what} on {name}{place}", lines=lines)


def overtook(refusal: Message | None) -> bool:
    """Whether a `tensor-get` came before the run behind which it was sent."""
    return isinstance(refusal, Refused) and refusal.code == "unknown-tensor"


def get_failure(name: str, refusal: Refused) -> RemoteFailure:
    """As `failure`, of what was asked for behind a run."""
    return _refused(name, printable(f"{refusal.code}: {refusal.reason}"), what=f"get on {name}")


def _refused(name: str, reason: str, *, what: str, lines: tuple[str, ...] = ()) -> RemoteFailure:
    return RemoteFailure(f"{what}: {reason}", agent=name, reason=reason, lines=lines)


def passing(reason: str) -> bool:
    """Whether the refused command may succeed later."""
    return reason.partition(":")[0] in _PASSING
