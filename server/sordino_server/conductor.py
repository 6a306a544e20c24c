"""Performs a round generator's effects through an `Endpoint`: sends, matches replies, keeps deadlines and presence.

One generator at a time, driven by callbacks of one loop; the generator is resumed from a fresh callback, never from
inside a send. What it waits for is kept in `waits`, what it listens to in `listening`; here is the loop that drives.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Final, Protocol

from sordino_common.clock import Loop, Timer
from sordino_common.errors import LimitExceeded, LocalError, ProtocolMismatch, RemoteError, SordinoError
from sordino_common.messages import Cancel, Message
from sordino_server.listening import Ear
from sordino_server.rounds.effects import (
    Ask,
    Begin,
    Checkpoint,
    Effect,
    Gather,
    Hear,
    Listen,
    Look,
    Meter,
    Metered,
    NextSum,
    Numbered,
    Present,
    Report,
    Result,
    Save,
    Sent,
    Tell,
)
from sordino_server.rounds.events import Answered, Note, Observer, Outcome, Waiting, silent
from sordino_server.waits import Gathering, Hearing, Question, printable

_REFUSED_MOST: Final = 20  # refused packets that are told one by one, in
_REFUSED_EVERY_S: Final = 60.0  # this time
_FLAPS: Final = 5  # times that a party goes away within this time, and comes back: then why is told, once
_FLAPS_WITHIN_S: Final = 300.0
_UNASKED: Final = "spdz-"  # what members of a session say of themselves
_TOLD_MOST: Final = 1 << 16  # an answer to what was told before so many others comes too late
_UNWANTED: Final = 100  # messages of one party in this time; late answers and second copies are far fewer


class Incoming(Protocol):
    """What an endpoint delivers (`sordino_common.transport.endpoint.Incoming`)."""

    @property
    def sender(self) -> str: ...
    @property
    def message(self) -> Message: ...
    @property
    def correlation(self) -> bytes: ...


class Sender(Protocol):
    """What the conductor needs of an endpoint."""

    def send(
        self,
        to: str,
        message: Message,
        *,
        expires_s: float | None = None,
        on_outcome: Callable[[bool, str], None] | None = None,
    ) -> bytes: ...


class Interrupted(SordinoError):
    """The run was stopped by a signal. Its last checkpoint is kept; `--resume` goes on from there.

    Exit code 130, the shell's own for SIGINT, so that no script takes it for one of the error classes."""

    exit_code = 130
    code = "interrupted"


Traffic = Callable[[], tuple[int, int]]


class Conductor:
    """An `EndpointHandler`. `attach` it to its endpoint, `start` a generator, run the loop until `done`.

    `members`: names of the data agents in the current roster; `others`: of compute agents and dealers that are none.
    `traffic`: payload bytes (received, sent) so far."""

    def __init__(self, *, loop: Loop, observer: Observer = silent, gone_s: float = 5.0, remind_s: float = 5.0) -> None:
        self.observer = observer
        self._loop = loop
        self._gone_s = gone_s
        self._remind_s = remind_s
        self._endpoint: Sender | None = None
        self._members: Callable[[], Sequence[str]] = tuple
        self._others: Callable[[], Sequence[str]] = tuple
        self._traffic: Traffic = lambda: (0, 0)
        self._boots: dict[str, int] = {}
        self._unlike: dict[str, str] = {}  # parties of the roster whose protocol is unlike ours: why
        self._connected = True
        self._generator: Generator[Effect, Result, Any] | None = None
        self._save: Callable[[Checkpoint], None] = _no_store
        self._begin: Callable[[int], None] = _no_ledger
        self._next_sum: Callable[[], int] = _no_numbers
        self._run: str | None = None
        self._pending: Question | Gathering | Hearing | None = None
        self._ear = Ear(gone_s=gone_s)
        self._timer: Timer | None = None
        self._reminded_s = 0.0
        self._refused = 0
        self._refused_from_s = self._unwanted_from_s = loop.now_s()
        self._unwanted_of: Counter[str] = Counter()
        self._flaps_from_s = loop.now_s()
        self._flaps: Counter[str] = Counter()
        self._told: dict[bytes, None] = {}  # correlations of what was told since listening began
        self._listening = 0  # how often it began
        self._under_way = 0  # of what was told since then: neither arrived nor given up
        self._base = (0, 0)
        self.done = False
        self._result: Any = None
        self._error: BaseException | None = None

    def attach(
        self,
        endpoint: Sender,
        *,
        members: Callable[[], Sequence[str]],
        traffic: Traffic,
        others: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._endpoint, self._members, self._traffic, self._others = endpoint, members, traffic, others

    @property
    def online(self) -> Mapping[str, int]:
        """Members that are online, with their boot numbers."""
        return self._online_of(self._members())

    @property
    def parties(self) -> Mapping[str, bool]:
        """Everybody who may take part (data agents, compute agents, helpers, dealers), and whether they are online."""
        return {name: name in self._boots for name in sorted({*self._members(), *self._others()})}

    @property
    def connected(self) -> bool:
        """Whether the broker was there when it was last heard of."""
        return self._connected

    @property
    def bytes_now(self) -> tuple[int, int]:
        """Payload bytes (received, sent) since the generator was started."""
        up, down = self._traffic()
        return up - self._base[0], down - self._base[1]

    @property
    def waiting(self) -> Waiting | None:
        """Whom, and what, it waits for at this moment."""
        match self._pending:
            case Question() | Hearing() as pending:
                return pending.told(self._loop.now_s())
            case Gathering() as gathering:
                return gathering.told(self._loop.now_s(), self._present())
            case None:
                return None

    def _online_of(self, names: Sequence[str]) -> dict[str, int]:
        wanted = set(names)
        return {name: boot for name, boot in sorted(self._boots.items()) if name in wanted}

    def start(
        self,
        generator: Generator[Effect, Result, Any],
        *,
        run: str | None = None,
        save: Callable[[Checkpoint], None] | None = None,
        begin: Callable[[int], None] | None = None,
        next_sum: Callable[[], int] | None = None,
        at_once: bool = False,
    ) -> None:
        """Begin. `run`: whose tasks an interruption cancels. `save` must return when the checkpoint is durable, `begin`
        when the number of releases is; so must `next_sum`, which never gives a number twice. `at_once`: not with the
        loop's next turn; what is asked first has been handed to the endpoint then. Not from a callback of the loop."""
        if self._endpoint is None:
            raise LocalError("Conductor.start before attach")
        if self._generator is not None and not self.done:
            raise LocalError("Conductor.start while another generator runs")
        self._generator, self._run, self._save = generator, run, save or _no_store
        self._begin, self._next_sum = begin or _no_ledger, next_sum or _no_numbers
        self._pending, self.done, self._result, self._error = None, False, None, None
        self._ear = Ear(gone_s=self._gone_s)
        self._base = self._traffic()
        self._resume(lambda: None, fresh=at_once)

    def result(self) -> Any:
        """What the generator returned; raises what it raised."""
        if not self.done:
            raise LocalError("Conductor.result before the end")
        if self._error is not None:
            raise self._error
        return self._result

    def interrupt(self, reason: str) -> None:
        """Stop in order: the agents are told to stop, the generator is closed, `result` raises `Interrupted`."""
        if self.done or self._generator is None:
            return
        if self._run is not None:
            self._cancel(tuple(self._online_of((*self._members(), *self._others()))), Cancel(run=self._run, round=None))
        self._stop_timer()
        self._pending = None
        self._generator.close()
        resumable = f"; go on with --resume {self._run}" if self._run else ""
        self._end(error=Interrupted(f"{reason}{resumable}"))

    def also(self, name: str, message: Message) -> bool:
        """Send `message` behind the question that is asked now (`Ask.behind`), if `name` still owes its answer, and no
        other message is behind it; else False."""
        question = self._pending
        if not isinstance(question, Question) or not question.takes_behind(name):
            return False
        return self._send(question, name, message, question.sent_behind)

    # --- EndpointHandler -------------------------------------------------------------------------------------------

    def on_message(self, incoming: Incoming) -> None:
        question, name = self._pending, incoming.sender
        if isinstance(question, Question) and question.awaits(name, incoming.correlation):
            question.take(name, incoming.message, incoming.correlation)
        else:  # unasked, or late: its question is over
            kept = self._ear.said(name, incoming.message, incoming.correlation)
            if not kept or not (incoming.correlation in self._told or incoming.message.kind.startswith(_UNASKED)):
                self._unwanted(name)
        self._review()

    def on_presence(self, name: str, online: bool, boot: int) -> None:
        before = self._boots.get(name)
        if online:
            self._unlike.pop(name, None)
            self._boots[name] = boot
        elif before is not None and boot >= before:
            del self._boots[name]
        if name in self._members() and (before is not None) != (name in self._boots):
            self._tell(Note(text=f"{name} is {'online' if online else 'offline'}"))
        if not online and before is not None:
            self._flapped(name)
        self._ear.presence(name, online, boot, self._loop.now_s())
        if isinstance(self._pending, Question):
            self._pending.presence(name, online, boot, self._loop.now_s())
        self._review()

    def on_connection(self, connected: bool, reason: str) -> None:
        if connected != self._connected:
            text = "the broker is back" if connected else f"the broker is away: {reason}"
            self._tell(Note(text=text, level="info" if connected else "warning"))
        self._connected = connected
        if connected and isinstance(self._pending, Question):
            self._pending.reconnected(self._loop.now_s())
        if connected:
            self._ear.reconnected(self._loop.now_s())
        self._review()

    def on_roster(self, roster: object) -> None:
        self._review()

    def on_refusal(self, sender: str, error: RemoteError) -> None:
        if isinstance(error, ProtocolMismatch) and sender not in self._boots:  # it is signed, so names are few
            news, self._unlike[sender] = sender not in self._unlike, printable(str(error))
            if news:
                self._tell(Note(text=f"{sender} can't take part: {self._unlike[sender]}", level="warning"))
            return
        now_s = self._loop.now_s()
        if now_s >= self._refused_from_s + _REFUSED_EVERY_S:
            if self._refused > _REFUSED_MOST:
                text = f"{self._refused - _REFUSED_MOST} more packets were refused since"
                self._tell(Note(text=text, level="warning"))
            self._refused_from_s, self._refused = now_s, 0
        self._refused += 1
        if self._refused > _REFUSED_MOST:
            return  # anybody who reaches the broker can cause these: they must not bury the rest
        who = sender or "an unknown sender"
        self._tell(Note(text=printable(f"a packet of {who} was refused: {error}"), level="warning"))

    def _flapped(self, name: str) -> None:
        now_s = self._loop.now_s()
        if now_s >= self._flaps_from_s + _FLAPS_WITHIN_S:
            self._flaps_from_s = now_s
            self._flaps.clear()
        self._flaps[name] += 1
        if self._flaps[name] == _FLAPS:
            text = (
                f"{name} has gone away {_FLAPS} times within {_FLAPS_WITHIN_S / 60:g} minutes: a bad connection, or "
                "two devices with its identity (a copied disk), which cut each other off; the log on the device tells"
            )
            self._tell(Note(text=text, level="warning"))

    def _unwanted(self, name: str) -> None:
        """A message that nobody waits for is dropped, here or by who listens. Who sends many of them is named."""
        now_s = self._loop.now_s()
        if now_s >= self._unwanted_from_s + _REFUSED_EVERY_S:
            self._unwanted_from_s = now_s
            self._unwanted_of.clear()
        self._unwanted_of[name] += 1
        if self._unwanted_of[name] == _UNWANTED:
            text = (
                f"{name} floods this server: {_UNWANTED} messages that nobody asked for; they are dropped. If it goes "
                f"on, look at that device, or: sordino roster remove {name}, sordino roster sign"
            )
            self._tell(Note(text=text, level="warning"))

    # --- effects ---------------------------------------------------------------------------------------------------

    def _resume(self, value: Callable[[], Result], *, fresh: bool = False) -> None:
        """Go on with the generator from a fresh callback (or at once, if this is in one), unless it has been stopped,
        and perhaps another started."""
        generator = self._generator

        def go_on() -> None:
            if self._generator is generator and not self.done:
                self._advance(value())

        if fresh:
            go_on()
        else:
            self._loop.call_at(self._loop.now_s(), go_on)

    def _advance(self, value: Result) -> None:
        """Resume the generator; perform effects until one has to wait."""
        generator = self._generator
        if generator is None or self.done:
            return
        try:
            while True:
                effect = generator.send(value)
                value = None
                match effect:
                    case Ask():
                        self._begin_question(effect)
                        return
                    case Gather():
                        self._pending = Gathering(effect, now_s=self._loop.now_s())
                        self._reminded_s = self._loop.now_s()
                        self._review()
                        return
                    case Hear():
                        self._pending = Hearing(effect, now_s=self._loop.now_s())
                        self._reminded_s = self._loop.now_s()
                        self._review()
                        return
                    case Listen(names=names):
                        self._told.clear()
                        self._listening, self._under_way = self._listening + 1, 0
                        self._ear.listen(names, self._online_of(tuple(names)), self._loop.now_s())
                    case Tell():
                        value = Sent(correlation=self._say(effect))
                    case Look():
                        value = self._present()
                    case Meter():
                        value = Metered(**self._bytes(), now_s=self._loop.now_s(), under_way=self._under_way)
                    case NextSum():
                        value = Numbered(index=self._next_sum())
                    case Begin(releases=releases):
                        self._begin(releases)
                    case Save(checkpoint=checkpoint):
                        self._save(checkpoint)
                    case Report(event=event):
                        self._tell(event)
        except StopIteration as stop:
            self._end(result=stop.value)
        except Exception as error:  # noqa: BLE001  # handed to whoever asks for the result
            self._end(error=error)

    def _begin_question(self, ask: Ask) -> None:
        now_s = self._loop.now_s()
        online = self._online_of((*self._members(), *self._others()))
        question = Question(
            ask, now_s=now_s, online=online, gone_s=self._gone_s, settled=self._answered, unlike=self._unlike
        )
        self._pending, self._reminded_s = question, now_s
        for name in question.waiting:
            if self._send(question, name, ask.messages[name], question.sent) and name in ask.behind:
                self._send(question, name, ask.behind[name], question.sent_behind)
        self._review()

    def _send(self, question: Question, name: str, message: Message, sent: Callable[[str, bytes], None]) -> bool:
        """Whether it is on its way; `sent` is told its correlation."""
        assert self._endpoint is not None

        def outcome(delivered: bool, reason: str) -> None:
            if not delivered and self._pending is question and name in question.waiting:
                question.miss(name, reason or "the command could not be delivered")
                self._review()

        try:
            correlation = self._endpoint.send(name, message, expires_s=question.ask.deadline_s, on_outcome=outcome)
        except LimitExceeded as error:  # too large for the link, or too much is queued for this agent
            if message is question.ask.messages[name]:
                question.miss(name, str(error))
            return False
        sent(name, correlation)
        return True

    # --- when is it enough? ----------------------------------------------------------------------------------------

    def _review(self, *, fresh: bool = False) -> None:
        """End the pending wait if its rules say so; otherwise set the timer to when they may. `fresh`: as `_resume`."""
        self._stop_timer()
        pending, now_s = self._pending, self._loop.now_s()
        match pending:
            case Question():
                due_s = pending.review(now_s, self._connected)
            case Gathering():
                due_s = pending.review(now_s, self._present())
            case Hearing():
                away_s = self._ear.review(now_s) if self._connected else math.inf
                due_s = pending.review(now_s, bool(self._ear), away_s, self._under_way)
            case None:
                return
        if due_s is not None:
            due_s = min(due_s, self._reminded_s + self._remind_s)
            self._timer = self._loop.call_at(due_s, self._on_timer)
            return
        self._pending = None
        match pending:
            case Question():
                late = pending.close(now_s)
                if late and pending.ask.cancel is not None:
                    self._cancel(late, pending.ask.cancel)
                answers = pending.answers()
                self._resume(lambda: answers, fresh=fresh)
            case Gathering():
                self._resume(self._present, fresh=fresh)
            case Hearing():
                self._resume(self._ear.take, fresh=fresh)

    def _on_timer(self) -> None:
        self._timer = None
        now_s = self._loop.now_s()
        if now_s >= self._reminded_s + self._remind_s:
            self._reminded_s = now_s
            waiting = self.waiting
            if waiting is not None:
                self._tell(waiting)
        self._review(fresh=True)

    # --- listening -------------------------------------------------------------------------------------------------

    def _say(self, effect: Tell) -> bytes:
        assert self._endpoint is not None
        listening = self._listening

        def outcome(delivered: bool, reason: str) -> None:
            if listening == self._listening:
                self._under_way -= 1
            if self.done:
                return
            if not delivered:
                self._ear.lose(effect.to, printable(reason or "a message could not be delivered"))
                self._review()
            elif isinstance(self._pending, Hearing) and self._pending.delivered:
                self._review()

        try:
            told = self._endpoint.send(effect.to, effect.message, expires_s=effect.expires_s, on_outcome=outcome)
            self._under_way += 1
            self._told[told] = None
            if len(self._told) > _TOLD_MOST:
                del self._told[next(iter(self._told))]
            return told
        except LimitExceeded as error:
            self._ear.lose(effect.to, printable(str(error)))
            return b""

    # --- small things ----------------------------------------------------------------------------------------------

    def _cancel(self, names: Sequence[str], message: Message) -> None:
        assert self._endpoint is not None
        for name in names:
            if name in self._boots:
                # A queue that is full holds the task's own command: who never got it need not be told to stop.
                with contextlib.suppress(LimitExceeded):
                    self._endpoint.send(name, message, expires_s=30.0)

    def _present(self) -> Present:
        return Present(
            boots=self.online,
            members=frozenset(self._members()),
            others=self._online_of(self._others()),
            unlike=dict(self._unlike),
        )

    def _bytes(self) -> dict[str, int]:
        up, down = self.bytes_now
        return {"bytes_up": up, "bytes_down": down}

    def _answered(self, question: Question, name: str, outcome: Outcome, note: str) -> None:
        self._tell(
            Answered(
                purpose=question.ask.purpose,
                name=name,
                outcome=outcome,
                note=note,
                have=len(question.replies),
                asked=len(question.ask.messages),
                **self._bytes(),
            )
        )

    def _tell(self, event: Any) -> None:
        self.observer(event)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, *, result: Any = None, error: BaseException | None = None) -> None:
        self._stop_timer()
        self._pending = None
        self.done, self._result, self._error = True, result, error


def _no_store(checkpoint: Checkpoint) -> None:
    raise LocalError("this generator saves checkpoints, but the conductor was started without a store")


def _no_ledger(releases: int) -> None:
    raise LocalError("this generator counts releases, but the conductor was started without a store for the count")


def _no_numbers() -> int:
    raise LocalError("this generator forms secure sums, but the conductor was started without numbers for them")
