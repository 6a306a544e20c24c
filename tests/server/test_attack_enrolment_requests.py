"""What a device could send instead of an honest request."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from helpers_office import NOW_S, Office, packet_of, refused, swapped
from sordino_agent.enrolling import enroll
from sordino_common.channel.certificates import common_name, make_csr, new_tls_key, read_certificate, read_csr
from sordino_common.channel.enrolment import read_grant_packet, read_request_packet, token_key
from sordino_common.channel.identity import DeviceKey
from sordino_common.errors import CertificateError, CodecError, ConfigError, RemoteError, SignatureError
from sordino_common.messages.codec import decode, encode
from sordino_common.transport.topics import token_user
from sordino_server.enrolment.desk import MOST_WAITING
from sordino_server.enrolment.tokens import withdraw

OTHER = DeviceKey.generate()

SWAPPED: dict[str, dict[str, Any]] = {
    "sign key": {"sign_key": OTHER.public.sign_key},
    "box key": {"box_key": OTHER.public.box_key},
    "both keys": {"sign_key": OTHER.public.sign_key, "box_key": OTHER.public.box_key},
    "name": {"name": "pi-02"},
    "certificate request": {"csr": make_csr(new_tls_key(), "pi-01")},
    "roles": {"roles": ["data", "helper"]},
    "zone": {"zone": "ward-8"},
    "fleet": {"fleet": "plant"},
    "time": {"made_s": 1},
}


@pytest.mark.parametrize("what", SWAPPED)
def test_nobody_in_between_changes_a_request(what: str, shared: Office) -> None:
    packet = packet_of(shared.token())
    with pytest.raises(SignatureError):
        shared.desk.receive(swapped(packet, **SWAPPED[what]), who=None, now_s=NOW_S)
    assert shared.desk.pending() == []
    assert all(record.state == "open" for record in shared.store.tokens())  # nor is the token used up by that


def test_keys_of_their_own_under_a_token_that_they_lack(office: Office) -> None:
    """The whole request made anew, by somebody who saw the true one and knows the token's id: no secret, no proof."""
    token = office.token()
    attacker = DeviceKey.generate()
    forged = packet_of(token, identity=attacker, prover=token_key(os.urandom(32)))
    with pytest.raises(SignatureError, match="enrol-token"):
        office.desk.receive(forged, who=token_user(token.id), now_s=NOW_S)
    # The proof of the true request does not fit either.
    true = packet_of(token)
    kind, raw, signature, _ = decode(forged)
    with pytest.raises(SignatureError):
        office.desk.receive(encode([kind, raw, signature, decode(true)[3]]), who=None, now_s=NOW_S)
    assert office.desk.pending() == []
    assert office.store.token(token.id).state == "open"  # type: ignore[union-attr]


def test_a_token_is_for_one_device_and_a_while(office: Office) -> None:
    token = office.token()
    first = packet_of(token)
    refused(office, first, "has expired; make a new one", now_s=NOW_S + 3601)
    assert office.desk.receive(first, who=None, now_s=NOW_S).news
    assert not office.desk.receive(first, who=None, now_s=NOW_S + 9e9).news  # the broker repeats it: nothing happens
    refused(office, packet_of(token), "was used by another request already")
    refused(office, packet_of(token, name="pi-02"), "was used by another request already")
    (waiting,) = office.desk.pending()
    assert waiting.others == 2  # the operator is told that somebody else knows the token
    other = office.token()
    withdraw(office.store, other.id.hex())
    refused(office, packet_of(other), "was withdrawn")
    unknown = msgspec.structs.replace(other, id=bytes(8))
    refused(office, packet_of(unknown), "was not made here")
    with pytest.raises(ConfigError, match="is used already"):
        withdraw(office.store, token.id.hex())
    for text in ("", "zz", "00" * 8):
        with pytest.raises(ConfigError, match="there is no token"):
            withdraw(office.store, text)


def test_a_bound_token_binds(office: Office) -> None:
    token = office.token(name="pi-01", roles=("data",), zone="ward-7")
    refused(office, packet_of(token, name="pi-02"), "is for pi-01")
    refused(office, packet_of(token, roles=("data", "helper")), "is for data in zone ward-7, the request says")
    refused(office, packet_of(token, zone="default"), "is for data in zone ward-7")
    refused(office, packet_of(token, fleet="plant"), "asks for fleet plant, this is lab")
    refused(office, packet_of(office.token(), name="server"), "this is the server's name")
    assert office.desk.receive(packet_of(token), who=None, now_s=NOW_S).news


def test_a_request_lies_in_its_own_place(office: Office) -> None:
    token, other = office.token(), office.token()
    packet = packet_of(token)
    refused(office, packet, "left in the place of", who=token_user(other.id))
    refused(office, packet, "left in the place of pi-01", who="pi-01")
    assert office.desk.receive(packet, who=token_user(token.id), now_s=NOW_S).news


@pytest.mark.parametrize(
    "name", ["Pi-01", "pi/01", "pi+", "#", "", "a" * 64, "_enrol-0011223344556677", "pi 01", "\u03c0", "-pi"]
)
def test_names_that_are_none(name: str, shared: Office) -> None:
    token = shared.token()
    packet = packet_of(token)
    with pytest.raises(CodecError, match="enrol-request"):
        shared.desk.receive(swapped(packet, name=name), who=None, now_s=NOW_S)
    with pytest.raises(ConfigError):
        shared.token(name=name)
    with pytest.raises(ConfigError):
        enroll(
            shared.folder / "x", token=token.text(), name=name or None, wait_s=0, offline=True, grant=None, say=print
        )
    assert not (shared.folder / "x" / "agent.yaml").exists()


MALFORMED: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda packet: b"",
    "text": lambda packet: b"hello",
    "cut": lambda packet: packet[:-1],
    "more": lambda packet: packet + b"\0",
    "too large": lambda packet: encode(["enrol-request", bytes(9000), b"", b""]),
    "another kind": lambda packet: encode(["hello", *decode(packet)[1:]]),
    "three parts": lambda packet: encode(decode(packet)[:3]),
    "five parts": lambda packet: encode([*decode(packet), b""]),
    "numbers": lambda packet: encode(["enrol-request", 1, 2, 3]),
    "a field more": lambda packet: encode(
        [decode(packet)[0], encode([*decode(decode(packet)[1]), 1]), *decode(packet)[2:]]
    ),
    "small order": lambda packet: swapped(packet, sign_key=bytes(32)),
    "short key": lambda packet: swapped(packet, box_key=bytes(31)),
    "role king": lambda packet: swapped(packet, roles=["king"]),
    "role server": lambda packet: swapped(packet, roles=["server"]),
    "no role": lambda packet: swapped(packet, roles=[]),
    "role twice": lambda packet: swapped(packet, roles=["data", "data"]),
    "enrol without token": lambda packet: swapped(packet, token=b""),
    "enrol with previous": lambda packet: swapped(packet, previous=bytes(32)),
    "no proof": lambda packet: encode([*decode(packet)[:3], b""]),
    "renew with proof": lambda packet: swapped(packet, purpose="renew", token=b""),
    "huge csr": lambda packet: swapped(packet, csr=bytes(3000)),
}  # fmt: skip


@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_no_request(what: str, shared: Office) -> None:
    packet = packet_of(shared.token())
    with pytest.raises((CodecError, SignatureError)) as caught:
        shared.desk.receive(MALFORMED[what](packet), who=None, now_s=NOW_S)
    assert len(str(caught.value)) < 400
    assert shared.desk.pending() == []


def test_every_bit_of_a_request_counts(shared: Office) -> None:
    packet = packet_of(shared.token())
    for at in range(0, len(packet), 7):
        damaged = packet[:at] + bytes([packet[at] ^ (1 << at % 8)]) + packet[at + 1 :]
        with pytest.raises(RemoteError):
            shared.desk.receive(damaged, who=None, now_s=NOW_S)
    assert shared.desk.pending() == []


def _csr(key: Any, *, name: x509.Name, digest: Any) -> bytes:
    return x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, digest).public_bytes(Encoding.DER)


BAD_CSR: dict[str, tuple[Callable[[], bytes], str]] = {
    "another name": (lambda: make_csr(new_tls_key(), "server"), "it asks for 'CN=server'"),
    "more in the name": (
        lambda: _csr(
            new_tls_key(),
            name=x509.Name([*common_name("pi-01"), *common_name("server")]),
            digest=hashes.SHA256(),
        ),
        "it asks for",
    ),
    "another curve": (
        lambda: _csr(ec.generate_private_key(ec.SECP384R1()), name=common_name("pi-01"), digest=hashes.SHA256()),
        "expected an ECDSA key on P-256",
    ),
    "rsa": (
        lambda: _csr(rsa.generate_private_key(65537, 2048), name=common_name("pi-01"), digest=hashes.SHA256()),
        "expected an ECDSA key on P-256",
    ),
    "ed25519": (
        lambda: _csr(ed25519.Ed25519PrivateKey.generate(), name=common_name("pi-01"), digest=None),
        "expected an ECDSA key on P-256",
    ),
    "garbage": (lambda: b"\x30\x03\x02\x01\x01", "malformed"),
    "somebody else's key": (lambda: _stolen(), "not signed by the key that it names"),
}


def _stolen() -> bytes:
    """The public key of another, which we can't sign for."""
    theirs, ours = make_csr(new_tls_key(), "pi-01"), make_csr(new_tls_key(), "pi-01")
    size = 70  # at most, of a signature's DER at the end
    return theirs[: len(theirs) - size] + ours[len(ours) - size :] if len(theirs) == len(ours) else _stolen()


@pytest.mark.parametrize("what", BAD_CSR)
def test_certificate_requests_that_are_refused(what: str, shared: Office) -> None:
    make, words = BAD_CSR[what]
    with pytest.raises(CertificateError, match=words):
        shared.desk.receive(packet_of(shared.token(), csr=make()), who=None, now_s=NOW_S)
    with pytest.raises(CertificateError):
        read_csr(make(), name="pi-01")


def test_extensions_that_a_request_asks_for_are_not_given(office: Office) -> None:
    key = new_tls_key()
    builder = x509.CertificateSigningRequestBuilder().subject_name(common_name("pi-01"))
    greedy = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).add_extension(
        x509.SubjectAlternativeName([x509.DNSName("broker.example")]), critical=False
    )
    csr = greedy.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
    office.let_in(packet_of(office.token(), csr=csr))
    certificate = read_certificate(read_grant_packet(office.grant_for("pi-01")).certificate)
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [purpose.dotted_string for purpose in usage] == ["1.3.6.1.5.5.7.3.2"]  # a client, and nothing else
    with pytest.raises(x509.ExtensionNotFound):
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)


def test_two_devices_of_one_name(office: Office) -> None:
    first, second = packet_of(office.token()), packet_of(office.token())
    office.desk.receive(first, who=None, now_s=NOW_S)
    office.desk.receive(second, who=None, now_s=NOW_S)
    with pytest.raises(ConfigError, match="2 requests of pi-01: name the one that its device shows"):
        office.desk.find("pi-01", "pending")
    filed = office.desk.find(read_request_packet(first).fingerprint, "pending")
    office.desk.approve(filed)
    with pytest.raises(ConfigError, match="pi-01 is in the roster with other keys"):
        office.desk.approve(office.desk.find(read_request_packet(second).fingerprint, "pending"))


def test_nobody_fills_the_desk(office: Office) -> None:
    for _ in range(MOST_WAITING):
        office.desk.receive(packet_of(office.token()), who=None, now_s=NOW_S)
    refused(office, packet_of(office.token()), f"{MOST_WAITING} requests of this name wait already")


def test_a_stolen_desk_makes_no_request(shared: Office) -> None:
    """Whoever has read all that the fleet directory knows of a token has no proof of it."""
    token = shared.token()
    record = shared.store.token(token.id)
    assert record is not None
    for secret in (record.proof_key, record.id * 4):
        with pytest.raises(SignatureError):
            shared.desk.receive(packet_of(token, prover=token_key(secret)), who=None, now_s=NOW_S)
