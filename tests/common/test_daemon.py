"""Readiness protocol, watchdog and signals of a daemon, against a socket like systemd's."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers_notify import Manager
from sordino_common.daemon.liveness import Liveness
from sordino_common.daemon.notify import Notifier
from sordino_common.daemon.signals import Signals
from sordino_common.errors import ConfigError
from sordino_common.transport.reactor import Reactor

LIMIT_S = 30.0


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    with Reactor() as made:
        yield made


@pytest.fixture
def manager(tmp_path: Path, reactor: Reactor) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify", reactor=reactor)
    yield made
    made.close()


def until(reactor: Reactor, done: Callable[[], object]) -> None:
    assert reactor.run_until(lambda: bool(done()), deadline_s=reactor.now_s() + LIMIT_S)


# --- the protocol ------------------------------------------------------------------------------------------------


def test_the_environment_is_read_and_taken_away(manager: Manager) -> None:
    environ = {**manager.environment(watchdog_s=3.0), "WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
    notifier = Notifier.from_environment(environ)
    assert environ == {"HOME": "/"}
    assert notifier.watchdog_s == 3.0
    assert notifier.listened


def test_a_watchdog_for_another_process_is_not_ours(manager: Manager) -> None:
    environ = {**manager.environment(watchdog_s=3.0), "WATCHDOG_PID": str(os.getpid() + 1)}
    assert Notifier.from_environment(environ).watchdog_s is None


def test_without_a_manager_nothing_is_sent() -> None:
    notifier = Notifier.from_environment({"WATCHDOG_USEC": "1000000"})
    assert notifier.watchdog_s is None
    notifier.ready()
    notifier.status("x")


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"NOTIFY_SOCKET": "vsock:2:1"}, "NOTIFY_SOCKET='vsock:2:1': expected the path of a socket, or @name"),
        ({"NOTIFY_SOCKET": "@"}, "NOTIFY_SOCKET"),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "soon"}, "WATCHDOG_USEC='soon': expected a number of microseconds"),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "0"}, "WATCHDOG_USEC"),
    ],
)
def test_a_strange_environment_is_refused(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        Notifier.from_environment(environ)


def test_messages_are_those_of_sd_notify(manager: Manager, reactor: Reactor) -> None:
    notifier = Notifier(str(manager.path))
    before = int(reactor.now_s() * 1e6)
    notifier.ready()
    notifier.reloading()
    notifier.stopping(1.5)
    notifier.alive()
    notifier.status("all is well")
    ready, reloading, stopping, alive, status = manager.read()
    assert ready == ["READY=1"]
    assert reloading[0] == "RELOADING=1"
    name, _, value = reloading[1].partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(value) <= reactor.now_s() * 1e6
    assert stopping == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=1500000"]
    assert alive == ["WATCHDOG=1"]
    assert status == ["STATUS=all is well"]


def test_an_abstract_socket_is_found() -> None:
    name = f"sordino-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        Notifier(f"@{name}").ready()
        assert sock.recv(100) == b"READY=1"


def test_a_status_can_not_speak_for_us(manager: Manager) -> None:
    """The text may hold what a broker gave as its reason."""
    notifier = Notifier(str(manager.path))
    notifier.status("refused: x\nMAINPID=1\rWATCHDOG=trigger\x00\u2028READY=1" + "y" * 10_000)
    ((line,),) = manager.read()
    assert line.startswith("STATUS=refused: x MAINPID=1 WATCHDOG=trigger  READY=1yy")
    assert len(line) < 500


def test_the_same_status_is_sent_once(manager: Manager) -> None:
    notifier = Notifier(str(manager.path))
    for text in ("a", "a", "b", "a"):
        notifier.status(text)
    assert manager.read() == [["STATUS=a"], ["STATUS=b"], ["STATUS=a"]]


def test_a_manager_that_is_gone_is_told_about_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier(str(tmp_path / "nobody"))
    notifier.ready()
    notifier.alive()
    assert caplog.text.count("event=notify-failed message=READY") == 1
    assert "notify-failed message=WATCHDOG" not in caplog.text


# --- the watchdog ------------------------------------------------------------------------------------------------


def test_the_watchdog_is_fed_while_the_loop_turns(manager: Manager, reactor: Reactor) -> None:
    beats: list[str | None] = []
    notifier = Notifier(str(manager.path), watchdog_s=0.02)
    liveness = Liveness(reactor, notifier, probes={}, on_beat=beats.append)
    liveness.start()
    liveness.start()
    until(reactor, lambda: manager.count("WATCHDOG=1") >= 5)
    liveness.stop()
    liveness.stop()
    assert set(beats) == {None}
    fed = len(manager.read())
    reactor.call_at(reactor.now_s() + 0.1, lambda: beats.append("over"))
    until(reactor, lambda: "over" in beats)
    assert len(manager.read()) == fed


def test_what_a_probe_complains_about_starves_the_watchdog(
    manager: Manager, reactor: Reactor, caplog: pytest.LogCaptureFixture
) -> None:
    fault: list[str | None] = [None]

    def journal() -> str | None:
        if fault[0] == "raise":
            raise OSError(5, "Input/output error")
        return fault[0]

    heard: list[str | None] = []
    liveness = Liveness(
        reactor,
        Notifier(str(manager.path), watchdog_s=0.02),
        probes={"loop": lambda: None, "journal": journal},
        on_beat=heard.append,
    )
    liveness.start()
    until(reactor, lambda: manager.count("WATCHDOG=1") >= 2)
    for wrong, words in (("it is gone", "journal: it is gone"), ("raise", "journal: OSError: [Errno 5]")):
        fault[0] = wrong
        until(reactor, lambda words=words: (liveness.complaint or "").startswith(words))
        fed, beats = manager.count("WATCHDOG=1"), len(heard)
        until(reactor, lambda beats=beats: len(heard) >= beats + 5)
        assert manager.count("WATCHDOG=1") == fed
    fault[0] = None
    until(reactor, lambda: manager.count("WATCHDOG=1") > fed)
    assert caplog.text.count("event=unwell") == 2
    assert "event=well-again" in caplog.text
    liveness.stop()


def test_timers_alone_do_not_feed_it(manager: Manager, reactor: Reactor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop whose selector reports nothing any more is deaf to the broker, however its timers tick."""
    liveness = Liveness(reactor, Notifier(str(manager.path), watchdog_s=0.02), probes={})
    liveness.start()
    until(reactor, lambda: manager.count("WATCHDOG=1") >= 2)
    manager.messages.clear()
    ticks: list[float] = []

    def tick() -> None:
        ticks.append(reactor.now_s())
        reactor.call_at(reactor.now_s() + 0.02, tick)

    tick()
    with monkeypatch.context() as deaf:
        deaf.setattr(reactor._selector, "select", lambda timeout: [])
        until(reactor, lambda: len(ticks) > 5)
    assert manager.read() == []
    until(reactor, lambda: manager.count("WATCHDOG=1"))
    liveness.stop()


# --- signals -----------------------------------------------------------------------------------------------------


def test_signals_wake_the_loop_and_are_put_back(reactor: Reactor) -> None:
    before = signal.getsignal(signal.SIGHUP)
    with Signals(reactor, (signal.SIGHUP,)) as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        arrived: list[signal.Signals] = []

        def seen() -> bool:
            arrived.extend(signals.taken())
            return bool(arrived)

        until(reactor, seen)
        assert arrived[0] is signal.SIGHUP
        assert signals.taken() == []
    assert signal.getsignal(signal.SIGHUP) is before
