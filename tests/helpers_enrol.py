"""Fleets with an authority and a broker of their own: folders, a real mosquitto from `sordino broker-config`, and
clients of it that say what they were granted."""

from __future__ import annotations

import os
import queue
import signal
import ssl
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from helpers_mosquitto import find_program, free_port
from sordino_common.channel.certificates import new_tls_key, write_identity
from sordino_server.enrolment.broker_config import SERVER_IDENTITY, BrokerLimits, BrokerPlan, write_broker
from sordino_server.enrolment.ca import Authority
from sordino_server.enrolment.fleet_file import point_at_broker
from sordino_server.home import Home, create_home

WAIT_S = 20.0
HOST = "127.0.0.1"


def make_fleet(folder: Path, *, limits: BrokerLimits | None = None, **plan: Any) -> tuple[Home, Path, BrokerPlan]:
    """(fleet `lab` with server `server`, its broker's folder, ports). Nothing runs yet."""
    port, enrol_port = free_port(), free_port()
    home = create_home(folder / "fleet", fleet="lab", server="server", broker=f"{HOST}:{port}")
    made = BrokerPlan(
        hosts=(HOST,), port=port, enrol_port=enrol_port, bind=HOST, limits=limits or BrokerLimits(), **plan
    )
    write_broker(home, folder / "broker", made, now_s=time.time())
    assert point_at_broker(home, host=HOST, port=port, identity=SERVER_IDENTITY) == ""
    return Home(home.folder), folder / "broker", made


class FleetBroker:
    """The mosquitto of a folder that `write_broker` made. A context manager; ended by its own process id."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self._folder / "mosquitto.log").read_text("utf-8", "replace")

    def start(self) -> None:
        text = (self._folder / "mosquitto.conf").read_text()
        if os.geteuid() == 0:
            text += "\nuser root\n"  # else it would give up root, and the folder of the test with it
        run = self._folder / "run.conf"
        run.write_text(text)
        program = find_program("mosquitto")
        assert program is not None
        with (self._folder / "mosquitto.log").open("ab") as log:
            began_at = log.tell()
            self._process = subprocess.Popen([program, "-c", str(run)], stdin=subprocess.DEVNULL, stderr=log)
        self._await(began_at, b" running")

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            process.wait(WAIT_S)

    def reload(self) -> None:
        """SIGHUP, and wait until it has read its files again."""
        assert self._process is not None
        began_at = (self._folder / "mosquitto.log").stat().st_size
        self._process.send_signal(signal.SIGHUP)
        self._await(began_at, b"Reloading config.")

    def _await(self, began_at: int, word: bytes) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            assert self._process is not None
            if word in (self._folder / "mosquitto.log").read_bytes()[began_at:]:
                return
            try:
                code = self._process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
            raise AssertionError(f"mosquitto ended with {code}:\n{self.log}")
        raise AssertionError(f"mosquitto did not say {word!r}:\n{self.log}")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def member_file(
    folder: Path, authority: Authority, name: str, *, days: int = 365, now_s: float | None = None
) -> tuple[Path, x509.Certificate]:
    """(PEM file with key and certificate of `name`, the certificate)."""
    key = new_tls_key()
    now_s = time.time() if now_s is None else now_s
    certificate = authority.issue_member(name, key.public_key(), now_s=now_s, days=days)
    path = folder / f"{name}-{certificate.serial_number:x}.pem"
    write_identity(path, key, certificate)
    return path, certificate


@dataclass(frozen=True)
class Heard:
    topic: str
    payload: bytes


class RawClient:
    """A client on its own thread: what it may do is the broker's affair. `identity`: PEM of certificate and key."""

    def __init__(self, port: int, *, ca: Path, identity: Path | None, client_id: str) -> None:
        context = ssl.create_default_context(cafile=str(ca))
        if identity is not None:
            context.load_cert_chain(identity)
        self.client_id = client_id
        self._port = port
        self._client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=MQTTProtocolVersion.MQTTv5,
            reconnect_on_failure=False,
        )
        self._client.tls_set_context(context)
        self._answers: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.heard: queue.Queue[Heard] = queue.Queue()
        self._client.on_connect = lambda _c, _d, _f, code, _p: self._answers.put(("connect", code))
        self._client.on_disconnect = lambda _c, _d, _f, code, _p: self._answers.put(("disconnect", code))
        self._client.on_publish = lambda _c, _d, _mid, code, _p: self._answers.put(("publish", code))
        self._client.on_subscribe = lambda _c, _d, _mid, codes, _p: self._answers.put(("subscribe", codes[0]))
        self._client.on_message = lambda _c, _d, message: self.heard.put(Heard(message.topic, message.payload))

    def connect(self) -> bool:
        """Whether the broker takes us."""
        try:
            self._client.connect(HOST, self._port, keepalive=60)
        except OSError:  # the alert may come in the handshake (TLS 1.2) ...
            return False
        self._client.loop_start()
        what, code = self._answers.get(timeout=WAIT_S)
        return what == "connect" and not code.is_failure  # ... or instead of a CONNACK

    def may_publish(self, topic: str, payload: bytes = b"x", *, retain: bool = False) -> bool:
        """Publish; whether the broker says that we were allowed to."""
        self._client.publish(topic, payload, qos=1, retain=retain)
        what, code = self._answers.get(timeout=WAIT_S)
        if what == "disconnect":  # of the $-topics, some versions hang up
            return False
        assert what == "publish", what
        return not code.is_failure

    def subscribe(self, topic_filter: str) -> bool:
        self._client.subscribe(topic_filter, qos=1)
        what, code = self._answers.get(timeout=WAIT_S)
        assert what == "subscribe", what
        return not code.is_failure

    def hear_until(self, marker: bytes) -> list[Heard]:
        """Everything that came before the packet with `marker`."""
        found: list[Heard] = []
        while True:
            heard = self.heard.get(timeout=WAIT_S)
            if heard.payload == marker:
                return found
            found.append(heard)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def close_all(clients: Iterable[RawClient]) -> None:
    for client in clients:
        client.close()


def pem_of(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)
