"""What a user holds: a fleet of agents, each of which takes tensors. Blocking, from the main thread.

with sordino.simulate(agents=3) as fleet:
    alice = fleet["agent-00"]
    x = alice.send(torch.tensor([1.0, 2.0, 3.0]))
    print((x * 2).sum().get())
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import TracebackType
from typing import Any, Final, Literal, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from sordino_common.errors import LocalError, PlanError, RemoteError
from sordino_common.messages import (
    Describe,
    Described,
    Message,
    PlanPut,
    PlanReady,
    Refused,
    TensorDrop,
    TensorDropped,
    TensorGet,
    TensorLoad,
    TensorPut,
    TensorRenew,
    TensorStored,
    TensorValue,
)
from sordino_common.plan.arrays import from_numpy, to_numpy
from sordino_common.plan.spec import TensorSpec
from sordino_common.spdz.lowering import Ranges
from sordino_server.rounds.effects import Effect, Result
from sordino_server.tensors import messages, modules
from sordino_server.tensors.chain import ChainTensor, LocalTensor
from sordino_server.tensors.compile import Compiler
from sordino_server.tensors.datasets import RemoteDataset
from sordino_server.tensors.errors import AgentAway, RemoteFailure, WrongPlace
from sordino_server.tensors.lines import Line
from sordino_server.tensors.messages import Run, Terms
from sordino_server.tensors.pointer import PointerTensor
from sordino_server.tensors.recorder import Recorder, Request, Scope
from sordino_server.tensors.running import DROP_MOST, STOP_S, Driver, Runner, taken
from sordino_server.tensors.shared.committees import Committees, bits_of, fetch_module
from sordino_server.tensors.shared.links import SharedTensor
from sordino_server.tensors.values import Value, interned
from sordino_server.trace.draft import spec_of
from sordino_server.trace.tracing import TracedPlan

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

LEASE_S: Final = 3600.0
DEADLINE_S: Final = 330.0  # an agent stops a Plan after limits.plan_seconds, 300 by default
_TRACE_KEPT: Final = 10_000
_NODE: Final = re.compile(r"\bnode (\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One command of the trace. `lines`: the user's, of the steps in it. `new`: the agent had not seen the Plan."""

    agent: str
    kind: str
    plan_id: bytes | None = None
    nodes: int = 0
    outputs: int = 0
    new: bool = False
    lines: tuple[str, ...] = ()


class RemoteAgent:
    """One agent of a fleet: takes tensors and modules, and has what was sent. An `Owner` of pointers."""

    def __init__(self, fleet: PointerFleet, name: str) -> None:
        self.name = name
        self.fleet = fleet
        self.recorder = Recorder(name, fleet.compiler, on_backward=lambda: fleet.runner.look_ahead(self))
        self.plans: set[bytes] = set()

    def __repr__(self) -> str:
        return f"RemoteAgent({self.name})"

    @property
    def link(self) -> type[PointerTensor]:
        """See `Owner`."""
        return PointerTensor

    @property
    def bring(self) -> str:
        """See `Owner`."""
        return ".move(agent)"

    @overload
    def send(self, tensor: Tensor) -> PointerTensor: ...
    @overload
    def send(self, tensor: M) -> M: ...

    def send(self, tensor: Any) -> Any:
        """A pointer to this tensor, which is stored on the agent now; or the module, its parameters and buffers
        replaced by pointers. Raises `RemoteFailure` (the agent's policy, its store is full) and `AgentAway`."""
        if isinstance(tensor, nn.Module):
            return modules.send(tensor, self.send)
        if isinstance(tensor, PointerTensor):
            return tensor.move(self)
        if isinstance(tensor, LocalTensor):
            tensor = tensor.get()
        if isinstance(tensor, ChainTensor):
            raise WrongPlace(f"send: {tensor.chain} is not here")
        return self.fleet.put(self, tensor)

    def datasets(self) -> tuple[RemoteDataset, ...]:
        """The datasets that this agent offers."""
        return tuple(RemoteDataset(agent=self, info=info) for info in self.fleet.describe(self).datasets)

    def dataset(self, name: str) -> RemoteDataset:
        """The dataset of that name; `WrongPlace` with those that there are."""
        datasets = self.datasets()
        for dataset in datasets:
            if dataset.name == name:
                return dataset
        there = ", ".join(dataset.name for dataset in datasets) or "none"
        raise WrongPlace(f"no dataset {name!r} on {self.name}; there are: {there}")

    def fetch(self, value: Value) -> Tensor:
        return self.fleet.fetch(self, value)

    def flush(self) -> None:
        """Send what was recorded for this agent."""
        self.fleet.flush(self)

    def end_step(self) -> None:
        """A step of a loop is over: send it, and leave what the next one has begun."""
        self.fleet._send((self,), "step")


class PointerFleet:
    """Agents by name. Leave the `with` to send what is left, free what is held, and close the connection."""

    def __init__(
        self,
        driver: Driver,
        *,
        random: Callable[[int], bytes] = os.urandom,
        lease_s: float = LEASE_S,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self.compiler = Compiler()
        self._driver = driver
        self._random = random
        self._terms = Terms(deadline_s=deadline_s, lease_s=lease_s)
        self._agents = {name: RemoteAgent(self, name) for name in driver.members}
        self._trace: deque[Sent] = deque(maxlen=_TRACE_KEPT)
        self._closed = False
        self._committees: Committees | None = None
        self.runner = Runner(driver, self._terms, self._agents, random=random, note=self._note_run)

    # --- what a user does ----------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> RemoteAgent:
        try:
            return self._agents[name]
        except KeyError:
            raise WrongPlace(
                f"no agent {name!r} in this fleet; there are {', '.join(self._agents) or 'none'}"
            ) from None

    def __iter__(self) -> Iterator[RemoteAgent]:
        return iter(self._agents.values())

    def __len__(self) -> int:
        return len(self._agents)

    def __enter__(self) -> PointerFleet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(flush=kind is None)

    @overload
    def send(self, tensor: Tensor, to: RemoteAgent) -> PointerTensor: ...
    @overload
    def send(self, tensor: M, to: RemoteAgent) -> M: ...

    def send(self, tensor: Any, to: RemoteAgent) -> Any:
        """As `to.send(tensor)`."""
        return to.send(tensor)

    def get(self, thing: Any) -> Any:
        """A pointer's tensor, or a shared one; or the module, its pointers replaced by what they point to."""
        if isinstance(thing, nn.Module):
            return fetch_module(thing)
        return thing.get()

    @overload
    def share(
        self,
        thing: Tensor,
        *agents: RemoteAgent,
        ranges: float | Ranges | None = None,
        security: str = "active",
        f: int | None = None,
    ) -> SharedTensor: ...
    @overload
    def share(
        self,
        thing: M,
        *agents: RemoteAgent,
        ranges: float | Ranges | None = None,
        security: str = "active",
        f: int | None = None,
    ) -> M: ...

    def share(
        self,
        thing: Any,
        *agents: RemoteAgent,
        ranges: float | Ranges | None = None,
        security: str = "active",
        f: int | None = None,
    ) -> Any:
        """Shares of a tensor on 2 to 4 agents: of one that is here, masked by this process; of one on an agent of the
        committee, masked there and never seen here, if its policy lets it. Of a module: all its parameters and buffers,
        replaced in place; make the optimizer afterwards.

        `ranges`: what no value passes in size, a promise: a number for what is shared, or `Ranges` with what holds of
        all that is computed of it, too. By default 8 for tensors and 4 for parameters. `f`: fraction bits, 14 by
        default. `security`: `passive` does without the MAC check.

        Raises `WrongPlace` for what can't be shared, `RemoteFailure` with a member's reason, `AgentAway`."""
        committee = self.committees.committee(agents, security, bits_of(thing, f))
        if isinstance(thing, nn.Module):
            return self.committees.share_module(thing, committee, ranges=ranges)
        (shared,) = self.committees.share((thing,), committee, ranges=ranges)
        return shared

    def search(self, tag: str) -> tuple[RemoteDataset, ...]:
        """All datasets in the fleet with this tag, or of this name. Agents that are away, or don't describe
        themselves, have none."""
        found: list[RemoteDataset] = []
        for agent in self._agents.values():
            with contextlib.suppress(AgentAway, RemoteFailure):
                found += [each for each in agent.datasets() if tag == each.name or tag in each.info.tags]
        return tuple(found)

    def flush(self, *agents: RemoteAgent) -> None:
        """Send what was recorded, one message to each agent (all agents, if none is named), and wait for it.

        Raises `RemoteFailure` with the agent's reason and the user's line, `AgentAway` if there is no answer."""
        self._require_open()
        if not agents and self._committees is not None:
            for committee in self._committees:
                if not committee.lost:
                    committee.flush()
        self._send(agents or tuple(self._agents.values()), "all")

    def _send(
        self, agents: Sequence[RemoteAgent], scope: Scope, asked: Value | None = None, *, get: bool = False
    ) -> Message | None:
        """Run what is due. With `get`: `asked` itself, if it came with the run."""
        self._require_open()
        self._renew(agents)
        runs: dict[str, Run] = {}
        for agent in agents:
            request = agent.recorder.request(scope, asked)
            if request is not None:
                asks = get and request.outputs[0] is asked
                runs[agent.name] = self.runner.prepared(agent, request, get=asks)
            elif scope != "asked":
                agent.recorder.nothing_due()
        if not runs:
            return None
        try:
            answers = self.runner.carry_out(runs)
        except BaseException:  # Ctrl-C: nobody knows what was carried out
            for name, run in runs.items():
                self._agents[name].recorder.forgotten.extend(run.drops)
            with contextlib.suppress(KeyboardInterrupt):
                self.runner.call_off({name: run.ids for name, run in runs.items()})
            raise
        failures: list[AgentAway | RemoteFailure] = []
        for name, run in runs.items():
            recorder = self._agents[name].recorder
            if name in answers.replies:
                recorder.sent(run.request, run.ids, self._driver.now_s())
                continue
            recorder.forgotten.extend(run.drops)  # they may still be there
            if name in answers.missing:
                recorder.forgotten.extend(run.ids)  # or come to be
            failure = messages.failure(
                name, answers, what="computing", lines=_lines(run.request, answers.refusals.get(name))
            )
            if isinstance(failure, RemoteFailure) and not messages.passing(failure.reason):
                recorder.failed(run.request, failure)
            failures.append(failure)
        if failures:
            raise failures[0]
        return next(iter(answers.behind.values()), None)

    def trace(self) -> tuple[Sent, ...]:
        """What was sent, in order, without values: the last 10,000 commands."""
        return tuple(self._trace)

    def close(self, *, flush: bool = True) -> None:
        """Send what is left, free everything that was stored, close the connection. Nothing happens a second time."""
        if self._closed:
            return
        try:
            if flush:
                self.flush()
        finally:
            try:
                if self._committees is not None:
                    self._committees.close()
                self._drop_all()
            finally:
                self._closed = True
                self._driver.close()

    # --- for the committees ----------------------------------------------------------------------------------------

    @property
    def committees(self) -> Committees:
        """Who computes on shares here."""
        self._require_open()
        if self._committees is None:
            self._committees = Committees(self, self._driver.world(), self.drive)
        return self._committees

    @property
    def lease_s(self) -> float:
        return self._terms.lease_s

    @property
    def deadline_s(self) -> float:
        return self._terms.deadline_s

    def random(self, count: int) -> bytes:
        return self._random(count)

    def now_s(self) -> float:
        return self._driver.now_s()

    def drive(self, generator: Generator[Effect, Result, T]) -> T:
        return self.runner.drive(generator)

    def require_open(self) -> None:
        self._require_open()

    def give_plan(self, agents: Sequence[RemoteAgent], traced: TracedPlan) -> None:
        """Have these agents know the Plan. Raises as `flush`."""
        puts = {agent.name: PlanPut(plan=traced.data) for agent in agents if traced.plan_id not in agent.plans}
        if not puts:
            return
        for name in puts:
            self._trace.append(Sent(agent=name, kind="plan-put", plan_id=traced.plan_id, nodes=len(traced.plan.nodes)))
        answers = self.drive(messages.question(self._terms, "plans", puts, PlanReady))
        for name in puts:
            if name not in answers.replies:
                raise messages.failure(name, answers, what="a Plan for shares")
            self._agents[name].plans.add(traced.plan_id)

    def renew(self, agent: RemoteAgent, ids: Sequence[bytes]) -> None:
        """Longer leases for these tensors of an agent."""
        for start in range(0, len(ids), DROP_MOST):
            part = tuple(ids[start : start + DROP_MOST])
            self._ask(agent, "renew", TensorRenew(tensor_ids=part, lease_s=self._terms.lease_s), TensorStored)

    def note_step(self, name: str, traced: TracedPlan, outputs: int, lines: tuple[str, ...]) -> None:
        """A step on shares, for the trace."""
        self._trace.append(
            Sent(
                agent=name,
                kind="spdz-step",
                plan_id=traced.plan_id,
                nodes=len(traced.plan.nodes),
                outputs=outputs,
                lines=lines,
            )
        )

    # --- for the agents ------------------------------------------------------------------------------------------

    def put(self, agent: RemoteAgent, tensor: Tensor) -> PointerTensor:
        """Store a plain tensor on the agent."""
        self._require_open()
        plain = tensor.detach().cpu().contiguous()
        try:
            spec = spec_of(plain, "send")
        except PlanError as error:
            raise WrongPlace(str(error)) from None
        tensor_id = self._random(16)
        message = TensorPut(tensor_id=tensor_id, value=from_numpy(plain.numpy()), lease_s=self._terms.lease_s)
        pointer = self._stored(agent, "send", message, spec)
        return pointer.requires_grad_() if tensor.requires_grad else pointer  # type: ignore[return-value]

    def load(
        self,
        agent: RemoteAgent,
        dataset: str,
        columns: Sequence[str],
        split: Literal["train", "test"],
        spec: TensorSpec,
    ) -> PointerTensor:
        """Columns of a dataset, kept on the agent that has them."""
        self._require_open()
        message = TensorLoad(
            tensor_id=self._random(16),
            dataset=dataset,
            columns=tuple(columns),
            split=split,
            dtype=cast(Any, spec.dtype),
            lease_s=self._terms.lease_s,
        )
        return self._stored(agent, f"dataset {dataset!r}", message, spec)

    def describe(self, agent: RemoteAgent) -> Described:
        """What the agent offers."""
        self._require_open()
        reply = self._ask(agent, "describe", Describe(), Described)
        assert isinstance(reply, Described)
        return reply

    def fetch(self, agent: RemoteAgent, value: Value) -> Tensor:
        """The value, after everything that it needs was sent."""
        self._require_open()
        reply: Message | None = None
        if value.failure is None and value.tensor_id is None:
            reply = self._send((agent,), "asked", value, get=True)
        if reply is None or messages.overtook(reply):
            reply = self._ask(agent, "get", TensorGet(tensor_id=self.settled(agent, value)), TensorValue)
        if isinstance(reply, Refused):
            raise messages.get_failure(agent.name, reply)
        if not isinstance(reply, TensorValue):
            raise RemoteError(f"{agent.name} sent {reply.kind} for a tensor")
        return _tensor_of(reply, value.spec, agent.name)

    def settled(self, agent: RemoteAgent, value: Value) -> bytes:
        """The value's id on the agent, after everything that it needs was sent."""
        if value.failure is not None:
            raise value.failure
        if value.tensor_id is None:
            self._send((agent,), "asked", value)
        if value.failure is not None:
            raise value.failure
        assert value.tensor_id is not None
        return value.tensor_id

    # --- helpers -------------------------------------------------------------------------------------------------

    def _stored(
        self, agent: RemoteAgent, what: str, message: TensorPut | TensorLoad, spec: TensorSpec
    ) -> PointerTensor:
        if len(agent.recorder.forgotten) >= DROP_MOST:  # else they go with a run, for nothing
            self._drop(agent)
        try:
            self._ask(agent, what, message, TensorStored)
        except AgentAway:
            agent.recorder.forgotten.append(message.tensor_id)
            raise
        except KeyboardInterrupt:
            with contextlib.suppress(KeyboardInterrupt):
                self.runner.call_off({agent.name: (message.tensor_id,)})
            raise
        value = Value(interned(spec))
        agent.recorder.store(value, message.tensor_id, self._driver.now_s())
        pointer: PointerTensor = PointerTensor(agent, agent.recorder.cell(value), value.spec)
        return pointer

    def _ask(
        self,
        agent: RemoteAgent,
        what: str,
        message: Message,
        expects: type[Message],
        *,
        deadline_s: float = math.inf,
    ) -> Message:
        self._trace.append(Sent(agent=agent.name, kind=message.kind))
        terms = self._terms
        if deadline_s < terms.deadline_s:
            terms = replace(terms, deadline_s=deadline_s)
        answers = self.drive(messages.question(terms, what, {agent.name: message}, expects))
        if agent.name not in answers.replies:
            raise messages.failure(agent.name, answers, what=what)
        return answers.replies[agent.name]

    def _note_run(self, name: str, run: Run, get: bool) -> None:
        traced = run.request.compiled.traced
        new = traced.plan_id not in self._agents[name].plans
        if new:
            self._trace.append(Sent(agent=name, kind="plan-put", plan_id=traced.plan_id, nodes=len(traced.plan.nodes)))
        self._trace.append(
            Sent(
                agent=name,
                kind="tensor-run",
                plan_id=traced.plan_id,
                nodes=len(traced.plan.nodes),
                outputs=len(run.ids),
                new=new,
                lines=_distinct(run.request.lines),
            )
        )
        if get:
            self._trace.append(Sent(agent=name, kind=TensorGet.kind))

    def _renew(self, agents: Sequence[RemoteAgent]) -> None:
        """Ask for new leases where half of one is over. What is lost already fails by name when it is used."""
        now_s = self._driver.now_s()
        for agent in agents:
            self.renew(agent, agent.recorder.due(now_s, self._terms.lease_s))

    def _drop(self, agent: RemoteAgent) -> None:
        ids = taken(agent.recorder.forgotten)
        try:
            self._ask(agent, "free", TensorDrop(tensor_ids=ids), TensorDropped, deadline_s=STOP_S)
        except (AgentAway, RemoteFailure, KeyboardInterrupt):
            agent.recorder.forgotten.extend(ids)
            raise

    def _drop_all(self) -> None:
        """Free everything on agents that are there; on the others the leases end."""
        self.runner.stop()
        for agent in self._agents.values():
            agent.recorder.forgotten.extend(agent.recorder.held())
            while agent.recorder.forgotten:
                try:
                    self._drop(agent)
                except (AgentAway, RemoteFailure):
                    break

    def _require_open(self) -> None:
        if self._closed:
            raise LocalError("this fleet is closed; its tensors are freed. Open it again and send them again")


@lru_cache(maxsize=64)  # the steps of a loop stand on the same lines each time
def _distinct(lines: tuple[Line, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([line.text for line in lines]))


def _lines(request: Request, reason: str | None) -> tuple[str, ...]:
    """The user's lines behind a refusal: that of the node it names, else of all steps."""
    found = _NODE.search(reason or "")
    steps = request.compiled.steps
    if found is not None and int(found[1]) < len(steps) and steps[int(found[1])] >= 0:
        return (request.lines[steps[int(found[1])]].text,)
    return _distinct(request.lines)


def _tensor_of(reply: TensorValue, spec: TensorSpec, name: str) -> Tensor:
    found, dtype = reply.value, "uint8" if spec.dtype == "bool" else spec.dtype
    if found.shape != spec.shape or found.dtype != dtype:
        raise RemoteError(f"{name} sent {found.dtype}{list(found.shape)} for a tensor that is {spec}")
    tensor = torch.from_numpy(to_numpy(found).copy())
    return tensor != 0 if spec.dtype == "bool" else tensor
