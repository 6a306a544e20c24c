"""TLS to a real mosquitto: certificates made here, by `cryptography`; the broker asks for a client certificate."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from helpers_mosquitto import Mosquitto
from helpers_transport import LAWS, MqttHarness, Recorder, mqtt_harness
from sordino_common.errors import ConfigError
from sordino_common.transport.dialing import explain
from sordino_common.transport.mqtt import MqttSettings, MqttTransport, TlsSettings
from sordino_common.transport.mqtt_settings import tls_context
from sordino_common.transport.reactor import Reactor
from sordino_common.transport.wire import Wire


class Authority:
    """A certificate authority in a folder: `issue` writes NAME.crt and NAME.key."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = folder / f"{name}.crt"
        usage = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=True,
            crl_sign=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        own = (
            self._begin(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate.write_bytes(own.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *alternatives: x509.GeneralName, server: bool = False) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = self._begin(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key).add_extension(
            x509.ExtendedKeyUsage([purpose]), critical=False
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        certificate, key_file = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        certificate.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate, key_file

    def _begin(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )


class TlsHarness(MqttHarness):
    """`MqttHarness` whose parties speak TLS with a client certificate."""

    tls: TlsSettings

    def settings(self, client_id: str, **changes: Any) -> MqttSettings:
        return super().settings(client_id, **{"tls": self.tls, **changes})


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


@pytest.fixture
def broker(authority: Authority, start_mosquitto: Callable[..., Mosquitto]) -> Mosquitto:
    names = (x509.DNSName("broker.example"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    certificate, key = authority.issue("broker", *names, server=True)
    return start_mosquitto(
        f"cafile {authority.certificate}",
        f"certfile {certificate}",
        f"keyfile {key}",
        "require_certificate true",
        "tls_version tlsv1.2",  # mosquitto: this or newer
    )


def _settings(authority: Authority, **changes: Any) -> TlsSettings:
    certificate, key = authority.issue("device")
    base = {"ca": str(authority.certificate), "certificate": str(certificate), "key": str(key)}
    return TlsSettings(**{**base, **changes})


@pytest.mark.mqtt
@pytest.mark.parametrize(
    "law",
    [
        "delivers_at_least_once",
        "publishes_the_will_of_who_dies",
        "keeps_the_will_of_who_closes",
        "comes_back_after_a_restart",
        "lets_a_slow_subscriber_be_slow",
        "says_when_there_is_room_again",
        "refuses_what_is_too_large",
    ],
)
def test_laws_hold_over_tls(law: str, broker: Mosquitto, authority: Authority) -> None:
    harness = TlsHarness(broker)
    harness.tls = _settings(authority)
    try:
        LAWS[law](harness)
    finally:
        harness.close()


@pytest.mark.mqtt
def test_the_brokers_name_may_be_another_than_its_address(broker: Mosquitto, authority: Authority) -> None:
    with mqtt_harness(broker) as harness:
        named, heard = harness.make("a", tls=_settings(authority, server_name="broker.example")), Recorder()
        misnamed, heard_no = harness.make("b", tls=_settings(authority, server_name="other.example")), Recorder()
        named.open(heard)
        misnamed.open(heard_no)
        harness.run_until(lambda: named.connected and bool(heard_no.reasons))
        assert "certificate is not accepted" in heard_no.reasons[0]
        assert "other.example" in heard_no.reasons[0]
        assert heard_no.connects == 0


@pytest.mark.mqtt
def test_without_a_client_certificate_the_broker_refuses(
    broker: Mosquitto, authority: Authority, tmp_path: Path
) -> None:
    foreign_folder = tmp_path / "foreign"
    foreign_folder.mkdir()
    foreign_certificate, foreign_key = Authority(foreign_folder, "foreign").issue("device")
    with mqtt_harness(broker) as harness:
        bare = TlsSettings(ca=str(authority.certificate))
        foreign = _settings(authority, certificate=str(foreign_certificate), key=str(foreign_key))
        good, heard_good = harness.make("good", tls=_settings(authority)), Recorder()
        parties = [(harness.make(f"p{index}", tls=tls), Recorder()) for index, tls in enumerate((bare, foreign))]
        good.open(heard_good)
        for party, heard in parties:
            party.open(heard)
        harness.run_until(lambda: good.connected and all(heard.reasons for _, heard in parties))
        assert not any(heard.connects for _, heard in parties)
        bare_reason, foreign_reason = (heard.reasons[0] for _, heard in parties)
        assert "asks for a client certificate that it accepts" in bare_reason
        assert "does not accept our client certificate (TLSV1_ALERT_UNKNOWN_CA)" in foreign_reason
        assert all("see tls.certificate, tls.key" in reason for reason in (bare_reason, foreign_reason))


@pytest.mark.mqtt
def test_a_renewed_certificate_is_taken_at_the_next_connection(
    broker: Mosquitto, authority: Authority, tmp_path: Path
) -> None:
    (tmp_path / "foreign").mkdir()
    identity = tmp_path / "identity.pem"

    def put(certificate: Path, key: Path) -> None:
        identity.write_bytes(key.read_bytes() + certificate.read_bytes())

    put(*Authority(tmp_path / "foreign", "foreign").issue("device"))
    tls = TlsSettings(ca=str(authority.certificate), certificate=str(identity))
    with mqtt_harness(broker) as harness:
        party, heard = harness.make("a", tls=tls, refused_s=0.05, reconnect_least_s=0.05), Recorder()
        party.open(heard)
        harness.run_until(lambda: len(heard.reasons) > 1)
        identity.write_bytes(b"half a file")  # the last good one stays in use, and nothing breaks
        count = len(heard.reasons)
        harness.run_until(lambda: len(heard.reasons) > count + 1)
        assert heard.connects == 0
        put(*authority.issue("device"))
        harness.run_until(lambda: party.connected)


def _shakes_hands_and_closes(authority: Authority, *, trusts: Path | None) -> tuple[Thread, int]:
    """A TLS server for one connection, and its port: asks for a certificate of `trusts`, if given; then closes."""
    certificate, key = authority.issue("broker", x509.IPAddress(ipaddress.ip_address("127.0.0.1")), server=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    if trusts is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(trusts)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as bare, suppress(ssl.SSLError):
            bare.settimeout(30.0)
            context.wrap_socket(bare, server_side=True).close()

    thread = Thread(target=serve, daemon=True)
    thread.start()
    return thread, int(listener.getsockname()[1])


def _use_until_it_breaks(wire: Wire, *, writes_first: bool) -> None:
    while writes_first:
        wire.send(b"connect")  # the kernel takes it until the peer's reset is in
    wire.fill()
    wire.recv(1)


@pytest.mark.parametrize("writes_first", [False, True])
def test_the_alert_is_heard_whether_we_read_or_write_first(
    writes_first: bool, authority: Authority, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    thread, port = _shakes_hands_and_closes(authority, trusts=Authority(tmp_path / "other", "other").certificate)
    with socket.create_connection(("127.0.0.1", port), timeout=30.0) as bare:
        sock = tls_context(_settings(authority)).wrap_socket(bare, server_hostname="127.0.0.1")
        thread.join(30.0)  # has sent its alert, and has closed
        with Reactor() as reactor:
            wire = Wire(sock, reactor, most_bytes=4096)
            with pytest.raises(OSError):  # the alert, or what the kernel makes of it
                _use_until_it_breaks(wire, writes_first=writes_first)
        assert wire.error is not None
        assert explain(wire.error) == (
            "the broker does not accept our client certificate (TLSV1_ALERT_UNKNOWN_CA); "
            "see tls.certificate, tls.key, and the broker's list of authorities"
        )
        sock.close()


def test_a_broker_that_hangs_up_without_a_word_gets_the_remedy_too(authority: Authority) -> None:
    """An alert can be lost with the connection. Then nobody knows why, and the reason says what to look at."""
    thread, port = _shakes_hands_and_closes(authority, trusts=None)
    heard = Recorder()
    settings = MqttSettings(host="127.0.0.1", port=port, client_id="a", tls=_settings(authority))
    with Reactor() as reactor:
        transport = MqttTransport(settings, reactor)
        transport.open(heard)
        assert reactor.run_until(lambda: bool(heard.reasons), deadline_s=reactor.now_s() + 30.0)
        transport.close()
    thread.join(30.0)
    assert f"the connection to 127.0.0.1:{port} was lost before the broker answered: " in heard.reasons[0]
    assert (
        "if the broker asks for a client certificate, it may not accept ours, see tls.certificate" in heard.reasons[0]
    )


@pytest.mark.mqtt
def test_a_broker_that_another_authority_signed_is_refused(
    broker: Mosquitto, authority: Authority, tmp_path: Path
) -> None:
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    other = Authority(other_folder, "other")
    with mqtt_harness(broker) as harness:
        transport, heard = harness.make("a", tls=_settings(authority, ca=str(other.certificate))), Recorder()
        transport.open(heard)
        harness.run_until(lambda: bool(heard.reasons))
        assert "the broker's certificate is not accepted" in heard.reasons[0]
        assert transport.connections == 0


@pytest.mark.mqtt
def test_a_broker_without_tls_is_named(start_mosquitto: Callable[..., Mosquitto], authority: Authority) -> None:
    with mqtt_harness(start_mosquitto()) as harness:
        transport, heard = harness.make("a", tls=_settings(authority)), Recorder()
        transport.open(heard)
        harness.run_until(lambda: bool(heard.reasons))
        assert "TLS with 127.0.0.1" in heard.reasons[0]


def test_tls_is_1_2_at_least_and_checks_names(authority: Authority) -> None:
    context = tls_context(_settings(authority))
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname


def test_files_that_do_not_serve_are_named(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("device")
    other_certificate, _ = authority.issue("other")
    noise = tmp_path / "noise.pem"
    noise.write_text("no certificate")
    locked = tmp_path / "locked.key"
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    locked.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"hush"),
        )
    )
    bad: list[tuple[dict[str, str], str]] = [
        ({"ca": "/nowhere.pem"}, "tls.ca: /nowhere.pem: No such file"),
        ({"ca": str(noise)}, "expected certificates in PEM"),
        ({"certificate": "/nowhere.pem"}, "tls.certificate: /nowhere.pem"),
        ({"certificate": str(certificate), "key": "/nowhere.pem"}, "tls.key: /nowhere.pem"),
        ({"certificate": str(other_certificate), "key": str(key)}, "other.crt with key"),
        ({"certificate": str(certificate), "key": str(locked)}, "unencrypted key"),
        ({"certificate": str(noise)}, "noise.pem"),
        ({"key": str(key)}, "no tls.certificate"),
    ]
    for given, words in bad:
        with pytest.raises(ConfigError, match=words):
            MqttTransport(MqttSettings(host="h", client_id="a", tls=TlsSettings(**given)), reactor=None)  # type: ignore[arg-type]
