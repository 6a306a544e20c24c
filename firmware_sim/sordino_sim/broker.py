"""A mosquitto of our own: on a free loopback port, with a configuration of its own, stopped by its own process id.

Nothing of a broker that already runs on the machine is read or touched."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from sordino_common.errors import ConfigError, FleetUnavailable

_START_S: Final = 10.0  # mosquitto listens within 50 ms on an idle Pi; a loaded machine may need seconds
_STOP_S: Final = 5.0
_POLL_S: Final = 0.02
_ATTEMPTS: Final = 5  # between finding a free port and binding it, somebody else may take it
_PLACES: Final = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")  # Debian keeps it out of a user's PATH


def find_mosquitto() -> Path:
    """The mosquitto program. Raises `ConfigError` with the remedy if there is none."""
    found = shutil.which("mosquitto")
    if found is None:
        for place in _PLACES:
            if (Path(place) / "mosquitto").is_file():
                return Path(place) / "mosquitto"
        raise ConfigError(
            "mosquitto is not installed, and --transport mqtt needs a broker. "
            "On Debian or Ubuntu: apt install mosquitto. Or use --transport memory."
        )
    return Path(found)


def broker_config(port: int, *, max_packet_bytes: int | None = None) -> str:
    """mosquitto.conf for a broker on the loopback interface only, without persistence."""
    lines = [
        "# Made by sordino-sim. Loopback only, no authentication: never use it outside a simulation.",
        f"listener {port} 127.0.0.1",
        "allow_anonymous true",
        "persistence false",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type information",  # of which we wait for the line that says that it runs
        # Messages are chunked and acknowledged end to end; the broker's own queue only has to hold our windows.
        "max_queued_messages 10000",
        "set_tcp_nodelay true",
    ]
    if max_packet_bytes is not None:
        lines.append(f"max_packet_size {max_packet_bytes}")
    return "\n".join(lines) + "\n"


class LocalBroker:
    """A running mosquitto in `folder`. A context manager; `restart` keeps the port."""

    def __init__(self, folder: Path, *, port: int | None = None, max_packet_bytes: int | None = None) -> None:
        self._program = find_mosquitto()
        self._folder = folder
        self._fixed_port = port
        self._max_packet_bytes = max_packet_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port or 0

    @property
    def log_path(self) -> Path:
        return self._folder / "mosquitto.log"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start and wait until it listens, 10 s at most. Raises `FleetUnavailable` with the broker's last words."""
        if self._process is not None:
            return
        words = ""
        for _ in range(_ATTEMPTS):
            self.port = self._fixed_port or free_port()
            if self._launch():
                self._fixed_port = self.port  # a restart must be found where the first start was
                return
            words = self._last_words()
            if "in use" not in words:
                break
        raise FleetUnavailable(f"mosquitto ({self._program}) did not start on 127.0.0.1:{self.port}: {words}")

    def _launch(self) -> bool:
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / "mosquitto.conf"
        config.write_text(broker_config(self.port, max_packet_bytes=self._max_packet_bytes))
        with self.log_path.open("ab") as log:
            began_at = log.tell()
            process = subprocess.Popen(
                [str(self._program), "-c", str(config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline_s = time.monotonic() + _START_S
        while time.monotonic() < deadline_s:
            if process.poll() is not None:
                return False
            # Its own word, and then the port: to connect is not enough, somebody else may listen there.
            if b" running" in self.log_path.read_bytes()[began_at:]:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1.0):
                    self._process = process
                    return True
            time.sleep(_POLL_S)
        _end(process)
        return False

    def stop(self) -> None:
        """Stop it (SIGTERM, after 5 s SIGKILL). Does nothing if it does not run."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def restart(self) -> None:
        self.stop()
        self.start()

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = self.log_path.read_text("utf-8", "replace").strip().splitlines()
            if lines:
                return " / ".join(lines[-2:])
        return f"no word from it within {_START_S:g} s"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def free_port() -> int:
    """A TCP port on the loopback interface that nobody listens on at this moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_STOP_S)
