"""The server's end of a real fleet: reactor, broker connection, endpoint and conductor, opened and closed in order."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeVar

from sordino_common.channel.boot import next_boot
from sordino_common.channel.credentials import located
from sordino_common.channel.roster import Roster
from sordino_common.errors import ConfigError, FleetUnavailable, RemoteError, StaleEpoch
from sordino_common.messages import Describe, Described
from sordino_common.transport.endpoint import Endpoint, Incoming
from sordino_common.transport.mqtt import MqttSettings, MqttTransport, TlsSettings
from sordino_common.transport.reactor import Reactor
from sordino_common.transport.settings import LinkSettings
from sordino_common.transport.topics import roster_topic
from sordino_server.conductor import Conductor
from sordino_server.home import BrokerSpec, Home
from sordino_server.rounds.effects import Ask, Effect, Gather, Result, ask, gather, look
from sordino_server.rounds.spdz import World

_DRAIN_S: Final = 5.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """An open connection to the fleet. `run` drives the loop until the conductor is done."""

    home: Home
    roster: Roster
    reactor: Reactor
    endpoint: Endpoint
    conductor: Conductor

    def world(self) -> World:
        """What a run on shares needs of it."""
        from sordino_server.dealer.backend_torch import best_backend  # torch: most commands do without

        return World(
            server=self.home.spec.server,
            roster=lambda: self.roster,
            random=os.urandom,
            stopwatch=time.perf_counter,
            dealing={"backend": best_backend()},
        )

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the data agents in the roster."""
        return members_of(self.roster)


def members_of(roster: Roster) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in roster.entries if "data" in entry.roles))


def others_of(roster: Roster) -> tuple[str, ...]:
    """Parties that own no data but may compute, deal, or help in sums."""
    able = {"compute", "dealer", "helper"}
    return tuple(
        sorted(e.name for e in roster.entries if able & set(e.roles) and not {"data", "server"} & set(e.roles))
    )


class _Handler:
    """The conductor as the endpoint's handler; it must exist before the endpoint does."""

    def __init__(self, conductor: Conductor, server: str) -> None:
        self.conductor = conductor
        self.server = server
        self.connected = False
        self.reason = ""

    def on_message(self, incoming: Incoming) -> None:
        self.conductor.on_message(incoming)

    def on_presence(self, name: str, online: bool, boot: int) -> None:
        self.conductor.on_presence(name, online, boot)

    def on_connection(self, connected: bool, reason: str) -> None:
        self.connected, self.reason = connected, reason
        self.conductor.on_connection(connected, reason)

    def on_roster(self, roster: Roster) -> None:
        self.conductor.on_roster(roster)

    def on_refusal(self, sender: str, error: RemoteError) -> None:
        if not (sender == self.server and isinstance(error, StaleEpoch)):  # retained from before: ours replaces it
            self.conductor.on_refusal(sender, error)


@contextmanager
def open_fleet(home: Home, *, version: str, link: LinkSettings | None = None) -> Iterator[Fleet]:
    """Connect as the fleet's server and publish the roster.

    Raises `ConfigError` (keys, roster, another process here) and `FleetUnavailable` (broker)."""
    book = home.roster_book(wall_s=time.time)
    if book.current is None or book.signed is None:
        raise ConfigError(f"{home.folder}: the roster is not signed yet; do: sordino roster sign --fleet {home.folder}")
    roster = book.require()
    if roster.server.name != home.spec.server:
        raise ConfigError(f"the roster's server is {roster.server.name}, fleet.yaml says {home.spec.server}")
    identity = home.server_key()
    if identity.public.sign_key != roster.server.sign_key:
        raise ConfigError(f"{home.folder / 'server.key'}: not the key that the signed roster lists for the server")
    settings = mqtt_settings(home)
    with ExitStack() as stack:
        stack.enter_context(home.occupied())
        reactor = Reactor()
        stack.callback(reactor.close)
        conductor = Conductor(loop=reactor)
        handler = _Handler(conductor, home.spec.server)
        transport = MqttTransport(settings, reactor)
        # A roster that is signed while we run (`sordino roster revoke`) is published by another process.
        transport.subscribe(roster_topic(home.spec.fleet, home.spec.server))
        endpoint = Endpoint(
            name=home.spec.server,
            identity=identity,
            roster=book,
            fleet=home.spec.fleet,
            server=home.spec.server,
            boot=next_boot(home.folder / "boot"),
            transport=transport,
            loop=reactor,
            handler=handler,
            version=version,
            settings=link or LinkSettings(),
        )
        counters = endpoint.counters.total
        conductor.attach(
            endpoint,
            members=lambda: members_of(book.current or roster),
            traffic=lambda: (counters.packet_bytes_received, counters.packet_bytes_sent),
            others=lambda: others_of(book.current or roster),
        )
        endpoint.open()
        stack.callback(_close, endpoint, reactor)
        deadline_s = reactor.now_s() + settings.connect_timeout_s
        if not reactor.run_until(lambda: handler.connected, deadline_s=deadline_s):
            reason = f": {handler.reason}" if handler.reason else ""
            raise FleetUnavailable(
                f"the broker {settings.host}:{settings.port} gave no connection in "
                f"{settings.connect_timeout_s:g} s{reason}. Is it running, is the firewall open, is the address in "
                f"{home.folder / 'fleet.yaml'} right?"
            )
        endpoint.publish_roster(book.signed)
        yield Fleet(home=home, roster=roster, reactor=reactor, endpoint=endpoint, conductor=conductor)


def _close(endpoint: Endpoint, reactor: Reactor) -> None:
    """Let what is queued (cancellations) go out, say goodbye, give the loop the time for it."""
    endpoint.close(drain_s=_DRAIN_S)
    reactor.run_until(lambda: endpoint.closed, deadline_s=reactor.now_s() + _DRAIN_S + 1.0)


@contextmanager
def interruptible(fleet: Fleet) -> Iterator[None]:
    """Ctrl-C and SIGTERM stop the run in order; a second one ends the process as the system would."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        name = signal.Signals(number).name
        # Not from inside the handler: it may have interrupted anything.
        fleet.reactor.call_at(fleet.reactor.now_s(), lambda: fleet.conductor.interrupt(f"stopped by {name}"))
        fleet.reactor.wake()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def roll_call(fleet: Fleet, *, wait_s: float) -> tuple[dict[str, Described], dict[str, str]]:
    """(descriptions by name, why there is none by name) of the roster's data agents."""

    def generator() -> Generator[Effect, Result, tuple[dict[str, Described], dict[str, str]]]:
        yield from gather(Gather(purpose="agents", without=frozenset(), quorum=1, join_s=wait_s, deadline_s=wait_s))
        present = yield from look()
        answers = yield from ask(
            Ask(
                purpose="descriptions",
                messages=dict.fromkeys(present.boots, Describe()),
                expects=Described,
                quorum=0,
                deadline_s=wait_s,
                straggler_s=wait_s,
            )
        )
        found = {name: reply for name, reply in answers.replies.items() if isinstance(reply, Described)}
        reasons = {name: present.absent(name) for name in present.members - present.boots.keys()}
        return found, {**reasons, **answers.missing, **answers.refusals}

    return drive(fleet, generator)


def drive(fleet: Fleet, generator: Callable[[], Generator[Effect, Result, T]]) -> T:
    """Run one generator to its end."""
    fleet.conductor.start(generator())
    result: T = finish(fleet)
    return result


def begin(fleet: Fleet, generator: Generator[Effect, Result, Any]) -> bool:
    """Run one generator until it waits for the first time, without a turn of the loop. Whether it does: `finish` goes
    on then."""
    conductor = fleet.conductor
    conductor.start(generator, at_once=True)
    if conductor.done:
        conductor.result()  # or what has stopped it
    return not conductor.done


def finish(fleet: Fleet) -> Any:
    """Run the generator that has begun to its end."""
    fleet.reactor.run_until(lambda: fleet.conductor.done, deadline_s=float("inf"))
    return fleet.conductor.result()


def mqtt_settings(home: Home) -> MqttSettings:
    """fleet.yaml's broker with its paths and its password resolved."""
    return broker_settings(home.spec.broker, home.folder, client_id=f"sordino-{home.spec.fleet}-{home.spec.server}")


def broker_settings(broker: BrokerSpec, folder: Path, *, client_id: str) -> MqttSettings:
    """A broker with its paths and its password resolved against `folder`."""

    def path(text: str | None) -> str | None:
        return None if text is None else str(located(text, folder).resolve())

    password = None
    if broker.password_file is not None:
        file = located(broker.password_file, folder)
        try:
            password = file.read_text("utf-8").splitlines()[0]
        except (OSError, IndexError) as error:
            raise ConfigError(f"{file}: no password in its first line: {error}") from None
    tls = None
    if broker.tls is not None:
        tls = TlsSettings(
            ca=path(broker.tls.ca),
            certificate=path(broker.tls.certificate),
            key=path(broker.tls.key),
            server_name=broker.tls.server_name,
        )
    return MqttSettings(
        host=broker.host,
        port=broker.port,
        client_id=client_id,
        username=broker.username,
        password=password,
        keepalive_s=broker.keepalive_s,
        connect_timeout_s=broker.connect_timeout_s,
        tls=tls,
    )
