"""`sordino dealer`: the dealer as a process on a host of its own, and the folder that it lives in.

dealer.yaml       names, the operator's public key, the broker
dealer.key        its own keys, made here
enrolment.json    for `sordino roster add` at the server's
                  (neither of both if `sordino-agent enroll` made it a member: `enrol_member`)
roster.cbor, boot, masks/    what it keeps
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import msgspec
import yaml

from sordino_common.channel.boot import next_boot
from sordino_common.channel.credentials import located
from sordino_common.channel.files import write_atomically
from sordino_common.channel.identity import DeviceKey, check_sign_key
from sordino_common.channel.roster import RosterBook
from sordino_common.config import load_config
from sordino_common.daemon.collector import old_set_aside
from sordino_common.daemon.liveness import Liveness
from sordino_common.daemon.notify import Notifier
from sordino_common.daemon.signals import Signals
from sordino_common.daemon.state import StateProbe
from sordino_common.errors import ConfigError
from sordino_common.messages.base import Name
from sordino_common.transport.endpoint import Endpoint
from sordino_common.transport.mqtt import MqttTransport
from sordino_common.transport.reactor import Reactor
from sordino_common.transport.settings import LinkSettings
from sordino_server.dealer.masks import MaskStore
from sordino_server.dealer.service import DealerService
from sordino_server.fleet import broker_settings
from sordino_server.home import BrokerSpec, TlsSpec, parse_broker

log = logging.getLogger("sordino.dealer")
CONFIG_FILE: Final = "dealer.yaml"
KEY_FILE: Final = "dealer.key"
REQUEST_FILE: Final = "enrolment.json"
_DRAIN_S: Final = 5.0

OperatorKey = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-fA-F]{64}\Z")]


class DealerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """dealer.yaml. `key`: where the dealer's own keys are; absent: dealer.key in its folder. Any path here may be
    `credential:NAME` (`channel/credentials`)."""

    name: Name
    fleet: Name
    server: Name = "server"
    operator_key: OperatorKey
    key: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)] | None = None
    broker: BrokerSpec


def enrol_dealer(folder: Path, *, name: str, fleet: str, operator_key: str, broker: str, server: str) -> DeviceKey:
    """Make `folder`: key, configuration, enrolment request. Raises `ConfigError`."""
    host, port = parse_broker(broker)
    fields = {"name": name, "fleet": fleet, "server": server, "operator_key": operator_key,
              "broker": {"host": host, "port": port}}  # fmt: skip
    try:
        config = msgspec.convert(fields, DealerConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"sordino dealer init: {error}") from None
    if config.name == config.server:
        raise ConfigError(f"--name {name!r}: this is the server's name; a dealer of its own has a name of its own")
    fault = check_sign_key(bytes.fromhex(config.operator_key))
    if fault is not None:
        raise ConfigError(f"--operator-key: {fault}")
    if (folder / CONFIG_FILE).exists():
        raise ConfigError(f"{folder / CONFIG_FILE}: is there already; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / KEY_FILE).exists():
        key = DeviceKey.load(folder / KEY_FILE)
    else:
        key = DeviceKey.generate()
        key.save(folder / KEY_FILE)
    request = {
        "name": name,
        "fleet": fleet,
        "sign_key": key.public.sign_key.hex(),
        "box_key": key.public.box_key.hex(),
        "roles": ["dealer"],
        "fingerprint": key.fingerprint,
    }
    write_atomically(folder / REQUEST_FILE, (json.dumps(request, indent=1) + "\n").encode())
    text = yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False)
    write_atomically(folder / CONFIG_FILE, text.encode())
    return key


class _Membership(msgspec.Struct, frozen=True, kw_only=True):
    """Of an agent.yaml: who is a member, under whose operator."""

    name: Name
    fleet: Name
    server: Name = "server"
    state_dir: str


class _MemberBroker(msgspec.Struct, frozen=True, kw_only=True):
    host: str
    port: int
    tls: TlsSpec | None = None


class _Member(msgspec.Struct, frozen=True, kw_only=True):
    """What a dealer takes of an agent.yaml; all else there is of no use to it."""

    agent: _Membership
    operator_key: OperatorKey
    device_key: str | None = None
    broker: _MemberBroker


def enrol_member(folder: Path, member: Path) -> str:
    """Make `folder` for a dealer that `sordino-agent enroll --dir member` made a member of its fleet: it has the keys
    and the broker's certificate that lie there, and its name. Returns the name. Raises `ConfigError`."""
    own = load_config(member / "agent.yaml", _Member)
    if (folder / CONFIG_FILE).exists():
        raise ConfigError(f"{folder / CONFIG_FILE}: is there already; choose another folder")
    there = member.resolve()

    def located_there(text: str | None) -> str | None:
        return None if text is None else text if text.startswith("credential:") else str(there / text)

    tls = own.broker.tls
    if tls is not None:
        tls = TlsSpec(
            ca=located_there(tls.ca),
            certificate=located_there(tls.certificate),
            key=located_there(tls.key),
            server_name=tls.server_name,
        )
    config = DealerConfig(
        name=own.agent.name,
        fleet=own.agent.fleet,
        server=own.agent.server,
        operator_key=own.operator_key,
        key=located_there(own.device_key or f"{own.agent.state_dir}/agent.key"),
        broker=BrokerSpec(host=own.broker.host, port=own.broker.port, tls=tls),
    )
    DeviceKey.load(located(str(config.key), folder))  # it is there, and nobody else can read it
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False)
    write_atomically(folder / CONFIG_FILE, text.encode())
    return config.name


@contextmanager
def open_dealer(folder: Path, *, version: str) -> Iterator[tuple[Reactor, DealerService]]:
    """Connect, and deal for whoever the fleet's server asks for. Raises `ConfigError`."""
    config = load_config(folder / CONFIG_FILE, DealerConfig)
    identity = DeviceKey.load(located(config.key or KEY_FILE, folder))
    book = RosterBook(
        fleet=config.fleet,
        operator_key=bytes.fromhex(config.operator_key),
        wall_s=time.time,
        path=folder / "roster.cbor",
    )
    settings = broker_settings(config.broker, folder, client_id=f"sordino-{config.fleet}-{config.name}")
    from sordino_server.dealer.backend_torch import best_backend  # torch: `dealer init` does without

    with Reactor() as reactor:
        service = DealerService(
            name=config.name,
            server=config.server,
            loop=reactor,
            store=MaskStore(folder / "masks"),
            random=os.urandom,
            stopwatch=time.perf_counter,
            dealing={"backend": best_backend()},
        )
        endpoint = Endpoint(
            name=config.name,
            identity=identity,
            roster=book,
            fleet=config.fleet,
            server=config.server,
            boot=next_boot(folder / "boot"),
            transport=MqttTransport(settings, reactor),
            loop=reactor,
            handler=service,
            version=version,
            settings=LinkSettings(),
        )
        service.attach(endpoint)
        if book.current is not None:
            service.on_roster(book.current)
        endpoint.open()
        log.info("event=start name=%s fleet=%s key=%s", config.name, config.fleet, identity.fingerprint)
        try:
            yield reactor, service
        finally:
            endpoint.close(drain_s=_DRAIN_S)
            reactor.run_until(lambda: endpoint.closed, deadline_s=reactor.now_s() + _DRAIN_S + 1.0)


def run_dealer(folder: Path, *, version: str, notifier: Notifier | None = None) -> int:
    """Be the dealer until SIGINT or SIGTERM. Returns the exit code."""
    manager = notifier or Notifier()
    faulthandler.enable(sys.stderr)
    with open_dealer(folder, version=version) as (reactor, service), Signals(reactor) as signals:
        ready = False

        def tell() -> None:
            nonlocal ready
            state = "connected" if service.connected else f"not connected: {service.reason}"
            complaint = liveness.complaint
            parts = [*([f"UNWELL: {complaint}"] if complaint else []), service.name, state,
                     f"{service.sessions} sessions"]  # fmt: skip
            manager.status("; ".join(parts))
            if not ready:  # the broker has answered, or can't be reached, which the status tells
                ready = True
                manager.ready()

        liveness = Liveness(
            reactor,
            manager,
            probes={"state": StateProbe(folder / "masks", [])},
            on_beat=lambda complaint: tell() if ready else None,
        )
        service.watch(tell)
        liveness.start()
        with old_set_aside():
            reactor.run_until(lambda: bool(signals.taken()), deadline_s=float("inf"))
        manager.stopping(2 * _DRAIN_S)
        liveness.stop()
    return 0
