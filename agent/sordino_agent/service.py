"""The daemon: endpoint, core and executor on one reactor. Starts, reloads on SIGHUP, drains on SIGTERM and SIGINT.

Imports no NumPy: what computes is a worker process that comes and goes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from sordino_agent import __version__
from sordino_agent.aggregate.journal import SumJournal
from sordino_agent.budget import Spent
from sordino_agent.config import (
    BOOT_FILE,
    JOURNAL_FILE,
    LEDGER_FILE,
    MODELS_FOLDER,
    ROSTER_FILE,
    STATUS_FILE,
    SUMS_FILE,
    LoadedConfig,
    is_enrolled,
    load_agent_config,
)
from sordino_agent.core import NOT_YET, AgentCore
from sordino_agent.errors import LedgerError
from sordino_agent.ledger import Account, Ledger
from sordino_agent.occupied import occupied
from sordino_agent.pipe import WorkerSetup
from sordino_agent.policy import Limits
from sordino_agent.process import ProcessExecutor
from sordino_agent.renewal import Renewal
from sordino_agent.spdz.journal import BurnJournal
from sordino_agent.status import DatasetStatus, Status, resident_bytes, write_status
from sordino_agent.status_line import low_disk, status_line
from sordino_agent.store import TensorStore
from sordino_common.channel.boot import next_boot
from sordino_common.channel.files import write_atomically
from sordino_common.channel.roster import RosterBook
from sordino_common.clock import Timer
from sordino_common.daemon.collector import old_set_aside
from sordino_common.daemon.liveness import Liveness
from sordino_common.daemon.notify import Notifier
from sordino_common.daemon.signals import STOPS, Signals
from sordino_common.daemon.state import StateProbe
from sordino_common.errors import ConfigError, LocalError, RosterError, SordinoError
from sordino_common.transport.base import Transport
from sordino_common.transport.endpoint import Endpoint
from sordino_common.transport.mqtt import MqttTransport
from sordino_common.transport.reactor import Reactor
from sordino_common.transport.settings import MIB, LinkSettings

log = logging.getLogger("sordino.agent")

STATUS_EVERY_S: Final = 60.0  # while nothing changes
STATUS_LEAST_S: Final = 2.0  # between two writes, however much changes
FAREWELL_S: Final = 5.0  # for answers that are under way when the agent stops
_LEAVE_S: Final = 10.0  # beyond both: closing databases and connection on a slow card
# What a reload can't change: it was built into what runs.
FIXED: Final = ("agent", "operator_key", "device_key", "roster", "broker", "broker_password_file", "limits", "executor")


class Service:
    """One agent, from `open` until `closed`. `transport` is a parameter so that tests can do without a broker."""

    def __init__(
        self,
        loaded: LoadedConfig,
        reactor: Reactor,
        *,
        transport: Transport | None = None,
        notifier: Notifier | None = None,
    ) -> None:
        """Reads key and roster, counts the boot. Raises `ConfigError` and, for a bad roster, `RemoteError`s."""
        self._loaded = loaded
        self._reactor = reactor
        self._notifier = notifier or Notifier()
        config = loaded.config
        identity = loaded.device_key()
        self._book = roster_book(loaded, wall_s=reactor.wall_s)
        broker = loaded.broker()
        self._boot = next_boot(loaded.state_file(BOOT_FILE))
        self._executor = ProcessExecutor(
            reactor,
            setup=worker_setup(loaded),
            limit_s=config.limits.plan_seconds,
            answer_bytes=config.limits.payload_bytes,
            threads=config.limits.threads,
            idle_s=config.limits.idle_s,
        )
        self._journal = BurnJournal(loaded.state_file(JOURNAL_FILE))
        self._ledger = Ledger(loaded.state_file(LEDGER_FILE), budgets=loaded.budgets(), wall_s=reactor.wall_s)
        self._sums = SumJournal(loaded.state_file(SUMS_FILE))
        self.core: Final = AgentCore(
            name=config.agent.name,
            server=config.agent.server,
            policy=config.policy,
            limits=config.limits,
            executor=self._executor,
            store=TensorStore(budget_bytes=config.limits.store_bytes),
            loop=reactor,
            version=__version__,
            journal=self._journal,
            ledger=self._ledger,
            sums=self._sums,
            identity=identity,
            keep_model=self._keep_model,
            executor_name=config.executor,
            resident_bytes=resident_bytes,
        )
        self._endpoint = Endpoint(
            name=config.agent.name,
            identity=identity,
            roster=self._book,
            fleet=config.agent.fleet,
            server=config.agent.server,
            boot=self._boot,
            transport=transport or MqttTransport(broker, reactor),
            loop=reactor,
            handler=self.core,
            version=__version__,
            settings=link_settings(config.limits),
        )
        self.core.attach(self._endpoint)
        self.core.watch(self._changed)
        self._state = "starting"
        self._started_s = reactor.wall_s()
        self._told_ready = False
        self._told_complaint: str | None = None
        self._reload_note = ""
        self._liveness = Liveness(
            reactor,
            self._notifier,
            probes={
                "state": StateProbe(
                    loaded.state_dir, [loaded.state_file(name) for name in (JOURNAL_FILE, LEDGER_FILE, SUMS_FILE)]
                ),
                "worker": self._executor.overdue,
            },
            on_beat=self._beat,
        )
        self._renewal = Renewal(reactor, loaded.path) if is_enrolled(loaded) else None
        self._status_timer: Timer | None = None
        self._status_due_s = 0.0
        self._spent: Mapping[Account, Spent] = {}
        log.info(
            "event=start name=%s fleet=%s boot=%d version=%s key=%s broker=%s:%d",
            config.agent.name,
            config.agent.fleet,
            self._boot,
            __version__,
            identity.fingerprint,
            broker.host,
            broker.port,
        )

    def open(self) -> None:
        """Connect, and have the datasets described."""
        if self._book.current is not None:
            self.core.on_roster(self._book.current)
        self._state = "running"
        self.core.start()
        if self._renewal is not None:
            self._renewal.start()
        self._endpoint.open()
        self._liveness.start()
        self._write_status()

    @property
    def closed(self) -> bool:
        return self._endpoint.closed

    def until_closed(self, signals: Signals) -> Callable[[], bool]:
        """What the loop asks at every turn: heeds the signals that came, and says whether it is `closed`."""
        endpoint = self._endpoint

        def done() -> bool:
            if signals.arrived:
                self._heed(signals.taken())
            return endpoint.closed

        return done

    def _heed(self, numbers: Sequence[signal.Signals]) -> None:
        for number in numbers:
            if number == signal.SIGHUP:
                self.reload()
            else:
                self.stop(number.name)

    def stop(self, reason: str) -> None:
        """Take no new work, finish what runs within `drain_s`, then cancel it, say goodbye, and be `closed`."""
        if self._state == "draining":
            return
        self._state = "draining"
        log.info("event=drain reason=%s running=%d", reason, len(self.core.running))
        self._notifier.stopping(self._loaded.config.drain_s + FAREWELL_S + _LEAVE_S)
        deadline = self._reactor.call_at(self._reactor.now_s() + self._loaded.config.drain_s, self.core.cancel_all)

        def leave() -> None:
            deadline.cancel()
            self._endpoint.close(drain_s=FAREWELL_S)

        self._write_status()
        self.core.drain(leave)

    def finish(self) -> None:
        """After `closed`: end the worker, and say in the status file that nobody is there any more."""
        self._liveness.stop()
        if self._renewal is not None:
            self._renewal.close()
        self._executor.close()
        self._journal.close()
        self._ledger.close()
        self._sums.close()
        self._state = "stopped"
        self._write_status(last=True)
        log.info("event=stopped")

    def _keep_model(self, run: str, file: bytes) -> None:
        """A model that opened to this agent: `models/<run>.npz` in the state directory, a parameter per entry."""
        folder = self._loaded.state_file(MODELS_FOLDER)
        try:
            folder.mkdir(exist_ok=True)
            write_atomically(folder / f"{run}.npz", file, mode=0o600)
        except OSError as error:
            raise LocalError(f"{folder}: the model can't be written: {error.strerror}") from None
        log.info("event=model-received run=%s file=%s", run, folder / f"{run}.npz")

    def reload(self) -> None:
        """Policy, datasets, models and drain_s from the file again. A bad file changes nothing: it is said in log and
        status, and what ran goes on. What can't be changed in a running agent keeps its value, and that is said too."""
        self._notifier.reloading()
        self._reload_note = self._reload()
        self._write_status()
        self._notifier.ready()

    def _reload(self) -> str:
        """What the status has to say about it."""
        running = self._loaded.config
        try:
            loaded = load_agent_config(self._loaded.path)
        except ConfigError as error:
            log.error("event=reload-failed reason=%r", str(error))  # noqa: TRY400  the text says it all
            return f"reload refused, the former configuration stays in force: {error}"
        fixed = [name for name in FIXED if getattr(running, name) != getattr(loaded.config, name)]
        kept = {name: getattr(running, name) for name in FIXED}
        self._loaded = loaded.with_config(msgspec.structs.replace(loaded.config, **kept))
        self._executor.replace_setup(worker_setup(self._loaded))
        self.core.reconfigure(loaded.config.policy, loaded.budgets())
        log.info("event=reloaded datasets=%d", len(loaded.config.datasets))
        if fixed:
            log.warning("event=reload-needs-restart sections=%s", ",".join(fixed))
            return f"restart to apply the new {', '.join(fixed)}"
        return ""

    # --- status ----------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        config = self._loaded.config
        health = self.core.health()
        described = self.core.datasets
        traffic = self._endpoint.counters.total
        roster = self._book.current
        return Status(
            name=config.agent.name,
            fleet=config.agent.fleet,
            server=config.agent.server,
            version=__version__,
            state=self._state,
            pid=os.getpid(),
            boot=self._boot,
            started_s=self._started_s,
            updated_s=self._reactor.wall_s(),
            connected=self.core.connected,
            connection=self.core.connection_reason,
            server_online=self._endpoint.online(config.agent.server),
            server_unlike=self._endpoint.unlike().get(config.agent.server, ""),
            roster_epoch=roster.epoch if roster is not None else None,
            executor=config.executor,
            worker_pid=self._executor.worker_pid,
            running=self.core.running,
            tasks_done=health.tasks_done,
            tasks_failed=health.tasks_failed,
            refusals=health.refusals,
            plans=health.plans,
            store_used_bytes=health.store_used_bytes,
            resident_bytes=health.resident_bytes,
            bytes_sent=traffic.packet_bytes_sent,
            bytes_received=traffic.packet_bytes_received,
            datasets=None
            if described is None
            else tuple(
                DatasetStatus(name=info.name, train_rows=info.train_rows, test_rows=info.test_rows)
                for info in described.datasets
            ),
            datasets_unreadable=() if described is None else tuple(problem.dataset for problem in described.problems),
        )

    def _changed(self) -> None:
        """Write soon, but not more often than every `STATUS_LEAST_S`."""
        if not self._told_ready and (self.core.connected or self.core.connection_reason != NOT_YET):
            # The broker has answered, or can't be reached, which the status tells: the agent serves as far as it can.
            self._told_ready = True
            self._write_status()
            self._notifier.ready()
        else:
            self._set_status_timer(max(self._reactor.now_s(), self._status_due_s))

    def _beat(self, complaint: str | None) -> None:
        """With the watchdog's beats coming, the status needs no timer of its own while nothing changes."""
        since_s = self._reactor.now_s() + STATUS_LEAST_S - self._status_due_s
        if complaint != self._told_complaint or since_s >= STATUS_EVERY_S:
            self._told_complaint = complaint
            self._write_status()

    def _write_status(self, *, last: bool = False) -> None:
        status = self.status()
        try:
            write_status(self._loaded.state_file(STATUS_FILE), status)
        except OSError as error:  # a full disk must not end the daemon
            log.warning("event=status-not-written reason=%r", error.strerror)
        self._write_metrics(last=last)
        self._tell(status)
        self._status_due_s = self._reactor.now_s() + STATUS_LEAST_S
        if self._status_timer is not None:
            self._status_timer.cancel()
            self._status_timer = None
        if not last and self._liveness.interval_s is None:
            self._set_status_timer(self._reactor.now_s() + STATUS_EVERY_S)

    def _tell(self, status: Status) -> None:
        if self._notifier.listened:
            notes = [self._reload_note] if self._reload_note else []
            with contextlib.suppress(OSError):  # the folder is gone: the probe says so
                notes += filter(None, [low_disk(self._loaded.state_dir)])
            self._notifier.status(status_line(status, complaint=self._liveness.complaint, notes=notes))

    def _write_metrics(self, *, last: bool) -> None:
        file = self._loaded.config.metrics_file
        if file is None:
            return
        from sordino_agent.metrics import exposition, write_metrics  # half a megabyte that most devices don't need

        path = self._loaded.resolve(file)
        try:
            if not last:  # then the ledger is closed, and nothing was spent since
                self._spent = self._ledger.spent()
            write_metrics(path, exposition(self.status(), self._spent, self._loaded.budgets()))
        except (OSError, LedgerError) as error:
            log.warning("event=metrics-not-written path=%s reason=%r", path, str(error))

    def _set_status_timer(self, when_s: float) -> None:
        if self._status_timer is not None:
            self._status_timer.cancel()
        self._status_timer = self._reactor.call_at(when_s, self._write_status)


def run(loaded: LoadedConfig, notifier: Notifier | None = None) -> int:
    """Be the daemon until a signal says otherwise. Returns the exit code."""
    # The watchdog's SIGABRT, or a fault in a library, leaves in the log where each thread was. No values.
    with contextlib.suppress(io.UnsupportedOperation):  # stderr is no file: somebody's test, or an embedding program
        faulthandler.enable(sys.stderr)
    with occupied(loaded.state_dir), Reactor() as reactor:
        service = Service(loaded, reactor, notifier=notifier)
        with Signals(reactor, (*STOPS, signal.SIGHUP)) as signals:
            try:
                service.open()
                with old_set_aside():
                    reactor.run_until(service.until_closed(signals), deadline_s=float("inf"))
            finally:
                service.finish()
    return 0


def worker_setup(loaded: LoadedConfig) -> WorkerSetup:
    return WorkerSetup(
        datasets=loaded.datasets(),
        executor=loaded.config.executor,
        memory_bytes=loaded.config.limits.memory_bytes,
        models=loaded.models(),
    )


def link_settings(limits: Limits) -> LinkSettings:
    """Bounds of a small device: one command of the largest size may arrive while an answer leaves."""
    message_bytes = max(limits.payload_bytes, limits.plans_bytes // 2) + MIB
    return LinkSettings(
        max_message_bytes=message_bytes,
        reassembly_bytes=message_bytes + message_bytes // 2,
        encoded_bytes=message_bytes,
        queue_bytes=2 * message_bytes + limits.results_bytes,
    )


def roster_book(loaded: LoadedConfig, *, wall_s: Callable[[], float], persist: bool = True) -> RosterBook:
    """The newest roster that this device has seen: the one in `state_dir`, or the configured one if that is newer.

    Without `persist` nothing is written. Raises `ConfigError` and, for a bad roster, `RemoteError`s."""
    stored = loaded.state_file(ROSTER_FILE)
    book = RosterBook(
        fleet=loaded.config.agent.fleet,
        operator_key=loaded.operator_key(),
        wall_s=wall_s,
        path=stored if persist else None,
    )
    if not persist and stored.exists():
        book.accept(stored.read_bytes())
    if loaded.config.roster is None:
        return book
    path = loaded.resolve(loaded.config.roster)
    try:
        signed = path.read_bytes()
    except OSError as error:
        raise loaded.error(("roster",), f"{path}: can't be read: {error.strerror}") from None
    try:
        book.accept(signed)
    except RosterError as error:
        if book.current is None:
            raise
        log.info("event=roster-file-ignored path=%s reason=%r", path, str(error))
    except SordinoError as error:
        raise type(error)(f"{path}: {error}") from None
    return book
