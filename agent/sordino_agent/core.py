"""`AgentCore`: what an agent does with a command. Policy first, then the executor, then the answer.

    command -> is it the fleet's server? -> does the policy allow it? -> is there room? -> task -> answer

Everything that does not get through is answered with `Refused` (code and reason) and counted; nothing that a peer sends
changes anything before it has been checked. Answers are never answered, so that two parties can't refuse each other for
ever. A repeated `Train` (run, round, attempt) is computed once: while it runs the repeat waits with it, afterwards it
gets the same answer from a bounded cache, and a repeat with other contents is refused.

No socket, no clock of its own, no NumPy: the same object runs in the daemon and, a thousand times, in the simulator.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from sordino_agent.aggregate.circle import KINDS as SUM_KINDS
from sordino_agent.aggregate.circle import Circle
from sordino_agent.aggregate.journal import SumJournal
from sordino_agent.budget import BudgetSpec
from sordino_agent.description import Description
from sordino_agent.desk import Asker, Desk, asker_of, payload_bytes
from sordino_agent.executor import Executor
from sordino_agent.ledger import Ledger
from sordino_agent.plans import Plans
from sordino_agent.policy import Limits, Policy
from sordino_agent.rounds import Rounds
from sordino_agent.sender import Sender
from sordino_agent.spdz.journal import BurnJournal
from sordino_agent.spdz.room import SESSION_KINDS, UNANSWERED, Room
from sordino_agent.store import TensorStore
from sordino_agent.tasks import DatasetList
from sordino_agent.tensors import Tensors
from sordino_common import messages as m
from sordino_common.clock import Loop
from sordino_common.errors import LimitExceeded, LocalError, PolicyRefusal, ProtocolMismatch, RemoteError, SordinoError

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


class AgentCore:
    """One agent's handler for its endpoint. Call `attach` with the endpoint, then `start`.

    `resident_bytes` reports the process's memory for `HealthReport`; the simulator leaves it at 0. `journal`: where
    sessions on shares are burnt, `ledger`: where privacy is charged, with the budgets, `sums`: what was answered as a
    helper; by default all are in memory, which is enough for who never restarts. `identity`: seals and opens the seeds
    of secure sums. `keep_model(run, file)` stores a model that opened to this agent."""

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
        self._store = store
        self._loop = loop
        self._version = version
        self._resident_bytes = resident_bytes
        self._started_s = self._told_from_s = loop.now_s()
        self._told = 0
        self._sender: Sender | None = None
        self._desk = Desk(executor=executor, limits=limits, reply=self._send, refuse=self._refuse)
        self._plans = Plans(policy=self._current_policy, limits=limits, desk=self._desk, answer=self._send)
        self._description = Description(
            version=version,
            executor_name=executor_name,
            policy=self._current_policy,
            limits=limits,
            executor=executor,
            answer=self._send,
            refuse=self._refuse,
            on_change=lambda: self._on_change(),
        )
        self._rounds = Rounds(
            name=name,
            policy=self._current_policy,
            ledger=self._ledger,
            desk=self._desk,
            plan_of=self._plans.of,
        )
        self._tensors = Tensors(
            policy=self._current_policy,
            store=store,
            ledger=self._ledger,
            desk=self._desk,
            loop=loop,
            plan_of=self._plans.of,
            answer=self._send,
            refuse=self._refuse,
        )
        self.room: Final = Room(
            name=name,
            server=server,
            policy=policy,
            limits=limits,
            executor=executor,
            journal=journal or BurnJournal(None),
            loop=loop,
            plan_of=self._plans.of,
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
            plan_of=self._plans.of,
            answer=self._send,
            allowance_of=self._rounds.allowance,
        )
        self._on_change: Callable[[], None] = lambda: None

    # --- life ------------------------------------------------------------------------------------------------------

    def attach(self, sender: Sender) -> None:
        """Answers go out through `sender`."""
        self._sender = sender
        self.room.attach(sender)

    def start(self) -> None:
        """Have the datasets described once, so that the first `Describe` is answered at once."""
        self._description.read()

    def reconfigure(self, policy: Policy, budgets: Mapping[str, BudgetSpec] | None = None) -> None:
        """Another policy, and if given other budgets, from now on; the datasets are described again. What runs goes
        on."""
        if budgets is not None:
            self._ledger.budgets = budgets
        self._policy = self.room.policy = policy
        self._description.forget()

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
        return self._description.datasets

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

    def _current_policy(self) -> Policy:
        return self._policy

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
                self._description.ask(asker)
            case m.Health():
                self._send(asker, self.health())
            case m.PlanPut():
                self._plans.put(message, asker)
            case m.Moments():
                self._rounds.moments(message, asker)
            case m.Train():
                self._rounds.train(message, asker)
            case m.Evaluate():
                self._rounds.evaluate(message, asker)
            case m.Cancel():
                self._desk.cancel(message.run, message.round)
                if message.round is None:
                    self.room.cancel(message.run)
                    self.circle.cancel(message.run)
            case m.TensorPut():
                self._tensors.put(message, asker)
            case m.TensorRun():
                self._tensors.run(message, asker)
            case m.TensorGet():
                self._tensors.get(message, asker)
            case m.TensorLoad():
                self._tensors.load(message, asker)
            case m.TensorRenew():
                self._tensors.renew(message, asker)
            case m.TensorDrop():
                self._tensors.drop(message, asker)
            case m.SpdzOpen():
                if message.data is not None:  # what opens at the end is without noise
                    self._ledger.require_exact(message.data.dataset, message.kind)
                self.room.open(message, asker)
            case _ if isinstance(message, SUM_KINDS):
                self.circle.on_message(message, asker, policy=self._policy)
            case _:
                raise PolicyRefusal(f"commands of kind {message.kind!r} are not known to this agent ({self._version})")

    # --- answers ---------------------------------------------------------------------------------------------------

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
