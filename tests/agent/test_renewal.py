"""The daemon's daily look at its certificate, on virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from sordino_agent.config import is_enrolled, load_agent_config
from sordino_agent.enrol import enrol
from sordino_agent.renewal import EVERY_S, FIRST_S, TAKES_S, Renewal
from sordino_common.clock import VirtualLoop
from sordino_common.transport.mqtt_settings import TlsSettings

KEY = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"  # RFC 8032, section 7.1, test 1


class Process:
    def __init__(self, code: int | None) -> None:
        self.code = code
        self.killed = False
        self.waited = 0

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        self.killed = True
        self.code = -9

    def wait(self) -> int:
        assert self.code is not None
        self.waited += 1
        return self.code


class Bench:
    def __init__(self, *codes: int | None) -> None:
        self.loop = VirtualLoop()
        self.processes: list[Process] = []
        self.commands: list[Sequence[str]] = []
        self.at_s: list[float] = []
        self._codes = list(codes)
        self.renewal = Renewal(self.loop, Path("/etc/sordino/agent.yaml"), spawn=self._spawn)

    def _spawn(self, command: Sequence[str]) -> Process:
        self.commands.append(command)
        self.at_s.append(self.loop.now_s())
        process = Process(self._codes.pop(0))
        self.processes.append(process)
        return process

    def run(self, steps: int) -> None:
        for _ in range(steps):
            assert self.loop.step()


def test_once_a_day_and_every_process_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(0, 3, None)
    began_s = bench.loop.now_s()
    bench.renewal.start()
    bench.run(6)
    assert [at - began_s for at in bench.at_s] == [FIRST_S, FIRST_S + EVERY_S, FIRST_S + 2 * EVERY_S]
    assert [process.waited for process in bench.processes] == [1, 1, 1]
    assert [process.killed for process in bench.processes] == [False, False, True]
    assert list(bench.commands[0][-5:]) == ["renew", "/etc/sordino/agent.yaml", "--if-due", "--wait", "0"]
    assert [record.message.split()[0] for record in caplog.records] == ["event=renewal-failed", "event=renewal-killed"]
    assert f"{TAKES_S:g} s" in caplog.text


def test_a_stop_leaves_no_process_behind() -> None:
    bench = Bench(None)
    bench.renewal.start()
    bench.run(1)
    bench.renewal.close()
    bench.renewal.close()
    assert (bench.processes[0].killed, bench.processes[0].waited) == (True, 1)
    assert not bench.loop.step()


def test_no_process_can_be_started(caplog: pytest.LogCaptureFixture) -> None:
    loop = VirtualLoop()

    def fails(_command: Sequence[str]) -> Process:
        raise OSError(11, "Resource temporarily unavailable")

    Renewal(loop, Path("x"), spawn=fails).start()
    assert loop.step() and loop.step()
    assert "renewal-not-started reason='Resource temporarily unavailable'" in caplog.text
    assert loop.step()  # tomorrow again


@pytest.mark.parametrize(
    ("tls", "enrolled"),
    [
        (TlsSettings(ca="state/broker-ca.pem", certificate="state/broker.pem"), True),
        (TlsSettings(ca="ca.pem", certificate="mine.pem", key="mine.key"), False),
        (TlsSettings(ca="ca.pem"), False),
        (None, False),
    ],
)
def test_only_what_was_enrolled_is_renewed(tls: TlsSettings | None, enrolled: bool, tmp_path: Path) -> None:
    made = enrol(tmp_path, name="pi-01", fleet="lab", operator_key=KEY, broker="b", tls=tls)
    assert is_enrolled(load_agent_config(made.config)) is enrolled
