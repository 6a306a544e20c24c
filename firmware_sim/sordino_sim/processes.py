"""Real agents: one `sordino-agent run` process each, from a fleet folder, beside a mosquitto of our own.

Every process is ended by its own id. A killed agent is killed (SIGKILL), one that leaves gets SIGTERM.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from sordino_common.errors import LocalError
from sordino_server import fleet as server_fleet
from sordino_server.conductor import Conductor
from sordino_server.launch import ONE_THREAD
from sordino_server.rounds.spdz import World
from sordino_server.run import RunnableLoop
from sordino_sim.broker import LocalBroker
from sordino_sim.fleet_dir import FleetFolder
from sordino_sim.harness import VERSION

DEALER: Final = "*dealer"  # among the processes; no agent's name
_STOP_S: Final = 15.0  # a draining agent has 10 s for its tasks and 5 s for its answers


class AgentProcesses:
    """The agents of a fleet folder as processes. A context manager: at its end none of them is left.

    `python`: the interpreter of the environment that the agents are installed in, if it is not this one."""

    def __init__(self, folder: FleetFolder, *, python: str = sys.executable) -> None:
        self._folder = folder
        self._python = python
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._folder.agents)

    def start(self, name: str) -> None:
        """Start one agent, unless it runs. Its log is appended to `agent.log` in its folder."""
        if name in self._running and self._running[name].poll() is None:
            return
        home = self._folder.agents.get(name) or self._folder.helpers[name]
        with (home / "agent.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [self._python, "-m", "sordino_agent", "run", str(home)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def start_all(self) -> None:
        """Every agent, the helpers, and the dealer if there is one."""
        for name in (*self._folder.helpers, *self.names):
            self.start(name)
        self.start_dealer()

    def start_dealer(self) -> None:
        """Start the job's own dealer, unless there is none, or it runs."""
        home = self._folder.dealer
        if home is None or (DEALER in self._running and self._running[DEALER].poll() is None):
            return
        with (home / "dealer.log").open("ab") as log:
            self._running[DEALER] = subprocess.Popen(
                [sys.executable, "-m", "sordino_server.cli", "dealer", "run", str(home)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**ONE_THREAD, **os.environ},
            )

    def kill(self, name: str) -> None:
        """SIGKILL, and wait until it is gone."""
        process = self._running.pop(name, None)
        if process is not None:
            process.kill()
            process.wait()

    def terminate(self, name: str) -> None:
        """SIGTERM; the process drains on its own."""
        process = self._running.get(name)
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)

    def resident_bytes(self) -> int:
        """What the daemons together have in memory, their workers not counted."""
        total = 0
        for process in self._running.values():
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text("ascii").splitlines()
            except OSError:
                continue  # it has ended
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
        return total

    def stop_all(self) -> None:
        """SIGTERM to all, SIGKILL to who is still there after a while."""
        processes, self._running = list(self._running.values()), {}
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_all()


class ProcessFleet:
    """`Company` and `Stage` of real processes; the server is in this process, as `sordino train` would be."""

    def __init__(self, folder: FleetFolder) -> None:
        self._folder = folder
        self._agents = AgentProcesses(folder)
        self._broker = LocalBroker(folder.broker_folder, port=folder.port)
        self._open = ExitStack()
        self._server: server_fleet.Fleet | None = None
        self._away: list[str] = []

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(sorted(self._folder.agents))

    @property
    def away(self) -> tuple[str, ...]:
        return tuple(self._away)

    @property
    def loop(self) -> RunnableLoop:
        if self._server is None:
            raise LocalError("ProcessFleet.loop before start_server")
        return self._server.reactor

    def start_server(self) -> Conductor:
        self._broker.start()
        self._open.callback(self._broker.stop)
        self._open.callback(self._agents.stop_all)
        self._server = self._open.enter_context(server_fleet.open_fleet(self._folder.home(), version=VERSION))
        return self._server.conductor

    def world(self) -> World:
        if self._server is None:
            raise LocalError("ProcessFleet.world before start_server")
        return self._server.world()

    def kill_server(self) -> None:
        raise LocalError("ProcessFleet.kill_server: the server is this process; faults.py refuses such a schedule")

    def start_agents(self) -> None:
        self._agents.start_all()

    def resident_bytes(self) -> int:
        return self._agents.resident_bytes()

    def close(self) -> None:
        self._open.close()

    # --- faults ----------------------------------------------------------------------------------------------------

    def die(self, name: str, *, noticed_after_s: float) -> None:
        """SIGKILL. The system closes the connection at once, whatever `noticed_after_s` says."""
        self._agents.kill(name)
        self._away.append(name)

    def leave(self, name: str) -> None:
        self._agents.terminate(name)
        self._away.append(name)

    def come_back(self, name: str) -> None:
        if name in self._away:
            self._away.remove(name)
        self._agents.start(name)

    def slow_down(self, name: str, factor: float) -> None:
        raise LocalError("ProcessFleet.slow_down: processes are no simulated devices; faults.py refuses that")

    def cut(self, names: frozenset[str], for_s: float) -> None:
        raise LocalError("ProcessFleet.cut: the network is not simulated; faults.py refuses such a schedule")

    def set_clock(self, name: str, *, by_s: float) -> None:
        raise LocalError("ProcessFleet.set_clock: processes have this machine's clock; faults.py refuses that")

    def flood(self, name: str, *, per_s: float, for_s: float) -> None:
        raise LocalError("ProcessFleet.flood: real agents don't; faults.py refuses such a schedule")

    def restart_broker(self, *, down_s: float) -> None:
        self._broker.stop()
        self.loop.call_at(self.loop.now_s() + down_s, self._broker.start)
