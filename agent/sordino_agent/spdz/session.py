"""One session on shares, in the daemon: who says what, when it goes to the worker, what leaves and when.

    open -> (lowered, digests agree) ready -> (dealer's set-up) running -> (server's close) over
    any error of a member, of the worker, or silence: over, and everybody is told by name

Nothing leaves before it is burnt. Shares and masked rows are taken from members only, in the session's own context;
the server has no way to say either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import msgspec

from sordino_agent.errors import Silence
from sordino_agent.executor import Executor
from sordino_agent.spdz.corrections import Corrections
from sordino_agent.spdz.journal import BurnJournal
from sordino_agent.spdz.mailbox import Mailbox
from sordino_agent.spdz.policy import OWNERS
from sordino_agent.spdz.shelf import Shelf, Taken
from sordino_agent.spdz.tasks import SpdzEffect, SpdzEndTask, SpdzEvent, SpdzFacts, SpdzOpenFacts, SpdzTask
from sordino_agent.tasks import Done, Failure, Outcome
from sordino_common import messages as m
from sordino_common.clock import Loop, Timer
from sordino_common.errors import PolicyRefusal, SordinoError
from sordino_common.messages import Array
from sordino_common.spdz.errors import CorrectionError, EquivocationError, ProtocolError

log = logging.getLogger("sordino.agent")

MODEL: Final = "model"  # `sordino_common.spdz.opening.MODEL`, which takes NumPy to import
BURN_STEPS: Final = 64  # burnt at a time: an fsync takes as long as several rounds
MASK_STEPS: Final = 16  # batches masked in one task, and sent in one message, so that shares do not wait for long;
MASK_BYTES: Final = 3 << 18  # of no more bytes, unless one batch has: a device takes 1 MiB, whatever its limits say
_REASON_CHARS: Final = 1000
# Who is of the committee is not to be trusted any more: what it keeps is of no use.
_CHEATING: Final = frozenset({"mac-check", "equivocation", "commitment", "protocol", "correction", "mask-at-edge"})


class Port(Protocol):
    """How a session speaks. `on_outcome(delivered, reason)` is called once."""

    def tell(
        self, to: str, message: m.Message, *, context: bytes, on_outcome: Callable[[bool, str], None] | None = None
    ) -> None: ...


class Session:
    """See the module's text. `on_over(code, reason)` is called once, at the end, whatever it was ("" if in order)."""

    def __init__(
        self,
        command: m.SpdzOpen,
        *,
        agent: str,
        server: str,
        port: Port,
        executor: Executor,
        journal: BurnJournal,
        loop: Loop,
        held: tuple[tuple[str, ...], tuple[Array, ...]] | None,
        facts: SpdzOpenFacts,
        shelf: Shelf,
        keep_model: Callable[[str, bytes], None],
        on_over: Callable[[str, str], None],
    ) -> None:
        self.command: Final = command
        self.id: Final = command.session
        self.over = False
        self.finished = False
        self._agent = agent
        self._server = server
        self._port = port
        self._executor = executor
        self._journal = journal
        self._loop = loop
        self._facts = facts
        self._shelf = shelf
        self._keep_model = keep_model
        self._on_over = on_over
        self._release = executor.hold()
        self.is_party: Final = agent in command.parties
        self.owners: Final = tuple(entry.owner for entry in command.rows)
        self.is_owner: Final = agent in self.owners
        self.provides: Final = command.state_from == agent
        self.others: Final = tuple(name for name in command.parties if name != agent)
        self._mailbox = Mailbox(others=len(self.others))
        self._terms = m.terms_of(command)
        self._setup: m.SpdzSetup | None = None
        self._begun = False
        self._busy = False
        self._attempt = 0
        self._confirmed = command.first_step
        self._going = False  # the server has confirmed the beginning: rows may go out
        self._masked_to = command.first_step
        self._mask_until = 0
        self._mask_steps: Final = max(1, min(MASK_STEPS, MASK_BYTES // max(1, facts.batch_bytes)))
        # Corrections up to this step are needed now or next: the party has sent shares of the step before it. Of steps
        # that send none, or are told one by one, every correction is needed now.
        self._soon = command.steps if self.stepwise or not facts.rounds else command.first_step + 1
        self._provided = False
        self._model_read = False
        self._burnt = (command.first_step, -1)
        self._checked = self._reported = command.first_step
        self._checkpoint = 0
        self._outputs: list[m.SpdzValues] = []
        self._corrections: Final = Corrections(
            first=command.first_step, ahead=command.ahead, nbytes=facts.correction_bytes
        )
        self._sums: SpdzEffect | None = None
        self._closing: Callable[[m.SpdzClosed], None] | None = None
        self._step: tuple[m.SpdzStep, Taken] | None = None  # of a stepwise session, the last one told
        self._early: dict[str, m.SpdzState] = {}  # sender -> what it gives to a step that was not told yet
        self._begins: SpdzEvent | None = None  # the step that was told, before the party has it
        self._gifts: dict[str, SpdzEvent] = {}  # sender -> what it gives to that step
        self._words: set[str] = set()  # who was told the same step, in a passive session
        self._has_work = False  # the worker can go on by itself
        self._waiting_for = ""
        self._outcomes: Final = tuple((name, partial(self._on_outcome, name)) for name in self.others)
        self._rounds = self._checks = self._retries = self._opened_bytes = 0
        self._compute_s = 0.0
        self._first_share_s: float | None = None
        self._last_share_s = 0.0
        self._heard_s = loop.now_s()
        self._timer: Timer | None = None
        if held is not None and self.is_party:
            names, values = held
            self._mailbox.put(SpdzEvent(what="resume", step=command.first_step, names=names, values=values))
        self._listen()

    @property
    def stepwise(self) -> bool:
        return self.command.idle_s is not None

    @property
    def _told(self) -> int:
        """How many steps of a stepwise session were told."""
        return 0 if self._step is None else self._step[0].step + 1

    @property
    def _idle(self) -> bool:
        """Whether a stepwise session waits for its next step."""
        return self.stepwise and self._checked == self._told

    @property
    def label(self) -> str:
        if self.stepwise:
            return f"shares {self.command.run}, {self._checked} steps"
        return f"shares {self.command.run} step {self._checked} of {self.command.steps}"

    # --- from server and dealer ------------------------------------------------------------------------------------

    def on_setup(self, sender: str, message: m.SpdzSetup) -> None:
        self._require(sender, self.command.dealer, "set-up")
        if self._setup is not None:
            raise ProtocolError("the dealer's set-up came twice")
        self._setup = message
        self._hear()

    def on_correction(self, sender: str, message: m.SpdzCorrection) -> None:
        self._require(sender, self.command.dealer, "correction")
        if not self.is_party:
            raise CorrectionError("a correction for who is no party")
        data = self._corrections.take(message)
        if data is not None:
            event = SpdzEvent(what="correction", step=message.step, attempt=message.attempt, data=data)
            if message.step > self._soon:
                self._mailbox.put_early(event)
            else:
                self._mailbox.put(event)
        self._hear()

    def on_step(self, message: m.SpdzStep) -> None:
        """The server says what goes into the next step, and what becomes of it. Raises what the policy says, what is
        not here or has no room; then nothing has changed. Raises `ProtocolError` for a step that is not the next."""
        if not self.stepwise or not self.is_party:
            raise ProtocolError("a step is told in a session that is scheduled, or to who is no party")
        if message.step != self._told or not self._idle:
            raise ProtocolError(f"told of step {message.step}, {self._told} were told and {self._checked} are checked")
        taken = self._shelf.take(self.command, self._facts, message, now_s=self._loop.now_s())
        self._step = (message, taken)
        self._begins = SpdzEvent(
            what="step", step=message.step, data=m.encode_message(message), names=taken.names, values=taken.values
        )
        self._words, self._gifts = set(), {}
        if self.command.security == "passive":  # no check will tell whether all were told the same: their words do
            word = m.SpdzState(
                session=self.id, terms=m.terms_of_step(self.command, message), step=message.step, names=(), values=()
            )
            for name in self.others:
                self._tell_peer(name, word)
        early, self._early = self._early, {}
        for sender, state in early.items():
            self._give(sender, state)
        self._try_to_begin()
        self._hear()

    def _try_to_begin(self) -> None:
        """The step that was told goes to the party; in a passive session once all others were told the same."""
        begins = self._begins
        if begins is None or (self.command.security == "passive" and self._words != set(self.others)):
            return
        self._begins = None
        for event in (begins, *self._gifts.values()):
            self._mailbox.put(event)

    def _give(self, sender: str, message: m.SpdzState) -> None:
        """Something that `sender` puts into a step of a stepwise session."""
        if sender != self._server and sender not in self.others:
            raise PolicyRefusal(f"{sender} gives something to a session of which it is no party")
        if message.step == self._told and self._idle:  # it may come before the step is told, once
            if self._early.setdefault(sender, message) is not message:
                raise ProtocolError(f"{sender} gives twice to step {message.step}")
            return
        if self._step is None or message.step != self._step[0].step:
            raise ProtocolError(f"{sender} gives something to step {message.step}, {self._told} were told")
        if message.terms != m.terms_of_step(self.command, self._step[0]):
            raise EquivocationError(
                f"{sender} was told another step {message.step} than this device (what goes in, what stays, what "
                "opens): the server lies to one of them"
            )
        if not message.names:
            self._words.add(sender)
            self._try_to_begin()
            return
        gift = SpdzEvent(what="state", sender=sender, step=message.step, names=message.names, values=message.values)
        if self._begins is None:
            self._mailbox.put(gift)
        elif self._gifts.setdefault(sender, gift) is not gift:
            raise ProtocolError(f"{sender} gives twice to step {message.step}")

    def on_state(self, sender: str, message: m.SpdzState) -> None:
        if self.stepwise:
            self._give(sender, message)
            self._hear()
            return
        self._require(sender, self.command.state_from or "", "first parameters")
        self._require_terms(sender, message.terms)
        self._mailbox.put(SpdzEvent(what="state", sender=sender, names=message.names, values=message.values))
        self._hear()

    def on_masks(self, sender: str, message: m.SpdzMasks) -> None:
        self._require(sender, self.command.dealer, "masks of outputs")
        for value in message.outputs:
            self._mailbox.put(SpdzEvent(what="masks", step=value.step, names=value.names, values=value.values))
        self._hear()

    def on_confirm(self, message: m.SpdzConfirm) -> None:
        if message.step > self.command.steps:
            raise ProtocolError(f"{message.step} steps confirmed of {self.command.steps}")
        self._going = True
        self._confirmed = max(self._confirmed, message.step)
        self._corrections.confirm(message.step)
        if self.is_party and self._checkpoint and message.step >= self._checkpoint:
            self._journal.forget_before(self.command.run, self.id, self._checkpoint)
        if self.provides and not self._provided:
            self._provided = True
            self._mailbox.put(SpdzEvent(what="provide"))
        self._ask_for_rows()
        self._hear()

    def on_restart(self, message: m.SpdzRestart) -> None:
        if message.attempt <= self._attempt:
            raise ProtocolError(f"told to run step {message.step} under attempt {message.attempt} again")
        self._attempt = message.attempt
        self._retries += 1
        self._corrections.restart(message.attempt)
        self._masked_to = min(self._masked_to, message.step)
        self._mailbox.put(SpdzEvent(what="restart", step=message.step, attempt=message.attempt))
        self._ask_for_rows()
        self._hear()

    def on_close(self, answer: Callable[[m.SpdzClosed], None]) -> None:
        """The server says that all is done. `answer` once what this agent may read is there."""
        self._closing = answer
        self._hear()
        self._try_to_close()

    # --- from other agents, in the session's context --------------------------------------------------------------

    def on_input(self, sender: str, message: m.SpdzInput) -> None:
        if not self.is_party or sender not in self.owners:
            raise PolicyRefusal(f"{sender} owns no rows in this session, or this device is no party of it")
        self._require_terms(sender, message.terms)
        for batch in message.batches:
            self._mailbox.put(
                SpdzEvent(
                    what="input", sender=sender, step=batch.step, attempt=message.attempt, names=batch.names,
                    values=batch.values,
                )
            )  # fmt: skip
        self._hear()

    def on_shares(self, sender: str, message: m.SpdzShares) -> None:
        if sender not in self.others or not self.is_party:
            raise PolicyRefusal(f"shares are taken from the session's parties, {sender} is none")
        self._mailbox.put_shares(sender, message.shares)
        self._hear()

    def on_outputs(self, sender: str, message: m.SpdzOutputs) -> None:
        if sender not in self.command.parties:
            raise PolicyRefusal(f"outputs are taken from the session's parties, {sender} is none")
        for value in message.outputs:
            self._mailbox.put(
                SpdzEvent(what="outputs", sender=sender, step=value.step, names=value.names, values=value.values)
            )
        self._hear()

    # --- the end ---------------------------------------------------------------------------------------------------

    def fail(self, error: SordinoError, *, tell: bool = True) -> None:
        """Something that a member sent, or did not send, ends the session."""
        self._end(error.code, str(error), tell=tell)

    def on_abort(self, sender: str, message: m.SpdzAbort) -> None:
        self._end(message.code, f"{sender}: {message.reason}", tell=False)

    def _end(self, code: str, reason: str, *, tell: bool) -> None:
        if self.over:
            return
        self.over = True
        reason = reason[:_REASON_CHARS]
        if code in _CHEATING:
            self._shelf.forget(self.command)
        log.log(
            logging.WARNING if code else logging.INFO,
            "event=session-over session=%s code=%s reason=%r", self.id.hex()[:8], code or "done", reason,
        )  # fmt: skip
        if tell:
            abort = m.SpdzAbort(session=self.id, code=code, reason=reason)
            for name in dict.fromkeys((self._server, self.command.dealer)):
                self._port.tell(name, abort, context=b"")
            if self.is_party:
                for name in self.others:
                    self._port.tell(name, abort, context=self.id)
        if self._timer is not None:
            self._timer.cancel()
        self._executor.submit(SpdzEndTask(session=self.id, finished=not code and self.finished), _ignore)
        self._setup = None
        self._corrections.clear()
        self._release()
        self._on_over(code, reason)

    def _try_to_close(self) -> None:
        if self.over or self._closing is None or self._busy:
            return
        self.finished |= self._idle
        if (
            (self.is_party and not self.finished)
            or (self._reads_rows and self._sums is None)
            or (self._reads_model and not self._model_read)
        ):
            return  # the last of it is on its way
        online_s = 0.0 if self._first_share_s is None else self._last_share_s - self._first_share_s
        counters = m.SpdzCounters(
            rounds=self._rounds,
            checks=self._checks,
            retries=self._retries,
            opened_bytes=self._opened_bytes,
            compute_s=self._compute_s,
            online_s=online_s,
        )
        sums = self._sums or SpdzEffect(what="sums")
        answer, self._closing = self._closing, None
        answer(m.SpdzClosed(session=self.id, counters=counters, rows=sums.round, names=sums.names, sums=sums.sums))
        self._end("", "", tell=False)

    @property
    def _reads_rows(self) -> bool:
        return any(
            (output.receiver == OWNERS and self.is_owner) or (output.receiver == self._agent and output.name != MODEL)
            for output in self.command.outputs
        )

    @property
    def _reads_model(self) -> bool:
        return any(output.receiver == self._agent and output.name == MODEL for output in self.command.outputs)

    # --- to the worker ---------------------------------------------------------------------------------------------

    def _ask_for_rows(self) -> None:
        """Own rows up to `ahead` of what is confirmed, a portion with every task."""
        if self.is_owner and self._going:
            self._mask_until = min(self.command.steps, self._confirmed + self.command.ahead)

    def _portion(self) -> SpdzEvent:
        first, self._masked_to = self._masked_to, min(self._mask_until, self._masked_to + self._mask_steps)
        return SpdzEvent(what="mask", step=first, until=self._masked_to, attempt=self._attempt)

    def _hear(self) -> None:
        self._heard_s = self._loop.now_s()
        self._flush()

    def _flush(self) -> None:
        if self.over or self._busy or self._setup is None:
            return
        rows = self._masked_to < self._mask_until
        if self._begun and not rows and not self._mailbox.ready and not self._has_work:
            return
        setup = None if self._begun else self._setup
        self._begun = self._busy = True
        events = self._mailbox.take()
        if rows:
            events = (*events, self._portion())
        self._executor.submit(SpdzTask(session=self.id, setup=setup, events=events), self._done)

    def _done(self, outcome: Outcome) -> None:
        self._busy = False
        if self.over:
            return
        if isinstance(outcome, Failure):
            self._end(outcome.code, outcome.reason, tell=True)
            return
        assert isinstance(outcome, Done)
        facts = outcome.result
        assert isinstance(facts, SpdzFacts)
        try:
            if facts.shares:
                self._send_shares(facts.shares)
            if facts.effects:
                self._perform(facts.effects)
        except SordinoError as error:
            self.fail(error)
            return
        self._compute_s += outcome.seconds
        self._waiting_for = facts.waiting_for
        self._has_work = facts.has_work
        if self._has_work or self._mailbox.ready or self._masked_to < self._mask_until:
            self._flush()
        if self._closing is not None:
            self._try_to_close()

    # --- what leaves -----------------------------------------------------------------------------------------------

    def _perform(self, effects: tuple[SpdzEffect, ...]) -> None:
        inputs: dict[int, list[m.SpdzValues]] = {}
        outputs: dict[str, list[m.SpdzValues]] = {}
        report = False
        for effect in effects:
            match effect.what:
                case "input":
                    inputs.setdefault(effect.attempt, []).append(_values(effect))
                case "state":
                    state = m.SpdzState(
                        session=self.id,
                        terms=self._terms if self._step is None else m.terms_of_step(self.command, self._step[0]),
                        step=effect.step,
                        names=effect.names,
                        values=effect.values,
                    )
                    for name in self.others:
                        self._tell_peer(name, state)
                case "output":
                    outputs.setdefault(effect.to, []).append(_values(effect))
                case "keep":
                    self._keep(effect)
                case "moved":
                    self._receive(effect)
                case "checkpoint":
                    self._journal.keep(self.command.run, self.id, _values(effect), wall_s=self._loop.wall_s())
                    self._checkpoint = effect.step
                    report = True
                case "checked":
                    self._checked = effect.step
                    self._checks += self.command.security == "active"
                    report |= self._checked - self._reported >= self.command.report_every
                case "retry":
                    retry = m.SpdzRetry(session=self.id, step=effect.step, attempt=effect.attempt, where=effect.kind)
                    self._port.tell(self._server, retry, context=b"")
                case "done":
                    self.finished = report = True
                case "sums":
                    self._sums = effect
                case "model":
                    self._model_read |= effect.kind == "model" and effect.step == self.command.steps
                    ending = "" if effect.kind == "model" else f"-{effect.kind}"
                    self._keep_model(self.command.run + ending, effect.data)
        for attempt, batches in inputs.items():
            message = m.SpdzInput(terms=self._terms, attempt=attempt, batches=tuple(batches))
            for name in self.others:
                self._tell_peer(name, message)
        for name, values in outputs.items():
            if name in ("", self._server):
                self._outputs += values
            else:
                self._tell_peer(name, m.SpdzOutputs(outputs=tuple(values)))
        if report:
            self._report()

    def _send_shares(self, shares: tuple[m.SpdzShare, ...]) -> None:
        """Burn what is new, send, count: nothing else stands between a share and its peers."""
        for share in shares:
            if share.step >= self._burnt[0] or share.attempt > self._burnt[1]:
                self._burn(max(one.step for one in shares), max(one.attempt for one in shares))
                break
        for first in range(0, len(shares), m.SHARES_AT_ONCE):
            message = m.SpdzShares(shares=shares[first : first + m.SHARES_AT_ONCE])
            for name, outcome in self._outcomes:
                self._port.tell(name, message, context=self.id, on_outcome=outcome)
        self._last_share_s = self._loop.now_s()
        if self._first_share_s is None:
            self._first_share_s = self._last_share_s
        for share in shares:
            if share.kind == "open":
                self._rounds += 1
                self._opened_bytes += len(share.payload)
            if share.step >= self._soon:
                self._soon = share.step + 1
                self._mailbox.reached(self._soon)

    def _burn(self, step: int, attempt: int) -> None:
        """Shares up to `step`, under `attempt`, are about to leave."""
        self._burnt = (min(step + BURN_STEPS, self.command.steps), attempt)
        self._journal.burn_steps(self.id, step=self._burnt[0], attempt=attempt)

    def _keep(self, effect: SpdzEffect) -> None:
        assert self._step is not None
        step, taken = self._step
        size = len(effect.data) // len(effect.names)
        origins = [effect.data[size * k : size * (k + 1)] for k in range(len(effect.names))]
        values = {
            name: (value, origin) for name, value, origin in zip(effect.names, effect.values, origins, strict=True)
        }
        self._shelf.keep(self.command, step, taken, values, now_s=self._loop.now_s())

    def _receive(self, effect: SpdzEffect) -> None:
        """What opened to this device is a tensor of its own from now on."""
        if self._step is None or self._step[0].step != effect.step:
            raise ProtocolError(f"the masks of step {effect.step} came when another step was told")
        step, taken = self._step
        values = dict(zip(effect.names, effect.values, strict=True))
        self._shelf.receive(self.command, step, taken, values, now_s=self._loop.now_s())
        self._port.tell(self._server, m.SpdzStored(session=self.id, step=step.step), context=b"")

    def _report(self) -> None:
        outputs, self._outputs = tuple(self._outputs), []
        self._reported = self._checked
        message = m.SpdzChecked(session=self.id, step=self._checked, checkpoint=self._checkpoint, outputs=outputs)
        self._port.tell(self._server, message, context=b"")
        if self.command.dealer != self._server:  # its masks leave on the parties' word, not on the server's
            word = msgspec.structs.replace(message, outputs=(), terms=self._terms)
            self._port.tell(self.command.dealer, word, context=b"")

    def _tell_peer(self, name: str, message: m.Message) -> None:
        self._port.tell(name, message, context=self.id, on_outcome=partial(self._on_outcome, name))

    def _on_outcome(self, name: str, delivered: bool, reason: str) -> None:
        if not delivered and not self.over and not self.finished:
            self.fail(Silence(f"{name} can't be reached: {reason}"))

    # --- time ------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """End the session if nothing came for `silence_s`."""
        idle_s = self.command.idle_s
        wait_s = idle_s if idle_s is not None and self._idle else self.command.silence_s
        due_s = self._heard_s + wait_s
        if self._loop.now_s() >= due_s:
            if self._idle:
                self.fail(Silence(f"no step came for {wait_s:g} s"))
                return
            missing = "; ".join(
                f"{what}: only from {', '.join(names)}" for what, names in self._mailbox.missing().items()
            )
            waiting = missing or self._waiting_for or "the dealer's set-up"
            self.fail(Silence(f"nothing came for {self.command.silence_s:g} s; waiting for {waiting}"))
            return
        self._timer = self._loop.call_at(min(due_s, self._loop.now_s() + self.command.silence_s), self._listen)

    def _require_terms(self, sender: str, terms: bytes) -> None:
        """Whoever masks something must have been told what we were told: else its policy has seen another session."""
        if terms != self._terms:
            raise EquivocationError(
                f"{sender} was told other terms of this session than this device (who deals, who provides the model, "
                "what opens to whom): the server lies to one of them"
            )

    def _require(self, sender: str, expected: str, what: str) -> None:
        if sender != expected:
            raise PolicyRefusal(f"{what} comes from {expected or 'nobody'} in this session, not from {sender}")


def _values(effect: SpdzEffect) -> m.SpdzValues:
    return m.SpdzValues(step=effect.step, names=effect.names, values=effect.values)


def _ignore(outcome: Outcome) -> None:
    """Ending a session has no result that anybody waits for."""
    if isinstance(outcome, Failure):
        log.warning("event=session-end-failed code=%s reason=%r", outcome.code, outcome.reason)
