"""`sordino-agent run` as a service manager starts it, with the fleet's server beside it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from helpers_daemon import AGENT, Home, stage_of
from helpers_mosquitto import Mosquitto
from helpers_notify import Manager
from sordino_common.transport.mqtt import MqttTransport
from sordino_common.transport.mqtt_settings import MqttSettings
from sordino_common.transport.reactor import Reactor

WATCHDOG_S = 0.2


class Unit:
    """A running `sordino-agent run`, its manager, and the fleet's server."""

    def __init__(
        self,
        home: Home,
        port: int,
        reactor: Reactor,
        *,
        stderr: int | None = None,
        command: Sequence[str] = AGENT,
        environment: Mapping[str, str] | None = None,
        watchdog_s: float = WATCHDOG_S,
    ) -> None:
        self.home = home
        self.manager = Manager(home.folder.parent / "notify", reactor=reactor)
        settings = MqttSettings(host="127.0.0.1", port=port, client_id="server", reconnect_least_s=0.05)
        self.stage = stage_of(reactor, home, MqttTransport(settings, reactor))
        self._log = (home.folder / "log").open("w")
        self.process = subprocess.Popen(
            [*command, "run", str(home.folder)],
            stderr=self._log if stderr is None else stderr,
            env={**os.environ, **self.manager.environment(watchdog_s=watchdog_s), **(environment or {})},
        )

    @property
    def fed(self) -> int:
        return self.manager.count("WATCHDOG=1")

    def until(self, done: Callable[[], object]) -> None:
        self.stage.until(lambda: self.process.poll() is not None or done())
        assert done(), f"ended with {self.process.poll()}: {(self.home.folder / 'log').read_text()}"

    def starves(self) -> bool:
        """Whether nothing is fed for several times what the watchdog allows."""
        before, reactor = self.fed, self.stage.reactor
        reactor.run_until(lambda: self.fed > before, deadline_s=reactor.now_s() + 4 * WATCHDOG_S)
        return self.fed == before

    def close(self) -> None:
        self.stage.server.endpoint.close()
        self.stage.until(lambda: self.stage.server.endpoint.closed)
        self.process.kill()
        self.process.wait()
        self._log.close()
        self.manager.close()


@contextmanager
def started(home: Home, broker: Mosquitto, **how: Any) -> Iterator[Unit]:
    """An agent that has told `READY=1`. `how`: further arguments of `Unit`."""
    home.edit("port: 1\n", f"port: {broker.port}\n  reconnect_least_s: 0.05\n")
    with Reactor() as reactor, contextlib.closing(Unit(home, broker.port, reactor, **how)) as unit:
        unit.until(lambda: unit.manager.count("READY=1") == 1)
        yield unit
