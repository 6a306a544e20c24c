"""The room where this device's sessions on shares are held: who may open one, and which message is for which.

    spdz-open   from the server: policy by name, burnt on disk, lowered in the worker, digests compared: spdz-ready
    spdz-step   from the server, in a stepwise session: policy by name, what it takes is here: spdz-taken
    all else    to the session that it names (or whose context it comes in), if its sender is of it

A member that breaks the protocol ends the session, and is named. Somebody who is no member changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from sordino_agent.desk import Asker
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

log = logging.getLogger("sordino.agent")

LINGER_S: Final = 10.0  # how long a session's channels stay, for what was said last
LINGER_MOST: Final = 8  # sessions whose channels stay: an endpoint has few, and somebody may open many short sessions
KINDS: Final = (
    m.SpdzOpen, m.SpdzSetup, m.SpdzCorrection, m.SpdzState, m.SpdzInput, m.SpdzShares, m.SpdzOutputs, m.SpdzMasks,
    m.SpdzStep, m.SpdzConfirm, m.SpdzRestart, m.SpdzAbort, m.SpdzClose,
)  # fmt: skip


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

    def on_message(self, message: m.Message, asker: Asker) -> None:
        """Raises for what is refused; the caller answers a refused command of the server, and nothing else."""
        if isinstance(message, m.SpdzOpen):
            self._open(message, asker)
            return
        from_agent = isinstance(message, m.SpdzState) and asker.name != self._server
        if from_agent or isinstance(message, m.SpdzInput | m.SpdzShares | m.SpdzOutputs):
            self._from_peer(message, asker)
            return
        session = self._sessions.get(getattr(message, "session", b""))
        if session is None:
            if isinstance(message, m.SpdzAbort):
                return  # it is over here, too
            raise UnknownSession(f"{message.kind}: this session is not open here")
        if isinstance(message, m.SpdzAbort):
            if asker.name not in self._members(session):
                raise PolicyRefusal(f"{asker.name} is no member of the session that it wants to end")
            session.on_abort(asker.name, message)
            return
        if isinstance(message, m.SpdzStep):
            self._from_server(session, message, asker)
            return
        try:
            self._from_above(session, message, asker)
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

    def _from_server(self, session: Session, message: m.SpdzStep, asker: Asker) -> None:
        """What this device does not allow, or has not, is refused, and the session goes on without that step."""
        if asker.name != self._server:
            raise PolicyRefusal(f"{message.kind} comes from {self._server} only, not from {asker.name}")
        try:
            session.on_step(message)
        except (ProtocolError, EquivocationError) as error:
            session.fail(error)
            raise
        self._answer(asker, m.SpdzTaken(session=message.session, step=message.step))

    def _from_above(self, session: Session, message: m.Message, asker: Asker) -> None:
        match message:
            case m.SpdzSetup():
                session.on_setup(asker.name, message)
            case m.SpdzCorrection():
                session.on_correction(asker.name, message)
            case m.SpdzState():
                session.on_state(asker.name, message)
            case m.SpdzMasks():
                session.on_masks(asker.name, message)
            case m.SpdzConfirm() | m.SpdzRestart() | m.SpdzClose():
                if asker.name != self._server:
                    raise PolicyRefusal(f"{message.kind} comes from {self._server} only, not from {asker.name}")
                match message:
                    case m.SpdzConfirm():
                        session.on_confirm(message)
                    case m.SpdzRestart():
                        session.on_restart(message)
                    case m.SpdzClose():
                        session.on_close(lambda closed: self._answer(asker, closed))
            case _:
                raise LocalError(f"{message.kind} in the room for shares")

    def _from_peer(self, message: m.Message, asker: Asker) -> None:
        """Only in the session's own context: no other channel's keys are bound to it."""
        if asker.name == self._server:
            raise PolicyRefusal(f"{message.kind} from the server: it must never hold, nor send, masked values")
        session = self._sessions.get(asker.context)
        if session is None:
            if asker.context:
                self._tell_over(asker)
            raise UnknownSession(f"{message.kind} of {asker.name} in a context that is no open session's")
        try:
            match message:
                case m.SpdzState():
                    session.on_state(asker.name, message)
                case m.SpdzInput():
                    session.on_input(asker.name, message)
                case m.SpdzShares():
                    session.on_shares(asker.name, message)
                case m.SpdzOutputs():
                    session.on_outputs(asker.name, message)
        except PolicyRefusal:
            raise
        except SordinoError as error:
            session.fail(error)

    # --- opening ---------------------------------------------------------------------------------------------------

    def _open(self, command: m.SpdzOpen, asker: Asker) -> None:
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
            self._sender.send(to, message, context=context, on_outcome=on_outcome)
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

    def _tell_over(self, asker: Asker) -> None:
        """Who speaks in a session that is not here (this device has restarted, say) need not wait for the deadline."""
        if len(asker.context) != 16:
            return
        reason = f"the session is not open at {self._name}: it has restarted, or ended it"
        abort = m.SpdzAbort(session=asker.context, code=UnknownSession.code, reason=reason)
        self.tell(asker.name, abort, context=asker.context)

    def _members(self, session: Session) -> set[str]:
        command = session.command
        readers = {output.receiver for output in command.outputs} - {OWNERS}
        provider = command.state_from or self._server
        return {self._server, command.dealer, *command.parties, *session.owners, provider, *readers}
