"""The agent under a service manager: readiness, reload, stop and watchdog of the real process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers_agent import TRAIN_PLAN, train_command
from helpers_daemon import AGENT, LIMIT_S, Home, make_home
from helpers_mosquitto import Mosquitto
from helpers_notify import Manager
from helpers_unit import Unit, started
from sordino_agent.status import read_status
from sordino_agent.status_line import low_disk
from sordino_common import messages as m
from sordino_common.daemon.state import StateProbe
from sordino_common.transport.reactor import Reactor


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path)


Start = Callable[..., Mosquitto]


@pytest.mark.mqtt
def test_a_life_in_notifications(home: Home, start_mosquitto: Start) -> None:
    with started(home, start_mosquitto()) as unit:
        manager, stage = unit.manager, unit.stage
        assert manager.status.startswith("pi-01 of demo; connected;")  # ready means: the broker has answered
        unit.until(lambda: stage.server.endpoint.online("pi-01"))
        assert isinstance(stage.ask(m.PlanPut(plan=TRAIN_PLAN)), m.PlanReady)
        unit.until(lambda: manager.status == "pi-01 of demo; connected; roster epoch 1; idle")

        home.edit("  plans: any", "  plans: some")
        unit.process.send_signal(signal.SIGHUP)
        unit.until(lambda: manager.count("READY=1") == 2)
        line = _line_of(home, "plans: some")
        assert manager.status.startswith(
            f"reload refused, the former configuration stays in force: {home.folder}/agent.yaml:{line}:3: policy.plans"
        )
        assert isinstance(stage.ask(train_command()), m.Trained)  # under the former policy

        home.edit("  plans: some", "  plans: []")
        home.edit("reconnect_least_s: 0.05", "reconnect_least_s: 0.06")
        unit.process.send_signal(signal.SIGHUP)
        unit.until(lambda: manager.count("READY=1") == 3)
        assert manager.status.startswith("restart to apply the new broker; pi-01 of demo")
        refused = stage.ask(train_command(round=2))
        assert isinstance(refused, m.Refused)
        assert refused.code == "policy"

        unit.process.send_signal(signal.SIGTERM)
        stage.until(lambda: unit.process.poll() is not None)
        assert unit.process.returncode == 0
        manager.read()
        assert manager.steps == ["READY=1", "RELOADING=1", "READY=1", "RELOADING=1", "READY=1", "STOPPING=1"]
        stopping = next(message for message in manager.messages if message[0] == "STOPPING=1")
        assert stopping[1] == "EXTEND_TIMEOUT_USEC=25000000"  # drain_s, the farewell, and some
        assert "stopped" in manager.status


def _line_of(home: Home, text: str) -> int:
    lines = (home.folder / "agent.yaml").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def test_ready_without_a_broker_says_so(home: Home) -> None:
    """A device that boots before its broker is up must not count as a service that failed to start."""
    with Reactor() as reactor, contextlib.closing(Unit(home, 1, reactor)) as unit:
        unit.until(lambda: unit.manager.count("READY=1"))
        assert unit.manager.status.startswith("pi-01 of demo; not connected: no connection to 127.0.0.1:1")
        unit.until(lambda: unit.fed > 2)  # and it is well


def test_a_bad_configuration_stays_in_the_status(home: Home) -> None:
    home.edit("min_rows: 10", "min_rows: ten")
    manager = Manager(home.folder / "notify")
    done = subprocess.run(
        [*AGENT, "run", str(home.folder)],
        env={**os.environ, **manager.environment()},
        capture_output=True,
        timeout=60,
        check=False,
    )
    manager.read()
    manager.close()
    assert done.returncode == 2
    assert manager.steps == []
    assert f"agent.yaml:{_line_of(home, 'min_rows: ten')}:3: policy.min_rows" in manager.status


@pytest.mark.mqtt
def test_a_stopped_worker_starves_nobody(home: Home, start_mosquitto: Start) -> None:
    """Tasks have their own time; while a worker uses it, or sleeps through it, the daemon is well."""
    home.edit("plan_seconds: 300", "plan_seconds: 2")
    with started(home, start_mosquitto()) as unit:
        stage = unit.stage
        unit.until(lambda: stage.server.endpoint.online("pi-01"))
        stage.ask(m.PlanPut(plan=TRAIN_PLAN))
        fed = unit.fed
        under_way = stage.server.endpoint.send("pi-01", train_command(steps=1 << 30))
        unit.until(lambda: (seen := read_status(home.state / "status.json")).running and seen.worker_pid)
        worker = read_status(home.state / "status.json").worker_pid
        assert worker is not None
        os.kill(worker, signal.SIGSTOP)
        refused = stage.answer(under_way)
        assert isinstance(refused, m.Refused)
        assert refused.code == "limit"
        assert unit.fed > fed + 2
        assert "UNWELL" not in "".join(line for message in unit.manager.messages for line in message)
        unit.until(lambda: not Path(f"/proc/{worker}").exists())
        again = stage.ask(train_command(round=2))
        assert isinstance(again, m.Trained)  # by a fresh worker


@pytest.mark.mqtt
def test_a_stuck_loop_starves_the_watchdog(home: Home, start_mosquitto: Start) -> None:
    """Stuck as it happens in the field: a write that blocks, here of the log into a pipe that nobody reads."""
    out, into = os.pipe()
    fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, 4096)
    with started(home, start_mosquitto(), stderr=into) as unit:
        os.close(into)
        unit.until(lambda: unit.fed > 2)
        home.edit("min_rows: 10", "min_rows: ten")

        def reload() -> bool:
            began, ended = unit.manager.count("RELOADING=1"), unit.manager.count("READY=1") - 1
            if began == ended:
                unit.process.send_signal(signal.SIGHUP)
            return began > ended and unit.starves()

        unit.until(reload)
        assert unit.starves()
        unit.process.send_signal(signal.SIGABRT)  # what systemd does then: the log says where it was stuck
        text = b""
        while data := os.read(out, 65_536):
            text += data
        assert unit.process.wait(LIMIT_S) == -signal.SIGABRT
        os.close(out)
    assert b"Fatal Python error: Aborted" in text
    assert b'service.py", line' in text


@pytest.mark.mqtt
def test_a_journal_that_is_gone_starves_the_watchdog(home: Home, start_mosquitto: Start) -> None:
    with started(home, start_mosquitto()) as unit:
        unit.until(lambda: unit.fed > 1)
        lock = sqlite3.connect(home.state / "ledger.sqlite", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        unit.until(lambda: "UNWELL: state: " in unit.manager.status)
        assert "ledger.sqlite can't be written: database is locked" in unit.manager.status
        assert unit.starves()
        lock.execute("ROLLBACK")
        lock.close()
        fed = unit.fed
        unit.until(lambda: unit.fed > fed and "UNWELL" not in unit.manager.status)
        (home.state / "sums.sqlite").rename(home.state / "aside")
        unit.until(lambda: "sums.sqlite: No such file or directory: it was removed" in unit.manager.status)
        assert unit.starves()


@pytest.mark.mqtt
@pytest.mark.slow
def test_an_idle_agent_wakes_for_nothing_but_keep_alive_and_watchdog(home: Home, start_mosquitto: Start) -> None:
    keepalive_s, watchdog_s, window_s = 6, 8.0, 16.0
    home.edit("port: 1\n", f"port: 1\n  keepalive_s: {keepalive_s}\n")
    home.edit("  # idle_s: 60", "  idle_s: 0")
    with started(home, start_mosquitto(), watchdog_s=watchdog_s) as unit:
        pid, reactor = unit.process.pid, unit.stage.reactor
        unit.until(lambda: unit.stage.server.endpoint.online("pi-01"))
        unit.until(lambda: read_status(home.state / "status.json").datasets)
        unit.until(lambda: Path(f"/proc/{pid}/task/{pid}/children").read_text() == "")

        def sleeps() -> int:
            text = Path(f"/proc/{pid}/status").read_text()
            return int(text.split("voluntary_ctxt_switches:")[1].split()[0])

        reactor.run_until(lambda: False, deadline_s=reactor.now_s() + 5.0)  # what the start has left to do
        before = sleeps()
        reactor.run_until(lambda: False, deadline_s=reactor.now_s() + window_s)
        # A look at the keep-alive every third of it, a ping and its answer, and beats; some for pages and the status.
        expected = window_s * (3 / keepalive_s + 2 / keepalive_s + 2 / watchdog_s)
        assert sleeps() - before <= 1.5 * expected


# --- the probes --------------------------------------------------------------------------------------------------


def test_the_state_probe_finds_what_was_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    sqlite3.connect(path).close()
    path.touch()
    probe = StateProbe(tmp_path, [path])
    assert probe() is None
    path.rename(tmp_path / "old")
    path.write_bytes(b"")
    assert probe() == f"{path} is not the file that was opened: it was replaced under the running process"
    path.unlink()
    assert "was removed under the running process" in str(probe())
    (tmp_path / "old").rename(path)
    assert probe() is None
    path.write_bytes(b"no database" * 100)
    assert "file is not a database" in str(probe())


def test_a_state_folder_that_is_read_only_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = StateProbe(tmp_path / "gone", [])
    assert probe() == f"{tmp_path / 'gone'} can't be written"


def test_little_room_is_a_note_and_no_complaint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 5 << 10}))
    assert low_disk(tmp_path) == f"5 KiB free in {tmp_path}: what must be journalled is refused"
    monkeypatch.undo()
    assert low_disk(tmp_path) is None
