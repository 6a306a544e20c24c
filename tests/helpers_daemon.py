"""An agent's daemon in tests: an enrolled folder, and a server on a reactor that asks it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from helpers_agent import small_table
from sordino_agent.enrol import enrol
from sordino_common import messages as m
from sordino_common.channel.identity import DeviceKey, OperatorKey
from sordino_common.channel.roster import Roster, RosterBook, RosterEntry, sign_roster
from sordino_common.errors import RemoteError
from sordino_common.transport.base import Transport
from sordino_common.transport.endpoint import Endpoint, Incoming
from sordino_common.transport.reactor import Reactor

LIMIT_S = 60.0


@dataclass
class Home:
    """An enrolled agent's folder, with the operator and server that belong to it."""

    folder: Path
    operator: OperatorKey
    server: DeviceKey
    signed: bytes

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def edit(self, old: str, new: str) -> None:
        path = self.folder / "agent.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))


def make_home(tmp_path: Path) -> Home:
    """Agent pi-01 of fleet demo in `tmp_path`/agent, with the dataset `toy`; its broker is nowhere yet."""
    operator, server = OperatorKey.generate(), DeviceKey.generate()
    folder = tmp_path / "agent"
    made = enrol(folder, name="pi-01", fleet="demo", operator_key=operator.public.hex(), broker="127.0.0.1:1")
    reactor = Reactor()
    now = int(reactor.wall_s())
    reactor.close()
    entries = (
        RosterEntry(
            name="pi-01", sign_key=bytes.fromhex(made.sign_key), box_key=bytes.fromhex(made.box_key), roles=["data"]
        ),
        RosterEntry(name="server", sign_key=server.public.sign_key, box_key=server.public.box_key, roles=["server"]),
    )
    roster = Roster(fleet="demo", epoch=1, issued_s=now, expires_s=now + 86_400, entries=entries)
    signed = sign_roster(roster, operator)
    (folder / "fleet.roster").write_bytes(signed)
    table = small_table()
    names = list(table.columns)
    rows = zip(*(table.columns[name] for name in names), strict=True)
    lines = [",".join(names), *(",".join(repr(float(cell)) for cell in row) for row in rows)]
    (folder / "toy.csv").write_text("\n".join(lines) + "\n")
    home = Home(folder=folder, operator=operator, server=server, signed=signed)
    home.edit("datasets: []", "datasets:\n  - {name: toy, path: toy.csv, test_rows: 10}\nroster: fleet.roster")
    home.edit("  plans: []", "  plans: any")
    return home


@dataclass
class Server:
    """The fleet's server, as far as these tests need one."""

    endpoint: Endpoint = field(init=False)
    online: list[tuple[str, bool]] = field(default_factory=list)
    arrived: list[Incoming] = field(default_factory=list)

    def on_message(self, incoming: Incoming) -> None:
        self.arrived.append(incoming)

    def on_presence(self, name: str, online: bool, boot: int) -> None:
        self.online.append((name, online))

    def on_connection(self, connected: bool, reason: str) -> None: ...

    def on_roster(self, roster: Roster) -> None: ...

    def on_refusal(self, sender: str, error: RemoteError) -> None:
        raise error


@dataclass
class Stage:
    """A server on a reactor, and how to ask its one agent."""

    reactor: Reactor
    server: Server

    def until(self, done: Callable[[], object]) -> None:
        def tick() -> None:  # processes and files don't wake the reactor
            timer[0] = self.reactor.call_at(self.reactor.now_s() + 0.02, tick)

        timer = [self.reactor.call_at(self.reactor.now_s(), tick)]
        assert self.reactor.run_until(lambda: bool(done()), deadline_s=self.reactor.now_s() + LIMIT_S)
        timer[0].cancel()

    def ask(self, message: m.Message) -> m.Message:
        correlation = self.server.endpoint.send("pi-01", message)
        return self.answer(correlation)

    def answer(self, correlation: bytes) -> m.Message:
        def found() -> list[m.Message]:
            return [one.message for one in self.server.arrived if one.correlation == correlation]

        self.until(found)
        return found()[0]


def stage_of(reactor: Reactor, home: Home, transport: Transport) -> Stage:
    server = Server()
    book = RosterBook(fleet="demo", operator_key=home.operator.public, wall_s=reactor.wall_s)
    book.accept(home.signed)
    server.endpoint = Endpoint(
        name="server",
        identity=home.server,
        roster=book,
        fleet="demo",
        server="server",
        boot=1,
        transport=transport,
        loop=reactor,
        handler=server,
        version="test",
    )
    server.endpoint.open()
    return Stage(reactor=reactor, server=server)


AGENT = (sys.executable, "-m", "sordino_agent")


@dataclass
class Daemon:
    process: subprocess.Popen[str]

    def memory(self) -> dict[str, int]:
        """Bytes by name from /proc/PID/smaps_rollup."""
        text = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        return {name: int(size) * 1024 for name, size in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)}
