"""A real mosquitto for tests: on a free loopback port, with a configuration of its own, ended by its own process id."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

_START_S = 15.0
_PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")  # Debian keeps it out of a user's PATH


def find_program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(_PLACES))


def require_mosquitto() -> None:
    """Skip the test where there is no mosquitto; fail it there if SORDINO_REQUIRE_MQTT=1."""
    if find_program("mosquitto") is None:
        reason = "no mosquitto program (apt install mosquitto)"
        if os.environ.get("SORDINO_REQUIRE_MQTT") == "1":
            pytest.fail(f"{reason}, and SORDINO_REQUIRE_MQTT=1", pytrace=False)
        pytest.skip(reason)


class Mosquitto:
    """A broker with extra lines of configuration. `start` may be called again after `stop`: the port stays.

    `lines` belong to its one listener or to the whole broker (cafile, max_packet_size, ...)."""

    def __init__(self, folder: Path, *lines: str, anonymous: bool = True) -> None:
        program = find_program("mosquitto")
        assert program is not None
        self._program = program
        self._folder = folder
        self._lines = lines
        self._anonymous = anonymous
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def log(self) -> str:
        return (self._folder / "mosquitto.log").read_text("utf-8", "replace")

    def start(self) -> None:
        for _ in range(5):  # between finding a free port and binding it, somebody else may take it
            fresh = self.port == 0
            if fresh:
                self.port = free_port()
            if self._launch():
                return
            if not fresh:
                break
            self.port = 0
        raise AssertionError(f"mosquitto did not start:\n{self.log}")

    def _launch(self) -> bool:
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / "mosquitto.conf"
        lines = [
            f"listener {self.port} 127.0.0.1",
            *self._lines,
            f"allow_anonymous {'true' if self._anonymous else 'false'}",
            "log_dest stderr",
            "log_type all",
            "set_tcp_nodelay true",
        ]
        if os.geteuid() == 0:
            lines.append("user root")  # else it would give up root, and the folder of the test with it
        config.write_text("\n".join(lines) + "\n")
        with (self._folder / "mosquitto.log").open("ab") as log:
            began_at = log.tell()
            process = subprocess.Popen([self._program, "-c", str(config)], stdin=subprocess.DEVNULL, stderr=log)
        self._process = process
        deadline_s = time.monotonic() + _START_S
        while time.monotonic() < deadline_s and process.poll() is None:
            written = (self._folder / "mosquitto.log").read_bytes()[began_at:]
            if b" running" in written:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1.0):
                    return True
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        self.stop()
        return False

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(how)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)

    def restart(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.stop(how)
        self.start()


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
