"""One session on shares as the server conducts it: open, deal ahead, hear what is checked, confirm, close.

    ask    spdz-open to every member, all must be ready     refused by name: `SessionRefused`
    tell   set-ups, corrections (ahead of the steps), first state, confirmations
    hear   spdz-checked, spdz-retry, spdz-abort; who is gone

The server sees masks and, of masked values, only those of outputs that open to it. A member that goes away, or a worker
that dies, loses the session and not the run: `SessionLost`, after which a new session goes on from the last
checkpoint. Whatever smells of cheating ends the run under its own name.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from sordino_common import messages as m
from sordino_common.errors import FleetUnavailable, LocalError, RemoteError
from sordino_common.plan.arrays import to_numpy
from sordino_common.spdz import errors as spdz_errors
from sordino_common.spdz.errors import EquivocationError, ProtocolError, RetriesExhausted, StateAtEdge
from sordino_common.spdz.opening import MODEL
from sordino_common.spdz.spec import SessionSpec
from sordino_server.dealer.desk import first_state, readers_of, releases
from sordino_server.rounds.effects import (
    Ask,
    Effect,
    Gone,
    Hear,
    Result,
    Said,
    ask,
    hear,
    listen,
    meter,
    report,
    tell,
)
from sordino_server.rounds.events import Note
from sordino_server.rounds.roll import DataMismatch
from sordino_server.rounds.spdz_dealing import Dealing, There

I64 = npt.NDArray[np.int64]
_BY_CODE: Final = {
    cls.code: cls
    for cls in vars(spdz_errors).values()
    if isinstance(cls, type) and issubclass(cls, RemoteError) and cls is not RemoteError
}
# What a member may say when it merely can't go on: the session is lost, the run is not.
_PASSING: Final = frozenset(
    {
        "silence",
        "worker",
        "unknown-session",
        "draining",
        "busy",
        "cancelled",
        "journal",
        "session-dead",
        "state-at-edge",
    }
)
_REFUSED_FOR_GOOD: Final = frozenset(
    {"policy", "roster", "session-reused", "circuit", "command", "unknown-data", "model", "model-file", "out-of-range"}
)


class SessionLost(FleetUnavailable):
    """A member is gone, or can't go on. The run goes on from its last checkpoint in another session."""

    code = "session-lost"


class ModelMissing(DataMismatch):
    """The agent that is to provide the first parameters has no model of that name: the job names another."""


class SessionRefused(RemoteError):
    """An agent's own policy, roster or journal does not allow this session. The text says which and why."""

    code = "session-refused"


class SessionAborted(RemoteError):
    """A member has ended the session for a reason of its own."""

    code = "session-aborted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """x of what opened to the server: outputs by step, and the parameters after some steps."""

    outputs: Mapping[int, Mapping[str, I64]]
    model: Mapping[int, Mapping[str, I64]]
    states: Mapping[int, Mapping[str, I64]]  # masks λ of checkpoints


@dataclass(slots=True)
class _Member:
    checked: int
    checkpoint: int = 0
    outputs: dict[tuple[int, tuple[str, ...]], Mapping[str, I64]] = field(default_factory=dict)
    retry: tuple[int, int] | None = None


class Session:
    """`server`: our name, under which outputs open to us. `data`: which columns the owners input. `model`: which of its
    models an agent that provides the first state is to take. `deal_first`: all that may be dealt ahead is, and has
    arrived, before anybody can begin; for a dealer in this process."""

    def __init__(
        self,
        command: m.SpdzOpen,
        spec: SessionSpec,
        dealing: Dealing,
        *,
        server: str,
        data: m.DataRef | None,
        model: str | None = None,
        deadline_s: float,
        deal_first: bool = False,
    ) -> None:
        self.command: Final = command
        self.spec: Final = spec
        self.dealing: Final = dealing
        self.confirmed = command.first_step
        self.retries = 0
        self._server = server
        self._data = data
        self._model = model
        self._provider = None if command.state_from in (None, server) else command.state_from
        self._deadline_s = deadline_s
        self._deal_first = deal_first
        self._owners = tuple(entry.owner for entry in command.rows)
        provider = () if self._provider is None else (self._provider,)
        readers = [name for name in readers_of(command) if name != server]
        self._members = tuple(dict.fromkeys((*command.parties, *self._owners, *provider, *readers)))
        self._everybody = self._members if dealing.name is None else (*self._members, dealing.name)
        self._parties = {name: _Member(checked=command.first_step) for name in command.parties}
        self._params = tuple(entry.name for entry in spec.state_inputs if entry.role == "param")
        self._tries = 0
        self._tried_step = -1
        self._attempt = 0

    @property
    def members(self) -> tuple[str, ...]:
        return self._members

    # --- the beginning ---------------------------------------------------------------------------------------------

    def open(self, values: Mapping[str, I64] | None) -> Generator[Effect, Result, None]:
        """Have everybody ready, then give them their secrets. `values`: the first state, fixed point, if it is ours."""
        command = self.command
        try:
            yield from self._ask_to_open()
        except Exception as error:
            yield from self.abort(error)
            raise
        yield from listen(frozenset(self._everybody))
        if self._deal_first:
            try:
                yield from self._deal_ahead()
            except Exception as error:
                yield from self.abort(error)
                raise
        yield from self.dealing.begin(self._members)
        yield from self._confirm()
        if command.state_from != self._server:
            return  # an agent's, or kept from an earlier session
        if values is None:
            raise LocalError("Session: the first state is the server's to give")
        try:
            yield from self._give_state(values)
        except Exception as error:
            yield from self.abort(error)
            raise

    def _deal_ahead(self) -> Generator[Effect, Result, None]:
        """All preprocessing that may be dealt ahead, to its parties, who do nothing with it before they are set up.
        Meanwhile all members hear something often enough to stay."""
        parties, deadline_s = self.command.parties, self._deadline_s
        told_s = (yield from meter()).now_s
        while self.dealing.may_deal:
            yield from self.dealing.deal()
            yield from self._hear(parties, 0.0)
            told_s = yield from self._encourage(told_s)
        until_s = (yield from meter()).now_s + deadline_s
        while True:
            metered = yield from meter()
            if not metered.under_way:
                return
            if metered.now_s >= until_s:
                raise SessionLost(
                    f"the preprocessing of {self.dealing.dealt - self.command.first_step} steps has not arrived after "
                    f"{deadline_s:g} s; raise train.round_deadline_s, lower spdz.ahead_bytes, or say "
                    "spdz.preprocessing: beside"
                )
            told_s = yield from self._encourage(told_s)
            wait_s = min(until_s, told_s + self._patience_s) - metered.now_s
            wait = Hear(purpose="preprocessing to arrive", wait_s=wait_s, missing=parties, delivered=True)
            for item in (yield from hear(wait)):
                self._take(item)

    @property
    def _patience_s(self) -> float:
        """How long members are left without a word: they end a session in which nothing came for `silence_s`."""
        return self.command.silence_s / 3

    def _encourage(self, told_s: float) -> Generator[Effect, Result, float]:
        """A word to everybody if the last one was `told_s`, too long ago; when the last one was."""
        now_s = (yield from meter()).now_s
        if now_s < told_s + self._patience_s:
            return told_s
        yield from self._confirm()
        return now_s

    def _give_state(self, values: Mapping[str, I64]) -> Generator[Effect, Result, None]:
        """The first parameters, masked, to every party."""
        while not self.dealing.ready:
            yield from self._hear(("dealer",) if self.dealing.name is None else (self.dealing.name,))
        seed = self.dealing.state_seed
        assert seed is not None
        try:
            state = first_state(self.command, self.spec, seed, values)
        except StateAtEdge as error:
            raise SessionLost(str(error)) from None
        for name in self.command.parties:
            yield from tell(name, state)

    def _ask_to_open(self) -> Generator[Effect, Result, None]:
        command, owners = self.command, set(self._owners)

        def told(name: str) -> m.SpdzOpen:
            """Which columns is for owners to know, which model for who provides it."""
            data, model = self._data if name in owners else None, self._model if name == self._provider else None
            return msgspec.structs.replace(command, data=data, model=model)

        answers = yield from ask(
            Ask(
                purpose="members of the session to be ready",
                messages={name: told(name) for name in self._everybody},
                expects=m.SpdzReady,
                quorum=len(self._everybody),
                deadline_s=self._deadline_s,
                straggler_s=self._deadline_s,
                check=self._check_ready,
            )
        )
        for name, why in answers.refusals.items():
            code = why.partition(":")[0]
            if code == "unknown-model":
                raise ModelMissing("spdz.model_from", f"{name} does not have the model: {why}")
            if code in _REFUSED_FOR_GOOD:
                raise SessionRefused(f"{name} refuses the session: {why}")
            raise SessionLost(f"{name} can't take part in the session: {why}")
        if answers.missing:
            missing = ", ".join(f"{name} ({why})" for name, why in answers.missing.items())
            raise SessionLost(f"the session can't open; missing: {missing}")

    def _check_ready(self, name: str, message: m.Message) -> None:
        assert isinstance(message, m.SpdzReady)
        if message.session != self.command.session or message.digest != self.spec.digest:
            raise RemoteError("is ready for another session than the one it was asked to")

    # --- steps -----------------------------------------------------------------------------------------------------

    def advance(self, until: int) -> Generator[Effect, Result, Opened]:
        """Go on until every party has checked `until` steps; what has opened since. The parties are told by `settle`,
        once what must be durable is. Raises `SessionLost`, and errors of exit code 4 by name."""
        try:
            return (yield from self._advance(until))
        except Exception as error:
            yield from self.abort(error)
            raise

    def settle(self, done: int) -> Generator[Effect, Result, None]:
        """What belongs to the first `done` steps is durable: masks may be forgotten, owners may run ahead."""
        self.confirmed = max(self.confirmed, done)
        self.dealing.confirm(done)
        yield from self._confirm()

    def _advance(self, until: int) -> Generator[Effect, Result, Opened]:
        outputs: dict[int, Mapping[str, I64]] = {}
        model: dict[int, Mapping[str, I64]] = {}
        states: dict[int, Mapping[str, I64]] = {}
        news = True
        slowest: tuple[str, ...] = ()
        while True:
            done = self._done(until) if news else self.confirmed
            if done > self.confirmed:
                yield from self._open_outputs(done, outputs, model)
                for step in range(self.confirmed + 1, done + 1):
                    if step in self.command.checkpoints:
                        states[step] = self.dealing.state(step)
                if done == until:
                    return Opened(outputs=outputs, model=model, states=states)
                yield from self.settle(done)
            if news:
                slowest = self._slowest()
            wait_s = yield from self._deal()
            news = yield from self._hear(slowest, wait_s)
            if news:
                yield from self._retry()

    def _deal(self) -> Generator[Effect, Result, float | None]:
        """The next step, if it is due. How long until another is; None if there is none."""
        if not self.dealing.may_deal:
            return None
        now_s = (yield from meter()).now_s
        wait_s = self.dealing.wait_s(now_s)
        if wait_s == 0.0:
            yield from self.dealing.deal()
            wait_s = self.dealing.wait_s(now_s)
        return wait_s

    def _hear(self, missing: tuple[str, ...], wait_s: float | None = None) -> Generator[Effect, Result, bool]:
        """Whatever is said next, within `wait_s` if there is something to do then. Whether it was anything."""
        items = yield from hear(
            Hear(
                purpose=f"step {self.confirmed} of {self.command.steps}",
                wait_s=self.command.silence_s if wait_s is None else wait_s,
                missing=missing,
            )
        )
        if not items and wait_s is None:
            raise SessionLost(
                f"step {self.confirmed}: nothing heard for {self.command.silence_s:g} s from {', '.join(missing)}"
            )
        for item in items:
            self._take(item)
        return bool(items)

    def _done(self, until: int) -> int:
        """How many steps, up to `until`, every party and the dealer have done their part for."""
        done = min(until, self.dealing.checked(until), *(member.checked for member in self._parties.values()))
        if isinstance(self.dealing, There):  # its masks may come after its word that they were sent
            for output in self.command.outputs:
                if output.receiver == self._server:
                    while done > self.confirmed and not self._has_masks(self.dealing, output, done):
                        done -= 1
        return done

    def _has_masks(self, dealing: There, output: m.SpdzOutput, done: int) -> bool:
        if output.name == MODEL:
            return all(dealing.has(step, self._params) for step in self._model_opens(output, done))
        return all(dealing.has(step, (output.name,)) for step in range(self.confirmed, done))

    def _model_opens(self, output: m.SpdzOutput, done: int) -> Iterator[int]:
        """After which steps since `confirmed` and up to `done`."""
        every = output.every or self.command.steps
        yield from range((self.confirmed // every + 1) * every, done + 1, every)
        if done == self.command.steps and done % every:
            yield done

    def _take(self, item: Said | Gone) -> None:
        ours = isinstance(item, Said) and getattr(item.message, "session", b"") == self.command.session
        if ours and isinstance(item, Said) and self.dealing.take(item.name, item.message):
            return
        match item:
            case Gone(name=name, why=why):
                raise SessionLost(f"{name} is lost in the session: {why}")
            case Said(name=name, message=m.SpdzAbort() as message) if message.session == self.command.session:
                raise _error_of(name, message)
            case Said(name=name, message=m.SpdzChecked() as message) if message.session == self.command.session:
                self._take_checked(name, message)
            case Said(name=name, message=m.SpdzRetry() as message) if message.session == self.command.session:
                if name in self._parties:
                    self._parties[name].retry = (message.step, message.attempt)
            case _:
                pass  # of an earlier session, or a late answer

    def _take_checked(self, name: str, message: m.SpdzChecked) -> None:
        member = self._parties.get(name)
        most = min(self.command.steps, self.dealing.dealt)
        if member is None or not member.checked <= message.step <= most:
            raise ProtocolError(f"{name} tells of {message.step} steps checked, which can't be")
        member.checked = message.step
        member.checkpoint = max(member.checkpoint, message.checkpoint)
        for value in message.outputs:
            key = (value.step, value.names)
            if len(member.outputs) > 4 * self.command.ahead + 4 or key in member.outputs:
                raise ProtocolError(f"{name} tells the outputs of step {value.step} twice, or of too many steps")
            member.outputs[key] = {k: to_numpy(v) for k, v in zip(value.names, value.values, strict=True)}

    def _slowest(self) -> tuple[str, ...]:
        least = min(member.checked for member in self._parties.values())
        slowest = tuple(name for name, member in self._parties.items() if member.checked == least)
        if self.dealing.name is not None and self.dealing.checked(self.command.steps) < least:
            return (self.dealing.name,)
        return slowest

    # --- retries ---------------------------------------------------------------------------------------------------

    def _retry(self) -> Generator[Effect, Result, None]:
        """Everybody has met the edge of the ring at the same place: once more from there, with fresh masks."""
        asked = {member.retry for member in self._parties.values()}
        if None in asked:
            return
        if len(asked) != 1:
            raise EquivocationError("the parties met the edge of the ring at different places")
        (place,) = asked
        assert place is not None
        step, attempt = place
        if attempt != self._attempt:
            raise ProtocolError(f"step {step} is to be run again after attempt {attempt}, which is not the last")
        self._tries = self._tries + 1 if step == self._tried_step else 1
        self._tried_step = step
        if self._tries > self.command.retries:
            raise RetriesExhausted(
                f"step {step} met the edge of the ring {self._tries} times, at most {self.command.retries} are expected"
            )
        self._attempt = attempt + 1
        self.retries += 1
        for member in self._parties.values():
            member.retry = None
        self.dealing.rewind(step, self._attempt)
        restart = m.SpdzRestart(session=self.command.session, step=step, attempt=self._attempt)
        for name in self._everybody:
            yield from tell(name, restart)

    # --- outputs ---------------------------------------------------------------------------------------------------

    def _open_outputs(
        self, done: int, outputs: dict[int, Mapping[str, I64]], model: dict[int, Mapping[str, I64]]
    ) -> Generator[Effect, Result, None]:
        """Everything that opens with the steps up to `done`, now that all parties have checked them."""
        for output in self.command.outputs:
            if output.receiver != self._server:
                yield from self._release(output, done)
            elif output.name == MODEL:
                for step in self._model_opens(output, done):
                    masks = self.dealing.model(step, self._params)
                    model[step] = self._agreed(step, self._params, masks)
            else:
                for step in range(self.confirmed, done):
                    masks = self.dealing.outputs(step, (output.name,))
                    outputs[step] = {**outputs.get(step, {}), **self._agreed(step, (output.name,), masks)}

    def _release(self, output: m.SpdzOutput, done: int) -> Generator[Effect, Result, None]:
        """The masks of what opens to agents, if they are ours to send."""
        if self.dealing.name is None:
            released = releases(
                output, self.command, self.spec, (self.confirmed, done),
                outputs=self.dealing.outputs, model=self.dealing.model,
            )  # fmt: skip
            for receiver, step, masks in released:
                yield from self.dealing.release(receiver, step, masks)

    def _agreed(self, step: int, names: tuple[str, ...], masks: Mapping[str, I64]) -> dict[str, I64]:
        """x = m - λ, if every party tells the same m."""
        copies = {}
        for party, member in self._parties.items():
            if (step, names) not in member.outputs:
                raise ProtocolError(f"{party} has checked step {step} but does not tell its output {', '.join(names)}")
            copies[party] = member.outputs.pop((step, names))
        first_party, first = next(iter(copies.items()))
        for party, copy in copies.items():
            for name in names:
                if copy[name].shape != masks[name].shape:
                    raise ProtocolError(f"{party} tells an output {name} of shape {list(copy[name].shape)}")
                if copy is not first and not np.array_equal(copy[name], first[name]):
                    raise EquivocationError(f"{party} and {first_party} tell different outputs {name} of step {step}")
        return {name: np.subtract(first[name], masks[name]) for name in names}

    # --- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> Generator[Effect, Result, dict[str, m.SpdzClosed]]:
        """All steps are settled: everybody forgets. Their counters, and what owners may sum."""
        answers = yield from ask(
            Ask(
                purpose="members of the session to close it",
                messages=dict.fromkeys(self._everybody, m.SpdzClose(session=self.command.session)),
                expects=m.SpdzClosed,
                quorum=len(self._everybody),
                deadline_s=self._deadline_s,
                straggler_s=self._deadline_s,
            )
        )
        yield from listen(frozenset())
        found = {}
        for name, reply in answers.replies.items():
            assert isinstance(reply, m.SpdzClosed)
            found[name] = reply
            self.dealing.take(name, reply)
        for name, why in {**answers.missing, **answers.refusals}.items():
            yield from report(Note(text=f"{name} did not close the session: {why}", level="warning"))
        return found

    def abort(self, error: Exception) -> Generator[Effect, Result, None]:
        """Tell everybody that it is over, and why."""
        code = error.code if isinstance(error, RemoteError | FleetUnavailable) else "cancelled"
        message = m.SpdzAbort(session=self.command.session, code=code, reason=str(error)[:1000])
        yield from listen(frozenset())
        for name in self._everybody:
            yield from tell(name, message)

    def _confirm(self) -> Generator[Effect, Result, None]:
        message = m.SpdzConfirm(session=self.command.session, step=self.confirmed)
        for name in self._everybody:
            yield from tell(name, message)


def _error_of(name: str, message: m.SpdzAbort) -> Exception:
    text = f"{name}: {message.reason} [{message.code}]"
    if message.code in _PASSING:
        return SessionLost(text)
    cls = _BY_CODE.get(message.code)
    return SessionAborted(text) if cls is None else cls(f"{cls.__name__}: {text}")
