"""The desk: tasks under way, who waits for each, and the answers already given.

A task has one or more askers (a repeated command waits with the first). A `Train` has a key (run, round, attempt) under
which it is computed once: a repeat while it runs waits with it; a repeat afterwards is answered from a bounded cache;
a repeat with other contents is refused.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Final, NamedTuple

from sordino_agent.errors import Busy, Conflict, Draining
from sordino_agent.executor import Executor
from sordino_agent.policy import Limits
from sordino_agent.store import ByteCache
from sordino_agent.tasks import Done, Facts, Outcome, Task
from sordino_common import messages as m
from sordino_common.errors import LimitExceeded, SordinoError
from sordino_common.messages.base import to_plain

if TYPE_CHECKING:
    from sordino_common.transport.endpoint import Incoming

log = logging.getLogger("sordino.agent")

TrainKey = tuple[str, int, int]  # run, round, attempt
Answer = Callable[[Facts, float], m.Message]
Lost = Callable[[], None]


class Asker(NamedTuple):
    """Where an answer goes: to whom, under which correlation, in which session context."""

    name: str
    correlation: bytes
    context: bytes


def asker_of(incoming: Incoming) -> Asker:
    return Asker(incoming.sender, incoming.correlation, incoming.context)


class _Pending:
    __slots__ = ("askers", "cancel", "command", "digest", "label", "lost", "round", "run")

    def __init__(
        self, command: str, label: str, asker: Asker, run: str | None, round: int | None, lost: Lost | None
    ) -> None:
        self.command = command
        self.lost = lost
        self.label = label
        self.run = run
        self.round = round
        self.askers: dict[Asker, None] = {asker: None}  # a set that keeps its order
        self.digest = b""
        self.cancel: Callable[[], None] = lambda: None


class Desk:
    """Tasks from submission to answer. `reply` and `refuse` bring answers out."""

    def __init__(
        self,
        *,
        executor: Executor,
        limits: Limits,
        reply: Callable[[Asker, m.Message], None],
        refuse: Callable[[str, Asker, str, str], None],
    ) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self.tasks_done = 0
        self.tasks_failed = 0
        self._executor: Final = executor
        self._limits: Final = limits
        self._reply: Final = reply
        self._refuse: Final = refuse
        self._submitted = 0
        self._pending: dict[int, _Pending] = {}
        self._trains: dict[TrainKey, _Pending] = {}
        self._results: ByteCache[TrainKey, tuple[bytes, m.Message]] = ByteCache(
            budget_bytes=limits.results_bytes, size_of=lambda kept: payload_bytes(kept[1])
        )
        self._on_idle: Callable[[], None] | None = None
        self._waiting: list[tuple[set[int], Callable[[], None]]] = []  # for tasks by number; what then is to be done

    @property
    def running(self) -> tuple[str, ...]:
        """What runs or waits, oldest first."""
        return tuple(pending.label for pending in self._pending.values())

    def submit(
        self,
        task: Task,
        asker: Asker,
        *,
        command: str,
        label: str,
        answer: Answer,
        run: str | None = None,
        round: int | None = None,
        lost: Lost | None = None,
    ) -> None:
        """Have `task` done and `answer(facts, seconds)` sent to the asker. Raises `Busy` or `Draining`.

        `lost`: called, before anybody is told, if the task has no result but may have begun: cancelled, killed, failed.
        When and whether that happens may depend on what it drew."""
        self._submit(task, _Pending(command, label, asker, run, round, lost), answer, None)

    def submit_once(
        self,
        task: Callable[[], Task],
        asker: Asker,
        *,
        command: m.Train,
        label: str,
        answer: Answer,
        lost: Lost | None = None,
    ) -> None:
        """As `submit`, but once per (run, round, attempt); raises `Conflict` on a repeat with other contents."""
        key = (command.run, command.round, command.attempt)
        digest = _digest(command)
        running, kept = self._trains.get(key), self._results.get(key)
        before = running.digest if running is not None else kept[0] if kept is not None else digest
        if before != digest:
            raise Conflict(
                f"train: run {command.run}, round {command.round}, attempt {command.attempt} was asked for before with "
                "other contents; raise the attempt"
            )
        if running is not None:
            if len(running.askers) >= self._limits.queue and asker not in running.askers:
                raise Busy(f"{len(running.askers)} repeats wait for this task, as many as limits.queue allows")
            running.askers[asker] = None
        elif kept is not None:
            self._reply(asker, kept[1])
        else:
            pending = _Pending(command.kind, label, asker, command.run, command.round, lost)
            pending.digest = digest
            self._submit(task(), pending, answer, key)

    def _keep(self, key: TrainKey, digest: bytes, message: m.Message) -> None:
        """For a repeat. A server that asks for a round has the one before behind it: older answers of the run go."""
        run, round_, _ = key
        self._results.drop_where(lambda other: other[0] == run and other[1] < round_ - 1)
        self._results.put(key, (digest, message))

    def cancel(self, run: str, round: int | None) -> None:
        """Stop what is under way for this round, or for the whole run if `round` is None."""
        for pending in list(self._pending.values()):
            if pending.run == run and round in (None, pending.round):
                log.info("event=cancel task=%r", pending.label)
                pending.cancel()

    def after(self, runs: Collection[str], then: Callable[[], None]) -> None:
        """Call `then` once no task of these runs is under way: now, if none is. A task that is cancelled is under way
        until the worker has let go of it. Raises `Busy` if too many wait already."""
        numbers = {number for number, pending in self._pending.items() if pending.run in runs}
        if not numbers:
            then()
        elif len(self._waiting) >= self._limits.queue:
            raise Busy(f"{len(self._waiting)} commands wait for tasks to end, as many as limits.queue allows")
        else:
            self._waiting.append((numbers, then))

    def cancel_all(self) -> None:
        for pending in list(self._pending.values()):
            pending.cancel()

    def drain(self, on_idle: Callable[[], None]) -> None:
        """Take no more tasks, and call `on_idle` once none is left: now, if none is."""
        self._on_idle = on_idle
        if not self._pending:
            on_idle()

    def require_place(self) -> None:
        """Raise `Busy` or `Draining` if a task submitted now would not be taken."""
        if self._on_idle is not None:
            raise Draining("this agent is about to stop and takes no new work")
        if len(self._pending) >= self._limits.queue:
            raise Busy(f"{len(self._pending)} tasks are under way, as many as limits.queue on the device allows")

    def _submit(self, task: Task, pending: _Pending, answer: Answer, key: TrainKey | None) -> None:
        self.require_place()
        number = self._submitted = self._submitted + 1
        self._pending[number] = pending
        if key is not None:
            self._trains[key] = pending

        def done(outcome: Outcome) -> None:
            del self._pending[number]
            if key is not None:
                del self._trains[key]
            self._finish(pending, outcome, answer, key)
            self._let_go(number)
            self.on_change()
            if self._on_idle is not None and not self._pending:
                self._on_idle()

        pending.cancel = self._executor.submit(task, done)
        self.on_change()

    def _let_go(self, number: int) -> None:
        for numbers, _ in self._waiting:
            numbers.discard(number)
        due = [then for numbers, then in self._waiting if not numbers]
        self._waiting = [(numbers, then) for numbers, then in self._waiting if numbers]
        for then in due:
            then()

    def _finish(self, pending: _Pending, outcome: Outcome, answer: Answer, key: TrainKey | None) -> None:
        if isinstance(outcome, Done):
            try:
                message = answer(outcome.result, outcome.seconds)
                self._require_room(message)
            except SordinoError as error:
                code, reason = error.code, str(error)
            else:
                self.tasks_done += 1
                log.info(
                    "event=task-done task=%r seconds=%.3f run=%s round=%s",
                    *(pending.label, outcome.seconds, pending.run or "-"),
                    "-" if pending.round is None else pending.round,
                )
                if key is not None:
                    self._keep(key, pending.digest, message)
                for asker in pending.askers:
                    self._reply(asker, message)
                return
        else:
            code, reason = outcome.code, outcome.reason
            if outcome.began and pending.lost is not None:
                try:
                    pending.lost()
                except SordinoError as error:  # a full disk; the log must say what the ledger can't
                    log.error("event=not-charged task=%r reason=%r", pending.label, str(error))  # noqa: TRY400
        self.tasks_failed += 1
        for asker in pending.askers:
            self._refuse(pending.command, asker, code, reason)

    def _require_room(self, message: m.Message) -> None:
        size = payload_bytes(message)
        if size > self._limits.payload_bytes:
            raise LimitExceeded(
                f"the answer has {size} bytes; limits.payload_bytes on the device is {self._limits.payload_bytes}"
            )


def coarse(seconds: float) -> float:
    """What is told of how long private work took, for it grows with the sample: whole seconds, rounded up."""
    return float(math.ceil(seconds))


def payload_bytes(message: m.Message) -> int:
    """Bytes of arrays, Plans and ids in a message: what makes it large."""

    def count(value: object) -> int:
        if isinstance(value, m.Array):
            return value.nbytes
        if isinstance(value, bytes):
            return len(value)
        return sum(map(count, value)) if isinstance(value, tuple) else 0

    return sum(count(getattr(message, field)) for field in message.__struct_fields__)


def _digest(command: m.Train) -> bytes:
    """SHA-256 over everything that a `Train` says, without encoding its arrays a second time."""
    hashed = hashlib.sha256()
    for field in command.__struct_fields__:
        if field != "params":
            hashed.update(m.encode([field, to_plain(getattr(command, field))]))
    for array in command.params:
        hashed.update(m.encode([array.dtype, array.shape]))
        hashed.update(array.data)
    return hashed.digest()
