"""`sordino broker-config` on a real mosquitto: who gets in, who may publish and read what, what a revocation does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from helpers_enrol import FleetBroker, RawClient, make_fleet, member_file
from helpers_mosquitto import require_mosquitto
from sordino_common.channel.certificates import new_tls_key, write_identity
from sordino_common.errors import ConfigError
from sordino_common.transport.topics import token_user
from sordino_server.cli import app, run_cli
from sordino_server.enrolment.broker_config import BrokerLimits, BrokerPlan, members_acl, write_broker
from sordino_server.enrolment.ca import Authority, Revoked, fleet_authority, host_name, token_authority
from sordino_server.home import Home, create_home

pytestmark = pytest.mark.timeout(120)

TOKEN = bytes(range(8))
OTHER_TOKEN = bytes(range(8, 16))


@dataclass
class Bench:
    """One broker, and its clients by name; each connects once."""

    home: Home
    folder: Path
    plan: BrokerPlan
    broker: FleetBroker
    clients: dict[str, RawClient] = field(default_factory=dict)

    def client(self, name: str) -> RawClient:
        if name not in self.clients:
            client = self.clients[name] = self.fresh(name)
            assert client.connect(), self.broker.log
        return self.clients[name]

    def fresh(self, name: str, *, client_id: str | None = None) -> RawClient:
        if name == "token":
            return self.token_client(TOKEN)
        identity, _ = member_file(self.folder, fleet_authority(self.home.folder), name)
        return self.with_identity(identity, client_id or name)

    def with_identity(self, identity: Path | None, client_id: str, *, port: int | None = None) -> RawClient:
        return RawClient(port or self.plan.port, ca=self.folder / "ca.pem", identity=identity, client_id=client_id)

    def token_client(self, token: bytes, *, port: int | None = None, hours: float = 1.0) -> RawClient:
        path = token_file(self.folder, token_authority(self.home.folder), token, ends_s=time.time() + 3600 * hours)
        return self.with_identity(path, token_user(token), port=port or self.plan.enrol_port)


def token_file(folder: Path, authority: Authority, token: bytes, *, ends_s: float) -> Path:
    key = ed25519.Ed25519PrivateKey.generate()
    der = authority.issue_token(token, key.public_key(), now_s=ends_s - 3600, ends_s=ends_s)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path = folder / f"token-{token.hex()}-{int(ends_s)}.pem"
    path.write_bytes(pem + x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM))
    return path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    require_mosquitto()
    home, folder, plan = make_fleet(tmp_path_factory.mktemp("broker"), limits=BrokerLimits(packet_bytes=100_000))
    with FleetBroker(folder) as broker:
        made = Bench(home, folder, plan, broker)
        yield made
        for client in made.clients.values():
            client.close()


L = "sordino/lab"
T = token_user(TOKEN)

PUBLISH = {
    "agent-a": (
        (f"{L}/agent-a/status", f"{L}/agent-a/reply", f"{L}/agent-a/request", f"{L}/agent-b/peer/agent-a"),
        (
            f"{L}/agent-b/status", f"{L}/agent-b/reply", f"{L}/agent-b/request", f"{L}/agent-b/cmd",
            f"{L}/agent-a/cmd", f"{L}/agent-a/grant", f"{L}/agent-b/grant", f"{L}/agent-a/roster",
            f"{L}/agent-b/peer/agent-c", f"{L}/agent-b/peer/server", f"{L}/agent-a/peer/agent-b",
            f"{L}/server/roster", f"{L}/server/status", f"{L}/server/cmd", f"{L}/{T}/request", f"{L}/{T}/grant",
            "sordino/other/agent-a/status", "sordino/other/agent-b/peer/agent-a", "other/lab/agent-a/status",
            f"{L}/agent-a", f"{L}/agent-a/status/more", L, "agent-a", "$SYS/broker/uptime",
        ),
    ),
    "server": (
        (f"{L}/agent-a/cmd", f"{L}/agent-a/grant", f"{L}/agent-a/request", f"{L}/server/roster", f"{L}/server/status"),
        (
            f"{L}/agent-a/reply", f"{L}/agent-a/status", f"{L}/agent-b/peer/agent-a", f"{L}/agent-a/roster",
            "sordino/other/server/roster", "sordino/other/agent-a/cmd",
        ),
    ),
    "token": (
        (f"{L}/{T}/request",),
        (
            f"{L}/{T}/grant", f"{L}/{T}/status", f"{L}/{T}/reply", f"{L}/agent-a/peer/{T}", f"{L}/agent-a/request",
            f"{L}/{token_user(OTHER_TOKEN)}/request", f"{L}/server/roster", f"{L}/server/status", "sordino/x/y/request",
        ),
    ),
}  # fmt: skip


@pytest.mark.mqtt
@pytest.mark.parametrize("who", PUBLISH)
def test_who_may_publish_where(who: str, bench: Bench) -> None:
    allowed, forbidden = PUBLISH[who]
    client = bench.client(who)
    assert [topic for topic in allowed if not client.may_publish(topic)] == []
    assert [topic for topic in forbidden if client.may_publish(topic)] == []


# (reader, filters, what arrives of everything that is published)
READ = {
    "agent-a": (
        ("#", "+/#", "sordino/#", f"{L}/#", f"{L}/+/cmd", f"{L}/agent-b/peer/+", f"{L}/+/peer/+", f"{L}/agent-b/cmd",
         f"{L}/agent-b/reply", f"{L}/agent-b/status", f"{L}/agent-a/reply", f"{L}/agent-b/grant", f"{L}/{T}/grant",
         f"{L}/{T}/request", f"{L}/+/request", f"{L}/+/grant", "$SYS/#", "$SYS/broker/version", "$share/x/#"),
        {f"{L}/agent-a/cmd", f"{L}/agent-a/grant", f"{L}/agent-a/peer/agent-b", f"{L}/server/status",
         f"{L}/server/roster"},
    ),
    "server": (
        ("#", f"{L}/#", f"{L}/+/peer/+", f"{L}/agent-a/cmd", "$SYS/#"),
        {f"{L}/agent-a/reply", f"{L}/agent-a/status", f"{L}/agent-a/request", f"{L}/agent-b/reply",
         f"{L}/agent-b/status", f"{L}/agent-b/request", f"{L}/server/status", f"{L}/server/roster", f"{L}/{T}/request"},
    ),
    "token": (
        ("#", f"{L}/#", f"{L}/+/grant", f"{L}/agent-a/grant", f"{L}/server/roster", f"{L}/server/status", "$SYS/#"),
        {f"{L}/{T}/grant"},
    ),
}  # fmt: skip

SENT = {
    "agent-a": (f"{L}/agent-a/reply", f"{L}/agent-a/status", f"{L}/agent-a/request", f"{L}/agent-b/peer/agent-a"),
    "agent-b": (f"{L}/agent-b/reply", f"{L}/agent-b/status", f"{L}/agent-b/request", f"{L}/agent-a/peer/agent-b"),
    "token": (f"{L}/{T}/request",),
    "server": (
        *(f"{L}/{to}/{what}" for to in ("agent-a", "agent-b") for what in ("cmd", "grant")),
        f"{L}/{T}/grant", f"{L}/server/status", f"{L}/server/roster",
    ),
}  # fmt: skip


@pytest.mark.mqtt
@pytest.mark.parametrize("who", READ)
def test_who_may_read_what(who: str, bench: Bench) -> None:
    filters, allowed = READ[who]
    reader = bench.fresh(who, client_id=f"{who}-reader") if who != "token" else bench.token_client(TOKEN)
    bench.clients.pop("token", None) if who == "token" else None  # the reader has taken its place
    assert reader.connect()
    try:
        # Retained packets come at once, live ones as they are sent; the marker is behind both.
        for client, topics in SENT.items():
            for topic in topics:
                if client != who or who != "token":
                    assert bench.client(client).may_publish(topic, b"kept", retain=True)
        for topic_filter in filters:
            reader.subscribe(topic_filter)
        for topic in allowed:
            reader.subscribe(topic)
        for client, topics in SENT.items():
            for topic in topics:
                if client != who or who != "token":
                    assert bench.client(client).may_publish(topic, b"live")
        to = {"agent-a": f"{L}/agent-a/cmd", "server": f"{L}/server/status", "token": f"{L}/{T}/grant"}[who]
        assert bench.client("server").may_publish(to, b"marker")
        heard = reader.hear_until(b"marker")
    finally:
        reader.close()
        for client, topics in SENT.items():
            for topic in topics:
                if client != "token":
                    bench.client(client).may_publish(topic, b"", retain=True)
    topics_heard = {item.topic for item in heard}
    assert topics_heard == allowed


@pytest.mark.mqtt
def test_who_gets_no_connection(bench: Bench, tmp_path: Path) -> None:
    authority = fleet_authority(bench.home.folder)
    other = Authority.create(tmp_path / "ca", "ca", title="Sordino fleet lab", key=new_tls_key(), now_s=time.time())
    long_ago_s = time.time() - 400 * 86_400
    strangers = {
        "no certificate": bench.with_identity(None, "nobody"),
        "another authority of the same name": bench.with_identity(member_file(tmp_path, other, "agent-a")[0], "x1"),
        "expired": bench.with_identity(member_file(tmp_path, authority, "agent-a", now_s=long_ago_s)[0], "x2"),
        "not yet valid": bench.with_identity(
            member_file(tmp_path, authority, "agent-a", now_s=time.time() + 86_400)[0], "x3"
        ),
        "the broker's own certificate": bench.with_identity(_joined(bench.folder, tmp_path), "x4"),
        "a token on the members' port": bench.token_client(TOKEN, port=bench.plan.port),
        "a member on the tokens' port": bench.with_identity(
            member_file(tmp_path, authority, "agent-a")[0], "x5", port=bench.plan.enrol_port
        ),
        "an expired token": bench.token_client(OTHER_TOKEN, hours=-0.1),
        "no certificate, tokens' port": bench.with_identity(None, "x6", port=bench.plan.enrol_port),
    }
    taken = [what for what, client in strangers.items() if client.connect()]
    for client in strangers.values():
        client.close()
    assert taken == []


def _joined(folder: Path, into: Path) -> Path:
    path = into / "as-client.pem"
    path.write_bytes((folder / "broker.key").read_bytes() + (folder / "broker.pem").read_bytes())
    return path


@pytest.mark.mqtt
def test_a_name_with_wildcards_has_no_topics_at_all(bench: Bench, tmp_path: Path) -> None:
    """The authority gives names of the roster only; should one slip through, the ACL is no way out."""
    for name in ("+", "#", "agent-a/cmd", "+/peer/x"):
        key = new_tls_key()
        certificate = fleet_authority(bench.home.folder).issue_member(name, key.public_key(), now_s=time.time())
        write_identity(tmp_path / "wild.pem", key, certificate)
        client = bench.with_identity(tmp_path / "wild.pem", f"wild-{len(name)}")
        if client.connect():
            for topic in (f"{L}/agent-b/status", f"{L}/agent-b/reply", f"{L}/agent-b/request"):
                assert not client.may_publish(topic), (name, topic)
        client.close()


@pytest.mark.mqtt
def test_packets_beyond_the_limit_end_the_connection(bench: Bench) -> None:
    client = bench.fresh("agent-c")
    assert client.connect()
    assert client.may_publish(f"{L}/agent-c/reply", bytes(90_000))
    assert not client.may_publish(f"{L}/agent-c/reply", bytes(120_000))
    client.close()


@pytest.mark.mqtt
def test_a_revoked_certificate_is_refused_at_once_and_after_a_restart(tmp_path: Path) -> None:
    home, folder, plan = make_fleet(tmp_path)
    authority = fleet_authority(home.folder)
    now_s = time.time()
    identity, certificate = member_file(tmp_path, authority, "agent-a")
    kept, _ = member_file(tmp_path, authority, "agent-b")

    def taken(path: Path) -> bool:
        client = RawClient(plan.port, ca=folder / "ca.pem", identity=path, client_id=path.stem)
        try:
            return client.connect()
        finally:
            client.close()

    with FleetBroker(folder) as broker:
        assert taken(identity)
        # Twice within a second, as a script may do: the newer list counts.
        first = authority.crl((), number=2, now_s=now_s, after_s=now_s - 3600)
        (folder / "crl.pem").write_bytes(first)
        broker.reload()
        assert taken(identity)  # and by now the broker is done with reading: a SIGHUP while it reads is lost on it
        revoked = [Revoked(serial=certificate.serial_number, at_s=int(now_s))]
        (folder / "crl.pem").write_bytes(authority.crl(revoked, number=3, now_s=now_s, after_s=now_s - 3599))
        broker.reload()
        assert not taken(identity)
        assert taken(kept)
        broker.stop()
        broker.start()
        assert not taken(identity)
        assert taken(kept)


@pytest.mark.mqtt
def test_tied_client_ids_cant_be_taken_over_by_others(tmp_path: Path) -> None:
    home, folder, plan = make_fleet(tmp_path, tie_client_ids=True)
    authority = fleet_authority(home.folder)
    with FleetBroker(folder):
        victim = RawClient(
            plan.port, ca=folder / "ca.pem", identity=member_file(tmp_path, authority, "agent-a")[0], client_id="a"
        )
        thief = RawClient(
            plan.port, ca=folder / "ca.pem", identity=member_file(tmp_path, authority, "agent-b")[0], client_id="a"
        )
        assert victim.connect()
        assert thief.connect()
        assert victim.may_publish(f"{L}/agent-a/status")
        assert thief.may_publish(f"{L}/agent-b/status")
        assert not thief.may_publish(f"{L}/agent-a/status")
        victim.close()
        thief.close()


def test_the_command_writes_the_folder_and_points_the_fleet_at_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = tmp_path / "fleet"
    create_home(fleet, fleet="lab", server="server", broker="elsewhere")
    arguments = ["broker-config", str(tmp_path / "broker"), "--host", "broker.example", "--host", "10.0.0.5"]
    assert run_cli(app, [*arguments, "--fleet", str(fleet)], program="sordino") == 0
    said = capsys.readouterr()
    assert "port 8883" in said.out and "port 8884" in said.out and "keep it where operator.key is kept" in said.out
    assert said.err == ""
    assert f"install -D -m 644 {tmp_path}/broker/service.conf /etc/systemd/system/mosquitto.service.d/" in said.out
    drop_in = (tmp_path / "broker" / "service.conf").read_text()
    assert f'\nExecStart=/usr/sbin/mosquitto -c "{tmp_path}/broker/mosquitto.conf"\n' in drop_in
    assert "\nUser=mosquitto\n" in drop_in  # and never root, who would read what the broker's user could have written
    broker = Home(fleet).spec.broker
    assert (broker.host, broker.port, broker.tls is not None and broker.tls.ca) == ("broker.example", 8883, "ca/ca.pem")
    for secret in ("broker.key", "members.acl", "tokens.acl"):
        assert (tmp_path / "broker" / secret).stat().st_mode & 0o777 == 0o600
    for secret in ("ca/ca.key", "ca/enrol.key", "server.pem"):
        assert (fleet / secret).stat().st_mode & 0o777 == 0o600
    before = (tmp_path / "broker" / "mosquitto.conf").read_bytes()
    assert run_cli(app, [*arguments, "--fleet", str(fleet)], program="sordino") == 2
    assert "--again" in capsys.readouterr().err
    assert run_cli(app, [*arguments, "--again", "--fleet", str(fleet)], program="sordino") == 0
    assert (tmp_path / "broker" / "mosquitto.conf").read_bytes() == before


def test_an_edited_fleet_file_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = tmp_path / "fleet"
    create_home(fleet, fleet="lab", server="server", broker="elsewhere")
    text = (fleet / "fleet.yaml").read_text() + "# mine\n"
    (fleet / "fleet.yaml").write_text(text)
    arguments = ["broker-config", str(tmp_path / "broker"), "--host", "10.0.0.5", "--fleet", str(fleet)]
    assert run_cli(app, arguments, program="sordino") == 0
    assert 'tls: {"ca": "ca/ca.pem", "certificate": "server.pem"}' in capsys.readouterr().err
    assert (fleet / "fleet.yaml").read_text() == text


@pytest.mark.parametrize("host", ["", "a b", "-x", "broker.example/x", "x" * 300, "*.example", "a\nb"])
def test_hosts_that_are_none(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a host name or an IP address"):
        host_name(host)
    home = create_home(tmp_path / "fleet", fleet="lab", server="server", broker="b")
    with pytest.raises(ConfigError):
        write_broker(home, tmp_path / "b", BrokerPlan(hosts=(host,), port=1, enrol_port=2), now_s=time.time())
    assert not (tmp_path / "b").exists()


def test_the_access_rules_name_no_wildcard_for_what_members_publish() -> None:
    for line in members_acl("lab", "server").splitlines():
        if line.startswith("pattern write"):
            assert "%u" in line and "#" not in line
    assert "#\n" not in members_acl("lab", "server")
