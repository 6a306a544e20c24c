"""The visit to a real mosquitto: at which step it fails, what is granted, and rules that are too tight or too loose."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers_mosquitto import Mosquitto, free_port
from sordino_common.diagnosis import broker
from sordino_common.diagnosis.finding import Finding
from sordino_common.transport.mqtt_settings import MqttSettings, TlsSettings
from sordino_common.transport.probe import visit_broker
from sordino_common.transport.settings import LinkSettings
from sordino_common.transport.topics import subscriptions
from sordino_server.enrolment.broker_config import members_acl

pytestmark = pytest.mark.mqtt
FLEET, NAME, SERVER = "ward", "alto", "hub"
Start = Callable[..., Mosquitto]


def settings(port: int, **changes: object) -> MqttSettings:
    fields: dict[str, object] = {"host": "127.0.0.1", "port": port, "client_id": "alto", "connect_timeout_s": 10.0}
    return MqttSettings(**{**fields, **changes})  # type: ignore[arg-type]


def one(findings: list[Finding]) -> tuple[str, str]:
    (finding,) = findings
    return finding.level, finding.text


def test_each_step_that_fails_is_named(start_mosquitto: Start, tmp_path: Path) -> None:
    assert visit_broker(settings(1883, host="no-such-host.invalid")).failed == "resolve"
    closed = visit_broker(settings(free_port()))
    assert (closed.failed, closed.reason) == ("connect", "Connection refused")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        mute = visit_broker(settings(silent.getsockname()[1], connect_timeout_s=0.3))
    assert mute.failed == "mqtt"
    plain = start_mosquitto()
    secured = visit_broker(settings(plain.port, tls=TlsSettings()))
    assert secured.failed == "tls"
    passwords = tmp_path / "passwords"
    passwords.write_text("")
    closed_shop = start_mosquitto(f"password_file {passwords}", anonymous=False)
    refused = visit_broker(settings(closed_shop.port, username="alto", password="wrong"))
    assert (refused.failed, refused.reason) == ("mqtt", "Not authorized")
    well = visit_broker(settings(plain.port))
    assert (well.failed, well.addresses) == ("done", ("127.0.0.1",))


def test_limits_are_those_of_the_broker(start_mosquitto: Start) -> None:
    small = start_mosquitto("max_packet_size 1500", "max_inflight_messages 2", "max_qos 1", "retain_available false")
    visit = visit_broker(settings(small.port))
    assert visit.granted is not None
    assert (visit.granted.max_packet_bytes, visit.granted.receive_maximum) == (1500, 2)
    assert not visit.granted.retain_available
    found = list(broker.limit_findings(visit.granted, settings(small.port), LinkSettings()))
    text = "\n".join(f"{finding.level}: {finding.text}" for finding in found)
    assert "error: the broker takes packets of 1500 bytes; messages of up to 67108864 bytes need" in text
    assert "error: the broker retains nothing" in text
    assert "warning: 2 packets may be unacknowledged, we would use 16" in text


def rules_of(start: Start, folder: Path, acl: str, *, name: str, server: bool = False) -> list[Finding]:
    path = folder / "rules.acl"
    path.write_text(acl)
    path.chmod(0o644)
    running = start(f"acl_file {path}")
    rules = broker.server_rules(FLEET, SERVER) if server else broker.agent_rules(FLEET, NAME, SERVER)
    visit = visit_broker(
        settings(running.port, username=name, client_id=name), subscribe=rules.subscribe, publish=rules.publish
    )
    assert visit.failed == "done", visit.reason
    return list(broker.access_findings(rules, visit, own=subscriptions(FLEET, name, SERVER)))


def test_the_rules_of_broker_config_are_right_for_agent_and_server(start_mosquitto: Start, tmp_path: Path) -> None:
    acl = members_acl(FLEET, SERVER)
    assert one(rules_of(start_mosquitto, tmp_path, acl, name=NAME)) == (
        "ok",
        "4 things that this party needs are allowed, 5 that it must not do are refused",
    )
    assert one(rules_of(start_mosquitto, tmp_path, acl, name=SERVER, server=True))[0] == "ok"


def test_rules_that_are_too_tight(start_mosquitto: Start, tmp_path: Path) -> None:
    acl = members_acl(FLEET, SERVER).replace("pattern write sordino/ward/%u/reply\n", "")
    level, text = one(rules_of(start_mosquitto, tmp_path, acl, name=NAME))
    assert level == "error"
    assert text == ("the broker does not let this party answer the server (sordino/ward/alto/reply: Not authorized)")
    acl = members_acl(FLEET, SERVER).replace("pattern read sordino/ward/%u/peer/+\n", "")
    level, text = one(rules_of(start_mosquitto, tmp_path, acl, name=NAME))
    assert (level, "read what agents write to it" in text) == ("error", True)
    acl = members_acl(FLEET, SERVER).replace("topic write sordino/ward/hub/roster\n", "")
    level, text = one(rules_of(start_mosquitto, tmp_path, acl, name=SERVER, server=True))
    assert (level, "publish the roster" in text) == ("error", True)


def test_rules_that_are_too_loose(start_mosquitto: Start, tmp_path: Path) -> None:
    acl = members_acl(FLEET, SERVER) + "pattern write sordino/ward/hub/roster\n"
    level, text = one(rules_of(start_mosquitto, tmp_path, acl, name=NAME))
    assert level == "warning" and text.startswith("the broker lets this party publish a roster. Nobody would believe")
    acl = members_acl(FLEET, SERVER) + "pattern read sordino/ward/#\n"
    level, text = one(rules_of(start_mosquitto, tmp_path, acl, name=NAME))
    assert level == "warning" and "lets this party read what agents write to others" in text


def test_nobody_hears_a_visit(start_mosquitto: Start) -> None:
    """No retained packet is left, and none has a byte in it."""
    running = start_mosquitto()
    rules = broker.agent_rules(FLEET, NAME, SERVER)
    visit_broker(settings(running.port), subscribe=rules.subscribe, publish=rules.publish)
    after = visit_broker(settings(running.port, client_id="b"), subscribe=("sordino/#",), publish=rules.publish)
    assert after.retained == {}
    assert set(after.delivered.values()) == {b""}
