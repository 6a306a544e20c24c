"""The room where this device's sessions on shares are held: who may open one, and which message is for which.

    spdz-open   from the server: policy by name, burnt on disk, lowered in the worker, digests compared: spdz-ready
    spdz-step   from the server, in a stepwise session: policy by name, what it takes is here: spdz-taken
    all else    to the session that it names (or whose context it comes in), if its sender is of it

A member that breaks the protocol ends the session, and is named. Somebody who is no member changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from sordino_agent.desk import Asker, asker_of
from sordino_agent.errors import Busy, Cancelled, CircuitDiffers, Draining, UnknownSession
from sordino_agent.executor import Executor
from sordino_agent.policy import Limits, Policy
from sordino_agent.sender import Sender
from sordino_agent.spdz.journal import BurnJournal
from sordino_agent.spdz.policy import OWNERS, require_session
from sordino_agent.spdz.session import Session
from sordino_agent.spdz.shelf import Shelf
from sordino_agent.spdz.tasks import SpdzOpenFacts, SpdzOpenTask
from sordino_agent.store import TensorStore
from sordino_agent.tasks import Done, Failure, Outcome
from sordino_common import messages as m
from sordino_common.clock import Loop
from sordino_common.errors import LocalError, PolicyRefusal, RosterError, SordinoError
from sordino_common.spdz.errors import EquivocationError, ProtocolError

if TYPE_CHECKING:
    from sordino_common.channel.roster import Roster
    from sordino_common.messages import Array
    from sordino_common.transport.endpoint import Incoming

log = logging.getLogger("sordino.agent")

LINGER_S: Final = 10.0  # how long a session's channels stay, for what was said last
LINGER_MOST: Final = 8  # sessions whose channels stay: an endpoint has few, and somebody may open many short sessions
# What is for a session, and who of it takes it: from other agents (a state from the server, too), from the dealer.
_Takers = dict[type[m.Message], Callable[[Session, str, Any], None]]
_OF_PEERS: Final = _Takers(
    {
        m.SpdzShares: Session.on_shares,
        m.SpdzInput: Session.on_input,
        m.SpdzOutputs: Session.on_outputs,
        m.SpdzState: Session.on_state,
    }
)
_OF_THE_DEALER: Final = _Takers(
    {
        m.SpdzCorrection: Session.on_correction,
        m.SpdzSetup: Session.on_setup,
        m.SpdzMasks: Session.on_masks,
        m.SpdzState: Session.on_state,
    }
)
_ASKED: Final[frozenset[type[m.Message]]] = frozenset((m.SpdzStep, m.SpdzClose))  # by the server
UNANSWERED: Final = frozenset((*_OF_PEERS, *_OF_THE_DEALER, m.SpdzConfirm, m.SpdzRestart, m.SpdzAbort))
SESSION_KINDS: Final = UNANSWERED | _ASKED  # all but `SpdzOpen`


class Room:
    """See the module's text. `plan_of` gives a Plan that was put here, or raises."""

    def __init__(
        self,
        *,
        name: str,
        server: str,
        policy: Policy,
        limits: Limits,
        executor: Executor,
        journal: BurnJournal,
        loop: Loop,
        plan_of: Callable[[bytes], bytes],
        keep_model: Callable[[str, bytes], None],
        refuse: Callable[[str, Asker, str, str], None],
        store: TensorStore,
        require_exact: Callable[[str, str], None],
    ) -> None:
        self.policy = policy
        self.roster: Roster | None = None
        self.on_change: Callable[[], None] = lambda: None
        self.sessions_failed = 0
        self._name = name
        self._server = server
        self._limits = limits
        self._executor = executor
        self._journal = journal
        self._loop = loop
        self._plan_of = plan_of
        self._keep_model = keep_model
        self._refuse = refuse
        self._shelf = Shelf(
            agent=name, server=server, store=store, policy=lambda: self.policy, require_exact=require_exact
        )
        self._sender: Sender | None = None
        self._sessions: dict[bytes, Session] = {}
        self._lingering: dict[bytes, list[str]] = {}  # session -> its peers, the one that ended first first
        self._opening: set[bytes] = set()
        self._server_boot = -1
        self._draining = False

    def attach(self, sender: Sender) -> None:
        self._sender = sender

    @property
    def running(self) -> tuple[str, ...]:
        """Sessions, oldest first, for people."""
        return tuple(session.label for session in self._sessions.values())

    def drain(self) -> None:
        """The agent stops: its sessions end, and their members are told."""
        self._draining = True
        for session in list(self._sessions.values()):
            session.fail(Draining("this agent is about to stop"))

    def cancel(self, run: str) -> None:
        """The server gives the run up."""
        for session in [one for one in self._sessions.values() if one.command.run == run]:
            session.fail(Cancelled("the run was cancelled"), tell=False)

    # --- what comes ------------------------------------------------------------------------------------------------

    def on_message(self, incoming: Incoming) -> None:
        """What is for a session (`SESSION_KINDS`). Raises for what is refused; the caller answers what the server asks,
        and nothing of `UNANSWERED`.

        What agents say to one another is taken in the session's own context only: no other channel's keys are bound to
        it."""
        message, sender = incoming.message, incoming.sender
        takes = _OF_PEERS.get(type(message))
        if takes is None or (type(message) is m.SpdzState and sender == self._server):
            self._from_above(incoming)
            return
        if sender == self._server:
            raise PolicyRefusal(f"{message.kind} from the server: it must never hold, nor send, masked values")
        session = self._sessions.get(incoming.context)
        if session is None:
            self._tell_over(sender, incoming.context)
            raise UnknownSession(f"{message.kind} of {sender} in a context that is no open session's")
        try:
            takes(session, sender, message)
        except PolicyRefusal:
            raise  # not from who may say it: nothing has changed
        except SordinoError as error:
            session.fail(error)

    def on_presence(self, name: str, online: bool, boot: int) -> None:
        """A server that restarts has forgotten its sessions."""
        if name != self._server or not online:
            return
        if -1 < self._server_boot < boot:
            for session in list(self._sessions.values()):
                session.fail(UnknownSession(f"{name} has restarted"))
        self._server_boot = boot

    def _from_above(self, incoming: Incoming) -> None:
        """From server or dealer, about the session that the message names; or any member's word that it is over."""
        message, sender = incoming.message, incoming.sender
        session = self._sessions.get(getattr(message, "session", b""))
        if session is None:
            if isinstance(message, m.SpdzAbort):
                return  # it is over here, too
            raise UnknownSession(f"{message.kind}: this session is not open here")
        if isinstance(message, m.SpdzAbort):
            if sender not in self._members(session):
                raise PolicyRefusal(f"{sender} is no member of the session that it wants to end")
            session.on_abort(sender, message)
            return
        if isinstance(message, m.SpdzStep):
            self._told_step(session, message, incoming)
            return
        takes = _OF_THE_DEALER.get(type(message))
        try:
            if takes is not None:
                takes(session, sender, message)
            else:
                self._from_server(session, incoming)
        except PolicyRefusal:
            raise
        except SordinoError as error:
            session.fail(error)

    def _told_step(self, session: Session, message: m.SpdzStep, incoming: Incoming) -> None:
        """What this device does not allow, or has not, is refused, and the session goes on without that step."""
        self._require_server(incoming)
        try:
            session.on_step(message)
        except (ProtocolError, EquivocationError) as error:
            session.fail(error)
            raise
        self._answer(asker_of(incoming), m.SpdzTaken(session=message.session, step=message.step))

    def _from_server(self, session: Session, incoming: Incoming) -> None:
        self._require_server(incoming)
        match incoming.message:
            case m.SpdzConfirm() as message:
                session.on_confirm(message)
            case m.SpdzRestart() as message:
                session.on_restart(message)
            case m.SpdzClose():
                session.on_close(lambda closed: self._answer(asker_of(incoming), closed))
            case message:
                raise LocalError(f"{message.kind} in the room for shares")

    def _require_server(self, incoming: Incoming) -> None:
        if incoming.sender != self._server:
            kind = incoming.message.kind
            raise PolicyRefusal(f"{kind} comes from {self._server} only, not from {incoming.sender}")

    # --- opening ---------------------------------------------------------------------------------------------------

    def open(self, command: m.SpdzOpen, asker: Asker) -> None:
        """Raises for what is refused; else `SpdzReady` or `Refused` goes to the asker, once it is lowered."""
        if self._draining:
            raise Draining("this agent is about to stop and takes no new session")
        held = self._require(command)
        for old in [one for one in self._sessions.values() if one.command.run == command.run]:
            old.fail(UnknownSession("the server opens another session of the same run"), tell=False)
        if len(self._sessions) + len(self._opening) >= self._limits.sessions:
            raise Busy(f"{len(self._sessions)} sessions are open, as many as limits.sessions on the device allows")
        plan = self._plan_of(command.plan_id)
        self._journal.burn_session(command.session, run=command.run, wall_s=self._loop.wall_s())
        self._opening.add(command.session)
        task = SpdzOpenTask(
            command=command,
            plan=plan,
            agent=self._name,
            min_rows=self.policy.min_rows,
            held_bytes=self._limits.spdz_bytes,
            message_bytes=self._limits.payload_bytes,
        )
        self._executor.submit(task, lambda outcome: self._opened(command, asker, held, outcome))

    def _require(self, command: m.SpdzOpen) -> tuple[tuple[str, ...], tuple[Array, ...]] | None:
        """Refuse by name; else the state to resume from, if there is one."""
        if self.roster is None:
            raise RosterError("this device has no roster yet: it knows nobody to share with")
        is_party = self._name in command.parties
        if is_party:
            self.policy.require_job("spdz-compute")
        if any(entry.owner == self._name for entry in command.rows):
            self.policy.require_job("spdz-data")
            if command.data is not None:
                self.policy.require_dataset(command.data.dataset, "spdz-data")
        if command.state_from == self._name:
            self.policy.require_job("spdz-model")
            if command.model is not None:
                self.policy.require_model(command.model)
        self.policy.require_plan(command.plan_id)
        require_session(self.policy.spdz, command, roster=self.roster, agent=self._name, server=self._server)
        if command.resume is None or not is_party:
            return None
        return self._journal.checkpoint(command.run, command.resume.session, command.resume.step)

    def _opened(
        self,
        command: m.SpdzOpen,
        asker: Asker,
        held: tuple[tuple[str, ...], tuple[Array, ...]] | None,
        outcome: Outcome,
    ) -> None:
        self._opening.discard(command.session)
        if isinstance(outcome, Failure):
            self._refuse(command.kind, asker, outcome.code, outcome.reason)
            return
        assert isinstance(outcome, Done)
        facts = outcome.result
        assert isinstance(facts, SpdzOpenFacts)
        if facts.digest != command.digest:
            self._refuse(command.kind, asker, CircuitDiffers.code, "the digests of the session differ")
            return
        session = Session(
            command,
            facts=facts,
            shelf=self._shelf,
            agent=self._name,
            server=self._server,
            port=self,
            executor=self._executor,
            journal=self._journal,
            loop=self._loop,
            held=held,
            keep_model=self._keep_model,
            on_over=lambda code, reason: self._over(command, code),
        )
        self._sessions[command.session] = session
        log.info(
            "event=session-open session=%s run=%s parties=%s security=%s", command.session.hex()[:8], command.run,
            ",".join(command.parties), command.security,
        )  # fmt: skip
        ready = m.SpdzReady(session=command.session, digest=facts.digest, correction_bytes=facts.correction_bytes)
        self._answer(asker, ready)
        self.on_change()

    def _over(self, command: m.SpdzOpen, code: str) -> None:
        self._sessions.pop(command.session, None)
        self.sessions_failed += bool(code)
        receivers = {output.receiver for output in command.outputs} - {OWNERS, self._server}
        provider = {command.state_from or self._server} - {self._server}
        peers = {*command.parties, *(entry.owner for entry in command.rows), *provider, *receivers} - {self._name}
        self._lingering[command.session] = sorted(peers)
        while len(self._lingering) > LINGER_MOST:
            self._hang_up(next(iter(self._lingering)))
        self._loop.call_at(self._loop.now_s() + LINGER_S, lambda: self._hang_up(command.session))
        self.on_change()

    def _hang_up(self, session: bytes) -> None:
        for name in self._lingering.pop(session, ()):
            if self._sender is not None:
                self._sender.end_context(name, session)

    # --- speaking --------------------------------------------------------------------------------------------------

    def tell(
        self, to: str, message: m.Message, *, context: bytes, on_outcome: Callable[[bool, str], None] | None = None
    ) -> None:
        """`Port`: what can't be sent is reported like what does not arrive."""
        if self._sender is None:
            raise LocalError("Room: attach an endpoint before messages arrive")
        try:
            # Nothing in a session's context is answered, so that none needs a number of its own.
            self._sender.send(to, message, correlation=context or None, context=context, on_outcome=on_outcome)
        except SordinoError as error:
            log.warning("event=not-sent kind=%s to=%s code=%s", message.kind, to, error.code)
            if on_outcome is not None:
                reason = str(error)
                # Not from inside: the caller is in the middle of something.
                self._loop.call_at(self._loop.now_s(), lambda: on_outcome(False, reason))

    def _answer(self, asker: Asker, message: m.Message) -> None:
        if self._sender is None:
            raise LocalError("Room: attach an endpoint before messages arrive")
        try:
            self._sender.send(asker.name, message, correlation=asker.correlation, context=asker.context)
        except SordinoError as error:
            log.warning("event=answer-lost kind=%s to=%s code=%s", message.kind, asker.name, error.code)

    def _tell_over(self, name: str, session: bytes) -> None:
        """Who speaks in a session that is not here (this device has restarted, say) need not wait for the deadline."""
        if len(session) != 16:
            return
        reason = f"the session is not open at {self._name}: it has restarted, or ended it"
        abort = m.SpdzAbort(session=session, code=UnknownSession.code, reason=reason)
        self.tell(name, abort, context=session)

    def _members(self, session: Session) -> set[str]:
        command = session.command
        readers = {output.receiver for output in command.outputs} - {OWNERS}
        provider = command.state_from or self._server
        return {self._server, command.dealer, *command.parties, *session.owners, provider, *readers}
