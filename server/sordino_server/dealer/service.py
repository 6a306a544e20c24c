"""A dealer on a host of its own: an endpoint's handler that deals for sessions, and sees nothing but masks.

    server -> dealer   plan-put, spdz-open (it lowers the Plan itself and compares digests), spdz-confirm, spdz-restart,
                       spdz-close
    dealer -> members  spdz-setup, once the server has confirmed the beginning; spdz-correction, ahead of the steps
    parties -> dealer  spdz-checked: only when all of them have checked do the masks of outputs leave, each to its
                       receiver, and masks of checkpoints go to disk
    dealer -> server   spdz-checked, when that is done

It deals at most one step per turn of the loop, when one is due (`pace`). A dealer that restarts has lost its sessions;
the checkpoints it has kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from sordino_common import messages as m
from sordino_common.channel.roster import Roster
from sordino_common.clock import Loop, Timer
from sordino_common.errors import LimitExceeded, PolicyRefusal, RemoteError, RosterError, SordinoError
from sordino_common.plan.plan import decode_plan, plan_id
from sordino_common.spdz.errors import EquivocationError, ProtocolError
from sordino_common.spdz.layout import layout_of
from sordino_common.spdz.lowering import lower
from sordino_common.spdz.opening import settings_of, spec_of
from sordino_common.spdz.spec import SessionSpec
from sordino_server.dealer.desk import DealerDesk, readers_of, releases
from sordino_server.dealer.masks import MaskStore

log = logging.getLogger("sordino.dealer")
I64 = npt.NDArray[np.int64]
MOST_PLANS: Final = 16
MOST_SESSIONS: Final = 8
_REASON_CHARS: Final = 1000


class Incoming(Protocol):
    """What an endpoint delivers (`sordino_common.transport.endpoint.Incoming`)."""

    @property
    def sender(self) -> str: ...
    @property
    def message(self) -> m.Message: ...
    @property
    def correlation(self) -> bytes: ...
    @property
    def context(self) -> bytes: ...


class Sender(Protocol):
    """What the service needs of an endpoint."""

    def send(
        self,
        to: str,
        message: m.Message,
        *,
        correlation: bytes | None = None,
        context: bytes = b"",
        on_outcome: Callable[[bool, str], None] | None = None,
    ) -> bytes: ...


class DealerService:
    """See the module's text. `stopwatch`: real time; `dealing`: further arguments of `DealerDesk`."""

    def __init__(
        self,
        *,
        name: str,
        server: str,
        loop: Loop,
        store: MaskStore,
        random: Callable[[int], bytes],
        stopwatch: Callable[[], float],
        dealing: Mapping[str, Any] | None = None,
    ) -> None:
        self.name: Final = name
        self.roster: Roster | None = None
        self.connected = False
        self.reason = ""
        self.refusals = 0
        self._server = server
        self._loop = loop
        self._store = store
        self._random = random
        self._stopwatch = stopwatch
        self._dealing = dict(dealing or {})
        self._sender: Sender | None = None
        self._plans: dict[bytes, bytes] = {}
        self._sessions: dict[bytes, _Session] = {}
        self._server_boot = -1
        self._on_change: Callable[[], None] = lambda: None

    def watch(self, on_change: Callable[[], None]) -> None:
        """Call `on_change` when the connection came or went."""
        self._on_change = on_change

    def attach(self, sender: Sender) -> None:
        self._sender = sender

    @property
    def sessions(self) -> int:
        return len(self._sessions)

    # --- EndpointHandler -------------------------------------------------------------------------------------------

    def on_message(self, incoming: Incoming) -> None:
        try:
            self._take(incoming)
        except SordinoError as error:
            self.refusals += 1
            log.warning("event=refused kind=%s from=%s code=%s", incoming.message.kind, incoming.sender, error.code)
            if incoming.sender == self._server and isinstance(incoming.message, m.SpdzOpen | m.PlanPut | m.SpdzClose):
                refused = m.Refused(command=incoming.message.kind, code=error.code, reason=str(error)[:_REASON_CHARS])
                self._answer(incoming, refused)

    def on_presence(self, name: str, online: bool, boot: int) -> None:
        if name == self._server and online:
            if -1 < self._server_boot < boot:
                self._sessions.clear()
            self._server_boot = boot

    def on_connection(self, connected: bool, reason: str) -> None:
        self.connected, self.reason = connected, reason
        log.info("event=connection connected=%s reason=%r", connected, reason)
        self._on_change()

    def on_roster(self, roster: Roster) -> None:
        self.roster = roster

    def on_refusal(self, sender: str, error: RemoteError) -> None:
        self.refusals += 1

    # --- what comes ------------------------------------------------------------------------------------------------

    def _take(self, incoming: Incoming) -> None:
        message, sender = incoming.message, incoming.sender
        match message:
            case m.PlanPut():
                self._require_server(sender)
                self._answer(incoming, self._keep_plan(message))
            case m.SpdzOpen():
                self._require_server(sender)
                self._answer(incoming, self._open(message))
            case m.SpdzConfirm() | m.SpdzRestart() | m.SpdzClose():
                self._require_server(sender)
                self._guided(incoming, self._session(message.session), message)
            case m.SpdzChecked():
                session = self._session(message.session)
                if sender not in session.command.parties:
                    raise PolicyRefusal(f"{sender} is no party of the session")
                try:
                    session.on_checked(sender, message)
                except EquivocationError as error:
                    self._give_up(session, error)
                    raise
            case m.SpdzAbort():
                found = self._sessions.get(message.session)
                if found is not None and sender in found.everybody | {self._server}:
                    del self._sessions[message.session]
                    found.close()
            case _:
                raise PolicyRefusal(f"a dealer takes no {message.kind}")

    def _give_up(self, session: _Session, error: RemoteError) -> None:
        """End the session, and say so to all of it."""
        del self._sessions[session.command.session]
        session.close()
        abort = m.SpdzAbort(session=session.command.session, code=error.code, reason=str(error)[:_REASON_CHARS])
        for name in sorted({self._server, *session.everybody}):
            self._send(name, abort)

    def _guided(
        self, incoming: Incoming, session: _Session, message: m.SpdzConfirm | m.SpdzRestart | m.SpdzClose
    ) -> None:
        match message:
            case m.SpdzConfirm():
                session.on_confirm(message.step)
            case m.SpdzRestart():
                session.on_restart(message)
            case m.SpdzClose():
                del self._sessions[message.session]
                session.close()
                desk = session.desk
                counters = m.SpdzCounters(opened_bytes=desk.nbytes, compute_s=desk.seconds)
                self._answer(
                    incoming, m.SpdzClosed(session=message.session, counters=counters, rows=0, names=(), sums=())
                )

    def _require_server(self, sender: str) -> None:
        if sender != self._server:
            raise PolicyRefusal(f"commands are taken from {self._server!r} only, this came from {sender!r}")

    def _keep_plan(self, message: m.PlanPut) -> m.PlanReady:
        decode_plan(message.plan)
        key = plan_id(message.plan)
        self._plans[key] = message.plan
        while len(self._plans) > MOST_PLANS:
            self._plans.pop(next(iter(self._plans)))
        return m.PlanReady(plan_id=key, peak_bytes=0, flops=0)

    def _open(self, command: m.SpdzOpen) -> m.SpdzReady:
        """Refuse by name what would have the masks meet a masked value, or does not fit."""
        if self.roster is None:
            raise RosterError("this dealer has no roster yet")
        if command.idle_s is not None:
            raise PolicyRefusal("a stepwise session is dealt for by who says its steps, not by a dealer of its own")
        owners = {entry.owner for entry in command.rows}
        if command.dealer != self.name or "dealer" not in self.roster.entry(self.name).roles:
            raise PolicyRefusal(f"{self.name} is not the dealer of this session, or not by its roster")
        provider = {command.state_from or self._server} - {self._server}
        readers = set(readers_of(command)) - {self._server}
        for name in (*command.parties, *sorted(owners | provider | readers)):
            if name in (self.name, self._server):
                raise PolicyRefusal(f"{name} deals or orchestrates: it must not hold masked values")
        if command.session in self._sessions:
            raise PolicyRefusal(f"session {command.session.hex()} is open here already")
        for old in [one for one in self._sessions.values() if one.command.run == command.run]:
            del self._sessions[old.command.session]
            old.close()
        if len(self._sessions) >= MOST_SESSIONS:
            raise LimitExceeded(f"{len(self._sessions)} sessions are dealt for, as many as a dealer takes")
        if command.plan_id not in self._plans:
            raise PolicyRefusal(f"Plan {command.plan_id.hex()} is not here; put it first")
        plan = decode_plan(self._plans[command.plan_id])
        lowered = lower(plan, plan_id=command.plan_id, settings=settings_of(command.settings))
        spec = spec_of(command, lowered.circuit, lowered.digest)
        if lowered.digest != command.circuit or spec.digest != command.digest:
            raise ProtocolError("this dealer lowers the Plan to another circuit than the server says")
        masks = None
        if command.resume is not None:
            masks = self._store.load(command.run, command.resume.session, command.resume.step)
        desk = DealerDesk(command, spec, random=self._random, masks=masks, stopwatch=self._stopwatch, **self._dealing)
        self._sessions[command.session] = _Session(
            command, spec, desk, server=self._server, loop=self._loop, store=self._store, send=self._send
        )
        nbytes = layout_of(lowered.circuit).preprocessing_bytes(active=spec.active)
        return m.SpdzReady(session=command.session, digest=spec.digest, correction_bytes=nbytes)

    def _session(self, session: bytes) -> _Session:
        found = self._sessions.get(session)
        if found is None:
            raise ProtocolError(f"session {session.hex()} is not open here")
        return found

    def _send(self, to: str, message: m.Message) -> None:
        if self._sender is not None:
            try:
                self._sender.send(to, message)
            except SordinoError as error:  # its receiver will miss it, and say so
                log.warning("event=not-sent kind=%s to=%s code=%s", message.kind, to, error.code)

    def _answer(self, incoming: Incoming, message: m.Message) -> None:
        if self._sender is not None:
            self._sender.send(incoming.sender, message, correlation=incoming.correlation, context=incoming.context)


class _Session:
    """One session that this dealer deals for."""

    def __init__(
        self,
        command: m.SpdzOpen,
        spec: SessionSpec,
        desk: DealerDesk,
        *,
        server: str,
        loop: Loop,
        store: MaskStore,
        send: Callable[[str, m.Message], None],
    ) -> None:
        self.command: Final = command
        self.desk: Final = desk
        owners = (entry.owner for entry in command.rows)
        self.everybody: Final = {*command.parties, *owners, command.state_from or server, *readers_of(command)}
        self._spec = spec
        self._server = server
        self._loop = loop
        self._store = store
        self._send = send
        self._checked = dict.fromkeys(command.parties, command.first_step)
        self._released = command.first_step
        self._checkpoint = 0
        self._begun = False
        self._timer: Timer | None = None

    def on_confirm(self, step: int) -> None:
        """The first one says that all are ready: everybody gets its secrets. Each lets the dealing run ahead."""
        if not self._begun:
            self._begun = True
            for name, setup in self.desk.setups().items():
                self._send(name, setup)
        if step > self._released:
            raise ProtocolError(f"{step} steps confirmed, but the parties have checked {self._released}")
        self.desk.confirm(step)
        if self._checkpoint and step >= self._checkpoint:
            self._store.forget_before(self.command.run, self.command.session, self._checkpoint)
        self._deal_when_due()

    def on_restart(self, message: m.SpdzRestart) -> None:
        if message.step < self._released:
            raise ProtocolError(f"step {message.step} is to run again, but the parties have checked {self._released}")
        self.desk.rewind(message.step, message.attempt)
        self._deal_when_due()

    def on_checked(self, party: str, message: m.SpdzChecked) -> None:
        """All parties' word, not the server's, is what lets a mask leave; and that they were told what we were told."""
        step = message.step
        if message.terms != m.terms_of(self.command):
            raise EquivocationError(
                f"{party} was told other terms of this session than {self.command.dealer}, who deals: the server lies "
                "to one of them"
            )
        if not self._checked[party] <= step <= min(self.command.steps, self.desk.dealt):
            raise ProtocolError(f"{party} tells of {step} steps checked, which can't be")
        self._checked[party] = step
        done = min(self._checked.values())
        if done <= self._released:
            return
        for output in self.command.outputs:
            released = releases(
                output, self.command, self._spec, (self._released, done),
                outputs=self._outputs, model=self._model,
            )  # fmt: skip
            for receiver, at, masks in released:
                self._send(receiver, self.desk.masks_for(at, masks))
        for point in self.command.checkpoints:
            if self._released < point <= done:
                self._store.save(self.command.run, self.command.session, point, self.desk.state(point))
                self._checkpoint = point
        self._released = done
        report = m.SpdzChecked(session=self.command.session, step=done, checkpoint=self._checkpoint, outputs=())
        self._send(self._server, report)

    def close(self) -> None:
        """Nothing is dealt, unless somebody asks again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _outputs(self, step: int, names: tuple[str, ...]) -> Mapping[str, I64]:
        masks = self.desk.output_masks(step)
        return {name: masks[name] for name in names}

    def _model(self, done: int, names: tuple[str, ...]) -> Mapping[str, I64]:
        masks = self.desk.state(done)
        return {name: masks[name] for name in names}

    def _deal_when_due(self) -> None:
        """When that is, changes with every confirmation and restart."""
        self.close()
        now_s = self._loop.now_s()
        wait_s = self.desk.wait_s(now_s) if self._begun else None
        if wait_s is not None:
            self._timer = self._loop.call_at(now_s + wait_s, self._deal)

    def _deal(self) -> None:
        name, corrections = self.desk.deal()
        for correction in corrections:
            self._send(name, correction)
        self._deal_when_due()
