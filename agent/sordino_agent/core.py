"""`AgentCore`: what an agent does with a command. Policy first, then the executor, then the answer.

    command -> is it the fleet's server? -> does the policy allow it? -> is there room? -> task -> answer

Everything that does not get through is answered with `Refused` (code and reason) and counted; nothing that a peer sends
changes anything before it has been checked. Answers are never answered, so that two parties can't refuse each other for
ever. A repeated `Train` (run, round, attempt) is computed once: while it runs the repeat waits with it, afterwards it
gets the same answer from a bounded cache, and a repeat with other contents is refused.

No socket, no clock of its own, no NumPy: the same object runs in the daemon and, a thousand times, in the simulator.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from sordino_agent.aggregate.circle import KINDS as SUM_KINDS
from sordino_agent.aggregate.circle import Circle, Contributed
from sordino_agent.aggregate.contribute import Allowance, Unmetered
from sordino_agent.aggregate.journal import SumJournal
from sordino_agent.aggregate.metered import Metered
from sordino_agent.budget import BudgetSpec
from sordino_agent.costs import expected_cost
from sordino_agent.desk import Asker, Desk, asker_of, coarse, payload_bytes
from sordino_agent.errors import BadCommand, Busy, UnknownPlan
from sordino_agent.executor import Executor
from sordino_agent.ledger import LOST, Charge, Ledger
from sordino_agent.policy import Limits, Policy
from sordino_agent.sender import Sender
from sordino_agent.spdz.journal import BurnJournal
from sordino_agent.spdz.room import SESSION_KINDS, UNANSWERED, Room
from sordino_agent.store import ByteCache, TensorStore
from sordino_agent.tasks import (
    DatasetList,
    DescribeTask,
    Done,
    EvaluateFacts,
    EvaluateTask,
    Facts,
    LoadTask,
    MomentsFacts,
    MomentsTask,
    Outcome,
    PlanFacts,
    PlanTask,
    RunFacts,
    RunTask,
    TrainFacts,
    TrainTask,
)
from sordino_common import messages as m
from sordino_common.clock import Loop
from sordino_common.errors import LimitExceeded, LocalError, PolicyRefusal, ProtocolMismatch, RemoteError, SordinoError
from sordino_common.privacy.mechanism import Mechanism

if TYPE_CHECKING:
    from sordino_common.channel.identity import DeviceKey
    from sordino_common.channel.roster import Roster
    from sordino_common.transport.endpoint import Incoming

log = logging.getLogger("sordino.agent")

_ANSWERS: Final[frozenset[type[m.Message]]] = frozenset((
    m.Described,
    m.HealthReport,
    m.PlanReady,
    m.Refused,
    m.MomentsResult,
    m.Trained,
    m.Evaluated,
    m.TensorStored,
    m.TensorValue,
    m.TensorDropped,
    m.SpdzReady,
    m.SpdzClosed,
    m.SpdzChecked,
    m.SpdzRetry,
    m.SpdzTaken,
    m.SpdzStored,
    m.Contribution,
    m.SumSeedsChecked,
    m.SumShare,
))  # fmt: skip
_REASON_CHARS: Final = 1000
NOT_YET: Final = "not connected yet"  # the reason before the first attempt has ended
_TELL_MOST: Final = 20  # refused packets that the log names, in
_TELL_EVERY_S: Final = 60.0  # this time; `HealthReport.refusals` counts them all


class _KnownPlan:
    __slots__ = ("data", "facts")

    def __init__(self, data: bytes, facts: PlanFacts) -> None:
        self.data = data
        self.facts = facts


class AgentCore:
    """One agent's handler for its endpoint. Call `attach` with the endpoint, then `start`.

    `resident_bytes` reports the process's memory for `HealthReport`; the simulator leaves it at 0. `journal`: where
    sessions on shares are burnt, `ledger`: where privacy is charged, with the budgets, `sums`: what was answered as a
    helper; by default all are in memory, which is enough for who never restarts. `identity`: seals and opens the seeds
    of secure sums. `keep_model(run, file)`
    stores a model that opened to this agent."""

    def __init__(
        self,
        *,
        name: str,
        server: str,
        policy: Policy,
        limits: Limits,
        executor: Executor,
        store: TensorStore,
        loop: Loop,
        version: str,
        journal: BurnJournal | None = None,
        ledger: Ledger | None = None,
        sums: SumJournal | None = None,
        identity: DeviceKey | None = None,
        keep_model: Callable[[str, bytes], None] = lambda run, file: None,
        executor_name: str = "numpy",
        resident_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self.name: Final = name
        self.refusals = 0
        self.connected = False
        self.connection_reason = NOT_YET
        self._server = server
        self._roster_server: str | None = None
        self._policy = policy
        self._limits = limits
        self._ledger = ledger or Ledger(None, wall_s=loop.wall_s)
        self._executor = executor
        self._store = store
        self._loop = loop
        self._version = version
        self._executor_name = executor_name
        self._resident_bytes = resident_bytes
        self._started_s = self._told_from_s = loop.now_s()
        self._told = 0
        self._sender: Sender | None = None
        self._desk = Desk(executor=executor, limits=limits, reply=self._send, refuse=self._refuse)
        self.room: Final = Room(
            name=name,
            server=server,
            policy=policy,
            limits=limits,
            executor=executor,
            journal=journal or BurnJournal(None),
            loop=loop,
            plan_of=self._plan,
            keep_model=keep_model,
            refuse=self._refuse,
            store=store,
            require_exact=self._ledger.require_exact,
        )
        self.circle: Final = Circle(
            name=name,
            identity=identity,
            limits=limits,
            journal=sums or SumJournal(None),
            desk=self._desk,
            loop=loop,
            plan_of=self._plan,
            answer=self._send,
            allowance_of=self._allowance,
        )
        self._on_change: Callable[[], None] = lambda: None
        self._datasets: DatasetList | None = None
        self._describing = False
        self._wait_describe: list[Asker] = []
        self._plans: ByteCache[bytes, _KnownPlan] = ByteCache(
            budget_bytes=limits.plans_bytes, size_of=lambda plan: len(plan.data)
        )

    # --- life ------------------------------------------------------------------------------------------------------

    def attach(self, sender: Sender) -> None:
        """Answers go out through `sender`."""
        self._sender = sender
        self.room.attach(sender)

    def start(self) -> None:
        """Have the datasets described once, so that the first `Describe` is answered at once."""
        self._describe()

    def reconfigure(self, policy: Policy, budgets: Mapping[str, BudgetSpec] | None = None) -> None:
        """Another policy, and if given other budgets, from now on; the datasets are described again. What runs goes
        on."""
        if budgets is not None:
            self._ledger.budgets = budgets
        self._policy = self.room.policy = policy
        self._datasets = None
        self._describe()

    def drain(self, on_idle: Callable[[], None]) -> None:
        """Take no more tasks; call `on_idle` once none is left (now, if none is)."""
        self.room.drain()
        self._desk.drain(on_idle)

    def cancel_all(self) -> None:
        self._desk.cancel_all()

    @property
    def running(self) -> tuple[str, ...]:
        """What runs or waits, oldest first."""
        return (*self._desk.running, *self.circle.running, *self.room.running)

    @property
    def datasets(self) -> DatasetList | None:
        """None until the executor has read them."""
        return self._datasets

    def health(self) -> m.HealthReport:
        self._store.expire(self._loop.now_s())
        return m.HealthReport(
            uptime_s=self._loop.now_s() - self._started_s,
            wall_s=self._loop.wall_s(),
            resident_bytes=self._resident_bytes(),
            store_used_bytes=self._store.used_bytes,
            store_tensors=len(self._store),
            plans=len(self._plans),
            tasks_done=self._desk.tasks_done,
            tasks_failed=self._desk.tasks_failed,
            refusals=self.refusals,
            running=self.running[:64],
        )

    def watch(self, on_change: Callable[[], None]) -> None:
        """Call `on_change` when a task begins or ends, or connection, roster or datasets change."""
        self._on_change = self._desk.on_change = self.room.on_change = on_change

    # --- EndpointHandler -------------------------------------------------------------------------------------------

    def on_message(self, incoming: Incoming) -> None:
        message, kind = incoming.message, type(incoming.message)
        try:
            if kind in SESSION_KINDS:
                self.room.on_message(incoming)
            elif kind in _ANSWERS:
                self.refusals += 1
                log.warning("event=unexpected-answer kind=%s from=%s", message.kind, incoming.sender)
            else:
                self._require_server(incoming.sender)
                self._command(message, asker_of(incoming))
        except SordinoError as error:
            if kind in UNANSWERED:
                self._count_refusal(incoming.sender, error)
            else:
                self._refuse(message.kind, asker_of(incoming), error.code, str(error))
        except Exception as error:  # a bug here must not end the daemon: the server is told, the log has the trace
            log.exception("event=bug command=%s", message.kind)
            reason = f"a bug in the agent ({type(error).__name__}); its log has the trace"
            self._refuse(message.kind, asker_of(incoming), LocalError.code, reason)

    def on_presence(self, name: str, online: bool, boot: int) -> None:
        log.info("event=presence name=%s online=%s boot=%d", name, online, boot)
        self.room.on_presence(name, online, boot)

    def on_connection(self, connected: bool, reason: str) -> None:
        self.connected = connected
        self.connection_reason = reason
        log.info("event=connection connected=%s reason=%r", connected, reason)
        self._on_change()

    def on_roster(self, roster: Roster) -> None:
        self._roster_server = roster.server.name
        self.room.roster = self.circle.roster = roster
        log.info("event=roster epoch=%d server=%s", roster.epoch, self._roster_server)
        if all(entry.name != self.name for entry in roster.entries):
            log.warning(
                "event=not-in-roster epoch=%d name=%s remedy='send enrolment.json to the operator: sordino roster add, "
                "sordino roster sign'",
                roster.epoch,
                self.name,
            )
        self._on_change()

    def on_refusal(self, sender: str, error: RemoteError) -> None:
        self._count_refusal(sender, error)
        if isinstance(error, ProtocolMismatch):
            self._on_change()  # the status file tells it

    def _count_refusal(self, sender: str, error: SordinoError) -> None:
        self.refusals += 1
        now_s = self._loop.now_s()
        if now_s >= self._told_from_s + _TELL_EVERY_S:
            if self._told > _TELL_MOST:
                log.warning("event=refused-packets more=%d", self._told - _TELL_MOST)
            self._told_from_s, self._told = now_s, 0
        self._told += 1
        if self._told <= _TELL_MOST:  # anybody who reaches the broker can cause these: they must not fill the log
            reason = str(error)[:_REASON_CHARS]
            log.warning("event=refused-packet from=%s code=%s reason=%r", sender, error.code, reason)

    # --- commands --------------------------------------------------------------------------------------------------

    def _require_server(self, sender: str) -> None:
        if self._roster_server is not None and self._roster_server != self._server:
            raise PolicyRefusal(
                f"the roster names {self._roster_server!r} as the server, this agent's configuration {self._server!r}"
            )
        if sender != self._server:
            raise PolicyRefusal(f"commands are taken from {self._server!r} only, this came from {sender!r}")

    def _command(self, message: m.Message, asker: Asker) -> None:
        if payload_bytes(message) > self._limits.payload_bytes:
            raise LimitExceeded(
                f"{message.kind}: {payload_bytes(message)} bytes of arrays; limits.payload_bytes on the device is "
                f"{self._limits.payload_bytes}"
            )
        match message:
            case m.Describe():
                self._policy.require_job("describe")
                if len(self._wait_describe) >= self._limits.queue:
                    raise Busy("the datasets are still being read")
                self._wait_describe.append(asker)
                self._answer_describe()
            case m.Health():
                self._send(asker, self.health())
            case m.PlanPut():
                self._plan_put(message, asker)
            case m.Moments():
                self._policy.require_dataset(message.dataset, "moments")
                self._ledger.require_exact(message.dataset, message.kind)
                task = MomentsTask(command=message, min_rows=self._policy.min_rows)
                label = f"moments {message.dataset}"
                self._desk.submit(task, asker, command=message.kind, label=label, answer=_moments_answer)
            case m.Train():
                self._train(message, asker)
            case m.Evaluate():
                self._evaluate(message, asker)
            case m.Cancel():
                self._desk.cancel(message.run, message.round)
                if message.round is None:
                    self.room.cancel(message.run)
                    self.circle.cancel(message.run)
            case m.TensorPut():
                self._policy.require_job("tensors")
                now_s = self._loop.now_s()
                self._store.put(
                    [(message.tensor_id, message.value)], made_by=None, lease_s=message.lease_s, now_s=now_s
                )
                self._send(asker, self._stored((message.tensor_id,)))
            case m.TensorRun():
                self._tensor_run(message, asker)
            case m.TensorGet():
                self._policy.require_job("tensors")
                self._tensor_get(message, asker)
            case m.TensorLoad():
                self._tensor_load(message, asker)
            case m.TensorRenew():
                self._policy.require_keeping()
                there = self._store.renew(message.tensor_ids, lease_s=message.lease_s, now_s=self._loop.now_s())
                self._send(asker, self._stored(there))
            case m.TensorDrop():
                self._policy.require_keeping()
                self._drop(message.tensor_ids, asker)
            case m.SpdzOpen():
                if message.data is not None:  # what opens at the end is without noise
                    self._ledger.require_exact(message.data.dataset, message.kind)
                self.room.open(message, asker)
            case _ if isinstance(message, SUM_KINDS):
                self.circle.on_message(message, asker, policy=self._policy)
            case _:
                raise PolicyRefusal(f"commands of kind {message.kind!r} are not known to this agent ({self._version})")

    def _plan_put(self, message: m.PlanPut, asker: Asker) -> None:
        plan_id = hashlib.sha256(message.plan).digest()
        self._policy.require_plan(plan_id)
        known = self._plans.get(plan_id)
        if known is not None:
            self._send(asker, _plan_ready(known.facts))
            return
        if len(message.plan) > self._limits.plans_bytes // 2:
            raise LimitExceeded(
                f"the Plan takes {len(message.plan)} bytes; a device whose limits.plans_bytes is "
                f"{self._limits.plans_bytes} takes at most half of that"
            )

        def answer(facts: Facts, _seconds: float) -> m.Message:
            assert isinstance(facts, PlanFacts)
            self._plans.put(plan_id, _KnownPlan(message.plan, facts))
            return _plan_ready(facts)

        label = f"plan {plan_id.hex()[:12]}"
        self._desk.submit(PlanTask(plan=message.plan), asker, command=message.kind, label=label, answer=answer)

    def _train(self, message: m.Train, asker: Asker) -> None:
        dataset, terms = message.data.dataset, message.privacy
        self._policy.require_dataset(dataset, "train")
        if terms is None:
            self._ledger.require_exact(dataset, message.kind)
        else:
            self._policy.require_noise(expected_cost(message, terms))
            self._policy.require_plan(terms.apply_plan)
        self._policy.require_plan(message.plan_id)

        def charge(mechanism: Mechanism, how: str = "") -> Charge:
            return Charge(
                dataset=dataset,
                split="train",
                run=message.run,
                round=message.round,
                what=f"{message.kind}{how}",
                mechanism=mechanism,
            )

        def lost() -> None:
            if terms is not None:
                self._ledger.lose([charge(expected_cost(message, terms), LOST)])

        def task() -> TrainTask:
            if terms is not None:
                self._ledger.afford([charge(expected_cost(message, terms))])
            return TrainTask(
                command=message,
                plan=self._plan(message.plan_id),
                agent=self.name,
                min_rows=self._policy.min_rows,
                apply=None if terms is None else self._plan(terms.apply_plan),
            )

        def answer(facts: Facts, seconds: float) -> m.Message:
            assert isinstance(facts, TrainFacts)
            if (facts.mechanism is None) != (terms is None):
                raise LocalError("train: the work has no price, or one that was not asked for")
            if facts.mechanism is not None:
                self._ledger.charge([charge(facts.mechanism)])  # on the disk before the answer leaves
            return m.Trained(
                run=message.run,
                round=message.round,
                attempt=message.attempt,
                rows=facts.rows,
                steps=facts.steps,
                update=facts.update,
                loss_sum=facts.loss_sum,
                seconds=seconds if terms is None else coarse(seconds),
            )

        label = f"train {message.run} round {message.round}"
        self._desk.submit_once(task, asker, command=message, label=label, answer=answer, lost=lost)

    def _evaluate(self, message: m.Evaluate, asker: Asker) -> None:
        self._policy.require_dataset(message.data.dataset, "evaluate")
        self._require_evaluation(message.data, message.kind)
        self._policy.require_plan(message.plan_id)
        task = EvaluateTask(command=message, plan=self._plan(message.plan_id), min_rows=self._policy.min_rows)

        def answer(facts: Facts, seconds: float) -> m.Message:
            assert isinstance(facts, EvaluateFacts)
            return m.Evaluated(
                run=message.run,
                round=message.round,
                rows=facts.rows,
                names=facts.names,
                sums=facts.sums,
                seconds=seconds,
            )

        label = f"evaluate {message.run} round {message.round}"
        self._desk.submit(
            task, asker, command=message.kind, label=label, answer=answer, run=message.run, round=message.round
        )

    def _require_evaluation(self, data: m.DataRef, what: str) -> None:
        """Sums without noise: of train rows under a budget never, of held-out rows if the policy says so."""
        if data.split == "train":
            self._ledger.require_exact(data.dataset, f"{what} of train rows")
        elif data.dataset in self._ledger.budgets and not self._policy.exact_evaluation:
            raise PolicyRefusal(
                f"dataset {data.dataset!r} has a privacy budget, and `{what}` gives sums over held-out rows without "
                "noise; its owner can allow that with policy.exact_evaluation: true"
            )

    def _allowance(self, command: Contributed) -> Allowance:
        if isinstance(command, m.SumMetrics):
            self._require_evaluation(command.data, command.kind)
            return Unmetered()
        metered = Metered(self._ledger, command)
        for mechanism in metered.expected:
            self._policy.require_noise(mechanism)
        return metered

    def _tensor_run(self, message: m.TensorRun, asker: Asker) -> None:
        self._policy.require_job("tensors")
        self._policy.require_plan(message.plan_id)
        now_s = self._loop.now_s()
        stored = tuple(self._store.get(tensor_id, now_s=now_s) for tensor_id in message.inputs)
        inputs = (*(tensor.value for tensor in stored), *message.values)

        def answer(facts: Facts, _seconds: float) -> m.Message:
            assert isinstance(facts, RunFacts)
            if len(facts.outputs) != len(message.outputs):
                raise BadCommand(
                    f"the Plan gives {len(facts.outputs)} tensors, the command names {len(message.outputs)}"
                )
            self._store.drop(message.drops)
            rows_in = [tensor.lineage for tensor in stored if tensor.lineage is not None]
            self._store.put(
                list(zip(message.outputs, facts.outputs, strict=True)),
                made_by=message.plan_id,
                lineage=frozenset({message.plan_id}).union(*rows_in) if rows_in else None,
                datasets=frozenset().union(*(tensor.datasets for tensor in stored)),
                lease_s=message.lease_s,
                now_s=self._loop.now_s(),
            )
            return self._stored(message.outputs)

        task = RunTask(plan=self._plan(message.plan_id), inputs=inputs)
        label = f"tensors {message.plan_id.hex()[:12]}"
        run = m.task_of(message.outputs[0]) if message.outputs else None
        self._desk.submit(task, asker, command=message.kind, label=label, answer=answer, run=run)

    def _tensor_get(self, message: m.TensorGet, asker: Asker) -> None:
        """Hand the tensor out; one that a task is about to make, when that is over."""

        def answer() -> None:
            try:
                tensor = self._store.get(message.tensor_id, now_s=self._loop.now_s())
                self._policy.require_fetch(tensor.made_by, tensor.lineage)
            except SordinoError as error:
                self._refuse(message.kind, asker, error.code, str(error))
            else:
                self._send(asker, m.TensorValue(tensor_id=message.tensor_id, value=tensor.value))

        self._desk.after((m.task_of(message.tensor_id),), answer)

    def _drop(self, ids: Sequence[bytes], asker: Asker) -> None:
        """Forget the tensors; those that a task is about to make, when it is over: else it would make them later."""
        self._desk.after(
            frozenset(map(m.task_of, ids)),
            lambda: self._send(asker, m.TensorDropped(dropped=self._store.drop(ids))),
        )

    def _tensor_load(self, message: m.TensorLoad, asker: Asker) -> None:
        self._policy.require_dataset(message.dataset, "tensors")
        self._ledger.require_exact(message.dataset, message.kind)

        def answer(facts: Facts, _seconds: float) -> m.Message:
            assert isinstance(facts, RunFacts)
            (columns,) = facts.outputs
            self._store.put(
                [(message.tensor_id, columns)],
                made_by=None,
                lineage=frozenset(),
                datasets=frozenset({message.dataset}),
                lease_s=message.lease_s,
                now_s=self._loop.now_s(),
            )
            return self._stored((message.tensor_id,))

        task = LoadTask(command=message, min_rows=self._policy.min_rows)
        label, run = f"load {message.dataset}", m.task_of(message.tensor_id)
        self._desk.submit(task, asker, command=message.kind, label=label, answer=answer, run=run)

    def _plan(self, plan_id: bytes) -> bytes:
        known = self._plans.get(plan_id)
        if known is None:
            raise UnknownPlan(f"Plan {plan_id.hex()} is not here; put it, then repeat the command")
        return known.data

    # --- description and answers -----------------------------------------------------------------------------------

    def _describe(self) -> None:
        if self._describing:
            return
        self._describing = True

        def done(outcome: Outcome) -> None:
            self._describing = False
            if isinstance(outcome, Done):
                assert isinstance(outcome.result, DatasetList)
                self._datasets = outcome.result
                for problem in outcome.result.problems:
                    log.error("event=dataset-unreadable dataset=%s reason=%r", problem.dataset, problem.detail)
                self._answer_describe()
                self._on_change()
            else:
                askers, self._wait_describe = self._wait_describe, []
                for asker in askers:
                    self._refuse("describe", asker, outcome.code, outcome.reason)

        self._executor.submit(DescribeTask(), done)

    def _answer_describe(self) -> None:
        if self._datasets is None:
            self._describe()
            return
        askers, self._wait_describe = self._wait_describe, []
        described = m.Described(
            version=self._version,
            executor=self._executor_name,
            memory_bytes=self._limits.memory_bytes,
            store_bytes=self._limits.store_bytes,
            payload_bytes=self._limits.payload_bytes,
            plan_seconds=self._limits.plan_seconds,
            datasets=tuple(info for info in self._datasets.datasets if self._policy.shows_dataset(info.name)),
        )
        for asker in askers:
            self._send(asker, described)

    def _stored(self, tensor_ids: tuple[bytes, ...]) -> m.TensorStored:
        return m.TensorStored(
            tensor_ids=tensor_ids, used_bytes=self._store.used_bytes, budget_bytes=self._store.budget_bytes
        )

    def _refuse(self, command: str, asker: Asker, code: str, reason: str) -> None:
        self.refusals += 1
        log.warning(
            "event=refused command=%s to=%s code=%s reason=%r", command, asker.name, code, reason[:_REASON_CHARS]
        )
        self._send(asker, m.Refused(command=command, code=code, reason=reason[:_REASON_CHARS]))

    def _send(self, asker: Asker, message: m.Message) -> None:
        if self._sender is None:
            raise LocalError("AgentCore: attach an endpoint before messages arrive")
        try:
            self._sender.send(asker.name, message, correlation=asker.correlation, context=asker.context)
        except SordinoError as error:  # the outbox is full, or the asker left the roster: its deadline will tell it
            log.warning("event=answer-lost kind=%s to=%s code=%s", message.kind, asker.name, error.code)


def _plan_ready(facts: PlanFacts) -> m.PlanReady:
    return m.PlanReady(plan_id=facts.plan_id, peak_bytes=facts.peak_bytes, flops=facts.flops)


def _moments_answer(facts: Facts, _seconds: float) -> m.Message:
    assert isinstance(facts, MomentsFacts)
    return facts.result
