"""Tokens, requests, approval, certificates and grants, without a broker: what each party could send instead."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from helpers_enrol import make_fleet
from sordino_agent.config import load_agent_config
from sordino_agent.enrolling import enroll
from sordino_agent.errand import Errand
from sordino_agent.service import roster_book
from sordino_common.channel.certificates import (
    check_certificate,
    common_name,
    make_csr,
    new_tls_key,
    read_certificate,
    read_csr,
    read_identity,
)
from sordino_common.channel.enrolment import (
    EnrolmentRefused,
    Grant,
    Request,
    Token,
    from_text,
    make_request,
    read_grant_packet,
    read_request_packet,
    read_token,
    to_text,
    token_key,
)
from sordino_common.channel.identity import DeviceKey, OperatorKey
from sordino_common.channel.roster import Roster, sign_roster
from sordino_common.errors import (
    CertificateError,
    CodecError,
    ConfigError,
    RemoteError,
    RosterError,
    SignatureError,
)
from sordino_common.messages.codec import decode, encode
from sordino_common.transport.topics import token_user
from sordino_server.cli import app, run_cli
from sordino_server.doctor.house import house_findings
from sordino_server.enrolment import order as orders
from sordino_server.enrolment.broker_config import BrokerPlace, broker_place
from sordino_server.enrolment.ca import Authority, fleet_authority
from sordino_server.enrolment.delivery import write_list
from sordino_server.enrolment.desk import MOST_WAITING, RETIRE_AFTER_S, EnrolmentDesk
from sordino_server.enrolment.store import CertificateRecord, EnrolmentStore
from sordino_server.enrolment.tokens import make_tokens, read_names, withdraw
from sordino_server.home import Home

NOW_S = time.time()


class Office:
    """A fleet directory with its desk, and devices that come to it."""

    def __init__(self, folder: Path) -> None:
        """In `folder`, in which `make_fleet` has made a fleet."""
        self.folder = folder
        self.home = Home(folder / "fleet")
        self.store = EnrolmentStore(self.home.folder)
        self.desk = EnrolmentDesk(self.home, self.store)

    def token(self, **changes: Any) -> Token:
        fields: dict[str, Any] = {
            "name": None,
            "roles": ("data",),
            "zone": "default",
            "hours": 1.0,
            "now_s": NOW_S,
            **changes,
        }
        (made,) = make_tokens(self.home, self.store, [fields.pop("name")], enrol_port=8884, **fields)
        return made

    def device(self, name: str, token: Token) -> Errand:
        """A device's folder after `sordino-agent enroll --offline`."""
        folder = self.folder / name
        enroll(
            folder, token=token.text(), name=name, wait_s=0, offline=True, grant=None, say=lambda _text: None
        )  # fmt: skip
        return Errand(load_agent_config(folder / "agent.yaml"), "enrol", wall_s=time.time)

    def let_in(self, packet: bytes, *, now_s: float = NOW_S, sign: bool = True) -> None:
        filed = self.desk.receive(packet, who=None, now_s=now_s)
        self.desk.approve(filed)
        if sign:
            self.home.sign(now_s=now_s)
        self.desk.certify(now_s=now_s)

    def grant_for(self, name: str) -> bytes:
        found = self.desk.grants("granted", "delivered", "done")
        return next(item.packet for item in found if item.request.name == name)

    def member(self, name: str) -> Errand:
        errand = self.device(name, self.token(name=name))
        self.let_in(errand.begin().packet)
        errand.settle(self.grant_for(name))
        return errand

    def errand(self, name: str, purpose: Any) -> Errand:
        return Errand(load_agent_config(self.folder / name / "agent.yaml"), purpose, wall_s=time.time)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    make_fleet(folder)
    EnrolmentStore(folder / "fleet").close()
    return folder


@pytest.fixture
def office(tmp_path: Path, template: Path) -> Iterator[Office]:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    place = BrokerPlace(folder=str(tmp_path / "broker"), enrol_port=8884)
    (tmp_path / "fleet" / "ca" / "broker.json").write_bytes(msgspec.json.encode(place))
    made = Office(tmp_path)
    yield made
    made.store.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """For tests that leave nothing behind."""
    folder = tmp_path_factory.mktemp("shared")
    make_fleet(folder)
    made = Office(folder)
    yield made
    made.store.close()


def request_of(of: Token, *, identity: DeviceKey, name: str = "pi-01", **changes: Any) -> Request:
    fields = {
        "purpose": "enrol", "fleet": of.fleet, "name": name, "token": of.id, "previous": b"",
        "sign_key": identity.public.sign_key, "box_key": identity.public.box_key, "roles": of.roles,
        "zone": of.zone, "csr": make_csr(new_tls_key(), name), "made_s": int(NOW_S),
    }  # fmt: skip
    return Request(**{**fields, **changes})


def packet_of(
    token: Token, *, identity: DeviceKey | None = None, prover: DeviceKey | None = None, **changes: Any
) -> bytes:
    identity = identity or DeviceKey.generate()
    request = request_of(token, identity=identity, **changes)
    return make_request(request, identity=identity, prover=prover or token_key(token.secret))


# --- the way in --------------------------------------------------------------------------------------------------


def test_from_token_to_member(office: Office) -> None:
    token = office.token(name="pi-01", roles=("data", "compute"), zone="ward-7")
    errand = office.device("pi-01", token)
    signed = errand.begin()
    filed = office.desk.receive(signed.packet, who=token_user(token.id), now_s=NOW_S)
    assert (filed.news, filed.fingerprint, filed.old_fingerprint) == (True, signed.fingerprint, None)
    assert [item.request.name for item in office.desk.pending()] == ["pi-01"]
    assert "pi-01" not in [entry.name for entry in office.home.draft().entries]  # proposed, not in
    office.desk.approve(filed)
    assert office.desk.certify(now_s=NOW_S) == []  # approved, and not signed yet
    office.home.sign(now_s=NOW_S)
    assert office.desk.certify(now_s=NOW_S) == ["pi-01"]
    errand.settle(office.grant_for("pi-01"))
    state = office.folder / "pi-01" / "state"
    key, certificate = read_identity(state / "broker.pem")
    assert certificate is not None
    ca = fleet_authority(office.home.folder).certificate
    check_certificate(certificate, ca=ca, name="pi-01", key=key.public_key(), now_s=NOW_S)
    book = office.home.roster_book(wall_s=time.time)
    assert book.current is not None
    entry = book.current.entry("pi-01")
    assert (entry.roles, entry.zone) == (("compute", "data"), "ward-7")
    assert entry.sign_key == DeviceKey.load(state / "agent.key").public.sign_key
    left = {path.name for path in state.iterdir()}
    assert left == {"agent.key", "broker.pem", "broker-ca.pem", "roster.cbor"}  # neither token nor request
    for path in state.iterdir():
        if path.name in ("agent.key", "broker.pem"):
            assert path.stat().st_mode & 0o777 == 0o600


def test_no_secret_of_a_token_is_kept(office: Office) -> None:
    token = office.token()
    assert token.secret.hex() not in repr(token) and str(token.secret) not in repr(token)
    for path in office.home.folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert token.secret not in data
            assert token.secret.hex().encode() not in data
            assert token.text().encode() not in data


# --- what a device could send instead ------------------------------------------------------------------------------


def swapped(packet: bytes, **changes: Any) -> bytes:
    """As a man in the middle would: the same signatures over another body."""
    kind, raw, signature, proof = decode(packet)
    fields = decode(raw)
    for name, value in changes.items():
        fields[Request.__struct_fields__.index(name)] = value
    return encode([kind, encode(fields), signature, proof])


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


def refused(office: Office, packet: bytes, words: str, *, who: str | None = None, now_s: float = NOW_S) -> None:
    before = (office.home.folder / "roster.yaml").read_bytes(), len(office.desk.pending())
    with pytest.raises(EnrolmentRefused, match=words):
        office.desk.receive(packet, who=who, now_s=now_s)
    assert ((office.home.folder / "roster.yaml").read_bytes(), len(office.desk.pending())) == before


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


# --- tokens as text ----------------------------------------------------------------------------------------------


def test_tokens_survive_mail_programs_and_nothing_else(shared: Office) -> None:
    token = shared.token(name="pi-01")
    text = token.text()
    assert len(text) < 1400
    assert read_token(text) == token
    assert read_token("\n".join(text[at : at + 60] for at in range(0, len(text), 60)) + "\n") == token
    for damaged in (text[:-1], text[:-8], text + "A", text.replace(".", ":"), text[:40] + "A" + text[41:], "", "x"):
        with pytest.raises(ConfigError, match="token"):
            read_token(damaged)
    flipped = text[:200] + ("A" if text[200] != "A" else "B") + text[201:]
    with pytest.raises(ConfigError, match="copy it again, whole"):
        read_token(flipped)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hours": 0.0}, "--hours 0"),
        ({"hours": 1e6}, "at most 720"),
        ({"hours": float("nan")}, "--hours nan"),
        ({"roles": ("server",)}, "Invalid enum value 'server'"),
        ({"roles": ()}, "length >= 1"),
        ({"zone": "Ward 7"}, "matching regex"),
        ({"name": "server"}, "this is the server's name"),
    ],
)
def test_tokens_that_are_not_made(changes: dict[str, Any], words: str, shared: Office) -> None:
    before = len(shared.store.tokens())
    with pytest.raises(ConfigError, match=words):
        shared.token(**changes)
    assert len(shared.store.tokens()) == before


def test_many_tokens_or_none(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"roles": ("data",), "zone": "default", "hours": 1.0, "enrol_port": 8884, "now_s": NOW_S}
    made = make_tokens(office.home, office.store, ["pi-01", "pi-02", None, None], **fields)
    assert [token.name for token in made] == ["pi-01", "pi-02", None, None]
    assert len({token.secret for token in made}) == len({token.id for token in made}) == 4
    assert [record.name for record in office.store.tokens()].count(None) == 2
    for token, name in zip(made, ("pi-01", "pi-02", "pi-03", "pi-04"), strict=True):
        office.let_in(packet_of(token, name=name), sign=False)  # each is a token like any other
    for names, words in ((["pi-05", "Pi 6"], "matching regex"), (["pi-05", "server"], "this is the server's name")):
        with pytest.raises(ConfigError, match=words):
            make_tokens(office.home, office.store, names, **fields)
    office.store.add_token(dataclasses.replace(office.store.tokens()[0], id=bytes(16), state="open"))
    monkeypatch.setattr("sordino_server.enrolment.tokens.MOST_OPEN", 2)
    words = "1 tokens are open, and 2 may be; let some of them be used, or withdraw them"
    with pytest.raises(ConfigError, match=words):
        make_tokens(office.home, office.store, ["pi-07", "pi-08"], **fields)
    assert len(office.store.tokens()) == 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no name in it"),
        ("# none\n\n", "there is no name in it"),
        ("pi-01\nPi_02\n", "line 2: 'Pi_02' is no name: small letters, digits and hyphens"),
        ("pi-01\n\npi-02\npi-01", "line 4: pi-01 stands in line 1 already"),
        ("pi-01,pi-02", "line 1: 'pi-01,pi-02' is no name"),
    ],
)
def test_lists_of_names_that_are_none(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^names.txt(, |: ){words}"):
        read_names(text, source="names.txt")
    assert read_names("# ward 7\n pi-01 \r\n\npi-02", source="names.txt") == ["pi-01", "pi-02"]


# --- what the server or the broker could send instead ------------------------------------------------------------


@dataclasses.dataclass
class Case:
    office: Office
    errand: Errand
    grant: Grant


@pytest.fixture
def case(office: Office) -> Case:
    errand = office.device("pi-01", office.token(name="pi-01"))
    office.let_in(errand.begin().packet)
    return Case(office, errand, read_grant_packet(office.grant_for("pi-01")))


def state_of(case: Case) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (case.office.folder / "pi-01" / "state").iterdir()}


def not_taken(case: Case, grant: Grant | bytes, error: type[RemoteError], words: str) -> None:
    before = state_of(case)
    with pytest.raises(error, match=words):
        case.errand.settle(grant if isinstance(grant, bytes) else grant.packet())
    assert state_of(case) == before


def other_roster(case: Case, *, key: OperatorKey | None = None, **changes: Any) -> bytes:
    home = case.office.home
    roster = home.roster_book(wall_s=time.time).current
    assert roster is not None
    fields: dict[str, Any] = {
        name: getattr(roster, name) for name in ("fleet", "epoch", "issued_s", "expires_s", "entries")
    }
    signer = key or OperatorKey.load(home.folder / "operator.key")
    return sign_roster(Roster(**{**fields, **changes}), signer)


def test_a_server_that_swaps_keys_is_noticed_by_the_device(case: Case) -> None:
    roster = case.office.home.roster_book(wall_s=time.time).current
    assert roster is not None
    stranger = DeviceKey.generate().public
    for swap in ({"sign_key": stranger.sign_key}, {"box_key": stranger.box_key}):
        entries = tuple(dataclasses.replace(e, **swap) if e.name == "pi-01" else e for e in roster.entries)
        signed = other_roster(case, entries=entries)
        not_taken(
            case, dataclasses.replace(case.grant, signed_roster=signed), RosterError, "lists other keys for pi-01"
        )


def test_grants_that_are_refused(case: Case, tmp_path: Path) -> None:
    replace = dataclasses.replace
    grant, home = case.grant, case.office.home
    not_taken(case, replace(grant, request=bytes(32)), EnrolmentRefused, "answers another request")
    forged = other_roster(case, key=OperatorKey.generate())
    not_taken(case, replace(grant, signed_roster=forged), SignatureError, "roster")
    not_taken(case, replace(grant, signed_roster=other_roster(case, fleet="plant")), RosterError, "fleet plant")
    expired = other_roster(case, issued_s=1, expires_s=2)
    not_taken(case, replace(grant, signed_roster=expired), RosterError, "has expired already")
    roster = home.roster_book(wall_s=time.time).current
    assert roster is not None
    without = other_roster(case, entries=tuple(e for e in roster.entries if e.name != "pi-01"))
    not_taken(case, replace(grant, signed_roster=without), RosterError, "'pi-01' is not in epoch")
    stranger = Authority.create(tmp_path / "x", "ca", title="Sordino fleet lab", key=new_tls_key(), now_s=NOW_S)
    key = read_csr(case.errand.begin().request.csr, name="pi-01")
    own = fleet_authority(home.folder)

    def with_certificate(certificate: x509.Certificate) -> Grant:
        return replace(grant, certificate=certificate.public_bytes(Encoding.DER))

    wrong = {
        "not issued by the fleet's authority": stranger.issue_member("pi-01", key, now_s=NOW_S),
        "it is one of 'CN=pi-02'": own.issue_member("pi-02", key, now_s=NOW_S),
        "for another key than this device's": own.issue_member("pi-01", new_tls_key().public_key(), now_s=NOW_S),
        "not now. Check this machine's clock": own.issue_member("pi-01", key, now_s=NOW_S - 9e7, days=1),
    }
    for words, certificate in wrong.items():
        not_taken(case, with_certificate(certificate), CertificateError, words)
    not_taken(case, replace(grant, certificate=b"\x30\x00"), CertificateError, "malformed")
    for packet in (b"", b"x", grant.packet()[:-1], encode(["enrol-grant", b"", b"", b""]), encode(["enrol-grant"])):
        not_taken(case, packet, CodecError, "CBOR|enrol-grant")
    case.errand.settle(grant.packet())  # and the true one still is


def test_an_old_roster_never_comes_back_with_a_grant(office: Office) -> None:
    """The broker replays grants: of other requests, and the right one with the roster of before."""
    office.member("pi-01")
    old = office.home.roster_book(wall_s=time.time).signed
    assert old is not None
    office.home.sign(now_s=NOW_S)
    first = office.errand("pi-01", "renew")
    office.let_in(first.begin().packet, sign=False)
    fresh = office.grant_for("pi-01")
    first.settle(fresh)
    again = office.errand("pi-01", "renew")
    office.let_in(again.begin().packet, sign=False)
    with pytest.raises(EnrolmentRefused, match="answers another request"):
        again.settle(fresh)
    book = roster_book(load_agent_config(office.folder / "pi-01" / "agent.yaml"), wall_s=time.time)
    stale = dataclasses.replace(read_grant_packet(office.grant_for("pi-01")), signed_roster=old)
    again.settle(stale.packet())  # the certificate is the right one; the roster that it came with is not taken
    now = roster_book(load_agent_config(office.folder / "pi-01" / "agent.yaml"), wall_s=time.time)
    assert book.current is not None and now.current is not None
    assert now.current.epoch == book.current.epoch == 2


def test_an_old_roster_does_not_undo_a_revocation(office: Office) -> None:
    office.member("pi-01")
    errand = office.errand("pi-01", "renew")
    office.let_in(errand.begin().packet, sign=False)
    grant = office.grant_for("pi-01")
    office.desk.revoke("pi-01", now_s=NOW_S)
    office.home.sign(now_s=NOW_S)
    signed = office.home.roster_book(wall_s=time.time).signed
    assert signed is not None
    roster_book(load_agent_config(office.folder / "pi-01" / "agent.yaml"), wall_s=time.time).accept(signed)
    with pytest.raises(RosterError, match="is not in epoch"):
        errand.settle(grant)


def test_who_asks_again_is_answered_again(office: Office) -> None:
    errand = office.device("pi-01", office.token(name="pi-01"))
    packet = errand.begin().packet
    office.let_in(packet)
    for _ in range(2):
        (item,) = office.desk.grants("granted")
        office.desk.note_delivery(delivered=[item], cleared=[])
        assert office.desk.grants("granted") == []
        assert not office.desk.receive(packet, who=None, now_s=NOW_S).news
    office.desk.note_delivery(delivered=[], cleared=office.desk.grants("granted"))
    assert not office.desk.receive(packet, who=None, now_s=NOW_S).news
    assert len(office.desk.grants("granted")) == 1 == len(office.store.certificates("pi-01"))


# --- to stay a member --------------------------------------------------------------------------------------------


def test_renewal_changes_the_certificate_and_nothing_else(office: Office) -> None:
    office.member("pi-01")
    state = office.folder / "pi-01" / "state"
    before, epoch = (state / "agent.key").read_bytes(), office.home.draft().epoch
    _, old = read_identity(state / "broker.pem")
    errand = office.errand("pi-01", "renew")
    packet = errand.begin().packet
    assert errand.begin().packet == packet  # given again, it is the same request
    office.let_in(packet, sign=False)
    assert not office.desk.receive(packet, who="pi-01", now_s=NOW_S).news  # a replay gets no second certificate
    errand.settle(office.grant_for("pi-01"))
    _, new = read_identity(state / "broker.pem")
    assert old is not None and new is not None
    assert new.public_key() != old.public_key()
    assert ((state / "agent.key").read_bytes(), office.home.draft().epoch) == (before, epoch)
    assert len(office.store.certificates("pi-01")) == 2


def test_a_member_whose_certificate_has_ended_comes_back_with_a_token(office: Office) -> None:
    office.member("pi-01")
    before = DeviceKey.load(office.folder / "pi-01" / "state" / "agent.key").fingerprint
    errand = office.device("pi-01", office.token(name="pi-01"))
    signed = errand.begin()
    assert signed.fingerprint == before
    office.let_in(signed.packet)
    errand.settle(office.grant_for("pi-01"))
    assert len(office.store.certificates("pi-01")) == 2
    assert not (office.folder / "pi-01" / "state" / "enrolment.token").exists()


def test_the_doctor_tells_of_certificates_that_end(office: Office) -> None:
    def findings(after_days: float) -> list[str]:
        roster = office.home.roster_book(wall_s=lambda: NOW_S).current
        found = house_findings(office.home, roster, now_s=NOW_S + 86_400 * after_days)
        return [
            f"{f.level}: {f.text} -> {f.remedy}" for f in found if f.what == "certificates" and "/ca/" not in f.text
        ]

    office.member("pi-01")
    office.member("pi-02")
    assert findings(300) == []
    (said,) = findings(340)
    assert said.startswith("warning: they end within 30 days, and nobody has asked for new ones: pi-01, pi-02 -> ")
    # One asks, and the timer of a server that has the authority's key would answer.
    office.desk.receive(office.errand("pi-01", "renew").begin().packet, who="pi-01", now_s=NOW_S)
    assert findings(300) == ["warning: 1 wait for new ones: pi-01 -> sordino roster renew, daily (sordino-renew.timer)"]
    # Without the key nobody here can sign: at first there is time, then there is none.
    key = office.home.folder / "ca" / "ca.key"
    key.rename(key.with_suffix(".away"))
    elsewhere = " -> sordino roster export -o order.txt, and sign it where the keys are"
    assert findings(300) == [f"warning: 1 wait for new ones: pi-01{elsewhere}"]
    assert findings(340)[0] == (
        f"error: 1 wait for new ones: pi-01; pi-01 can't connect any more within 30 days{elsewhere}"
    )
    key.with_suffix(".away").rename(key)
    (filed,) = office.desk.pending()
    office.desk.approve(filed)
    office.desk.certify(now_s=NOW_S + 86_400 * 340)
    assert [said.partition(":")[0] for said in findings(340)] == ["warning"]  # pi-02, still
    assert "pi-01" not in findings(340)[0]


def test_renew_without_keys_says_whether_anybody_waits(office: Office, capsys: pytest.CaptureFixture[str]) -> None:
    office.member("pi-01")
    (office.home.folder / "ca" / "ca.key").unlink()
    renew = ["roster", "renew", "--offline", "--fleet", str(office.home.folder)]
    assert run_cli(app, renew, program="sordino") == 0
    assert capsys.readouterr().out == "no member waits for a certificate\n"
    office.desk.receive(office.errand("pi-01", "renew").begin().packet, who="pi-01", now_s=NOW_S)
    assert run_cli(app, renew, program="sordino") == 0
    assert "the keys are not here; now: sordino roster export -o order.txt" in capsys.readouterr().err


def test_root_leaves_nothing_in_the_folder_of_the_services_user(office: Office) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files to others")
    os.chown(office.home.folder, 65_534, 65_534)
    with pytest.raises(
        ConfigError, match=r"belongs to nobody, who could not read .* as nobody: runuser -u nobody -- s"
    ):
        Home(office.home.folder)
    os.chown(office.home.folder, 4_000_123, 0)  # nobody of this machine: a folder from outside of a container
    Home(office.home.folder)


def test_rotation_ends_the_old_key(office: Office) -> None:
    office.member("pi-01")
    state = office.folder / "pi-01" / "state"
    old = DeviceKey.load(state / "agent.key")
    errand = office.errand("pi-01", "rotate")
    signed = errand.begin()
    assert DeviceKey.load(state / "agent.key").fingerprint == old.fingerprint  # in force until the grant is there
    filed = office.desk.receive(signed.packet, who="pi-01", now_s=NOW_S)
    assert (filed.fingerprint, filed.old_fingerprint) == (signed.fingerprint, old.fingerprint)
    office.let_in(signed.packet, now_s=NOW_S + 1)
    errand.settle(office.grant_for("pi-01"))
    new = DeviceKey.load(state / "agent.key")
    assert new.fingerprint == signed.fingerprint != old.fingerprint
    book = office.home.roster_book(wall_s=time.time)
    assert book.current is not None and book.current.entry("pi-01").sign_key == new.public.sign_key
    # The old key asks for itself again, by rotation, by a token, by renewal.
    token = office.token()
    refused(office, packet_of(token, identity=old, name="pi-07"), "revoked or replaced in this fleet")
    refused(office, rotate_packet(old, old), "a key that the roster does not list")
    # Its certificates end a week later: the device has fetched the new one by then.
    office.desk.retire(now_s=NOW_S + 60)
    assert office.store.revoked() == []
    office.desk.retire(now_s=NOW_S + RETIRE_AFTER_S + 60)
    assert len(office.store.revoked()) == 1


def rotate_packet(old: DeviceKey, prover: DeviceKey, **changes: Any) -> bytes:
    new = DeviceKey.generate()
    fields = {
        "purpose": "rotate", "fleet": "lab", "name": "pi-01", "token": b"", "previous": old.public.sign_key,
        "sign_key": new.public.sign_key, "box_key": new.public.box_key, "roles": ("data",), "zone": "default",
        "csr": make_csr(new_tls_key(), "pi-01"), "made_s": 1,
    }  # fmt: skip
    return make_request(Request(**{**fields, **changes}), identity=new, prover=prover)


def test_who_may_not_rotate_or_renew(office: Office) -> None:
    office.member("pi-01")
    key = DeviceKey.load(office.folder / "pi-01" / "state" / "agent.key")
    stranger = DeviceKey.generate()
    with pytest.raises(SignatureError, match="enrol-rotate"):
        office.desk.receive(rotate_packet(key, stranger), who="pi-01", now_s=NOW_S)
    refused(office, rotate_packet(stranger, stranger), "a key that the roster does not list")
    nobody = rotate_packet(key, key, name="pi-09", csr=make_csr(new_tls_key(), "pi-09"))
    refused(office, nobody, "the signed roster lacks it")
    refused(office, rotate_packet(key, key), "left in the place of pi-02", who="pi-02")
    renewal = {"purpose": "renew", "token": b""}
    token = office.token()
    stolen = make_request(request_of(token, identity=stranger, **renewal), identity=stranger, prover=None)
    refused(office, stolen, "with other keys than the roster lists")
    mixed = request_of(token, identity=key, box_key=stranger.public.box_key, **renewal)
    refused(office, make_request(mixed, identity=key, prover=None), "with other keys than the roster lists")


def test_revocation_is_for_good(office: Office) -> None:
    office.member("pi-01")
    office.member("pi-02")
    key = DeviceKey.load(office.folder / "pi-01" / "state" / "agent.key")
    late = office.errand("pi-01", "renew").begin().packet
    office.desk.receive(late, who="pi-01", now_s=NOW_S)
    ended = office.desk.revoke("pi-01", now_s=NOW_S)
    roster = office.home.sign(now_s=NOW_S)
    write_list(office.home, office.store, now_s=NOW_S)
    assert [entry.name for entry in roster.entries] == ["pi-02", "server"]
    crl = x509.load_pem_x509_crl((office.home.folder / "ca" / "crl.pem").read_bytes())
    assert [entry.serial_number for entry in crl] == [record.serial for record in ended]
    assert office.desk.pending() == []  # what it had asked for before is refused along with it
    assert [item.request.name for item in office.desk.grants("granted")] == ["pi-02"]
    assert not office.desk.receive(late, who="pi-01", now_s=NOW_S).news
    refused(office, packet_of(office.token(), identity=key), "revoked or replaced in this fleet")
    office.let_in(packet_of(office.token()))  # another device under the old name is welcome
    for name, words in (("server", "is the server"), ("pi-09", "is not in the roster")):
        with pytest.raises(ConfigError, match=words):
            office.desk.revoke(name, now_s=NOW_S)


def test_lists_are_newer_than_the_last_one_and_never_end(shared: Office) -> None:
    issued = []
    for serial in range(1, 4):
        shared.store.add_certificate(
            CertificateRecord(serial=serial, name="pi-77", made_s=NOW_S, ends_s=NOW_S + 9e6, revoked_s=int(NOW_S))
        )
        write_list(shared.home, shared.store, now_s=NOW_S)
        before = (shared.home.folder / "ca" / "crl.pem").read_bytes()
        write_list(shared.home, shared.store, now_s=NOW_S)  # no news, no list
        assert (shared.home.folder / "ca" / "crl.pem").read_bytes() == before
        write_list(shared.home, shared.store, now_s=NOW_S)
        crl = x509.load_pem_x509_crl((shared.home.folder / "ca" / "crl.pem").read_bytes())
        issued.append(crl.last_update_utc)
        assert crl.next_update_utc == fleet_authority(shared.home.folder).certificate.not_valid_after_utc
    assert issued == sorted(set(issued))


def test_a_restored_backup_lets_nobody_in_again(office: Office) -> None:
    office.member("pi-01")
    office.member("pi-02")
    write_list(office.home, office.store, now_s=NOW_S)
    office.store.close()
    backup = shutil.copytree(office.home.folder, office.folder / "backup")
    now = Office(office.folder)
    ended = now.desk.revoke("pi-01", now_s=NOW_S)
    newest = now.home.sign(now_s=NOW_S)
    signed = now.home.roster_book(wall_s=time.time).signed
    write_list(now.home, now.store, now_s=NOW_S)
    broker = Path(broker_place(now.home).folder)  # type: ignore[union-attr]
    shutil.copy(now.home.folder / "ca" / "crl.pem", broker / "crl.pem")
    now.store.close()
    shutil.rmtree(now.home.folder)
    backup.rename(now.home.folder)
    # The records know nothing of it; the list at the broker does, and what is there stays.
    restored = Office(office.folder)
    assert restored.store.revoked() == []
    write_list(restored.home, restored.store, now_s=NOW_S)
    old, new = (x509.load_pem_x509_crl((f / "crl.pem").read_bytes()) for f in (broker, restored.home.folder / "ca"))
    assert [e.serial_number for e in new] == [e.serial_number for e in old] == [r.serial for r in ended]
    assert new.last_update_utc > old.last_update_utc
    # And the roster that the broker keeps says who is out: it comes back before anything is signed.
    assert signed is not None
    assert "pi-01" in [entry.name for entry in restored.home.draft().entries]
    restored.home.roster_book(wall_s=time.time).accept(signed)
    assert restored.desk.follow(newest, now_s=NOW_S) == ["pi-01"]
    assert [entry.name for entry in restored.home.draft().entries] == ["pi-02", "server"]
    assert restored.home.sign(now_s=NOW_S).epoch == newest.epoch + 1
    key = DeviceKey.load(office.folder / "pi-01" / "state" / "agent.key")
    refused(restored, packet_of(restored.token(), identity=key), "revoked or replaced in this fleet")
    restored.store.close()


# --- keys on another machine -------------------------------------------------------------------------------------


@pytest.fixture
def safe(office: Office) -> Path:
    """The folder on the operator's machine, after the keys were moved there."""
    folder = office.folder / "safe"
    folder.mkdir()
    (office.home.folder / "operator.key").rename(folder / "operator.key")
    (office.home.folder / "ca" / "ca.key").rename(folder / "ca.key")
    (folder / "ca.pem").write_bytes((office.home.folder / "ca" / "ca.pem").read_bytes())
    return folder


def test_signing_on_another_machine(office: Office, safe: Path) -> None:
    errand = office.device("pi-01", office.token(name="pi-01"))
    office.desk.approve(office.desk.receive(errand.begin().packet, who=None, now_s=NOW_S))
    with pytest.raises(ConfigError, match=r"operator\.key"):
        office.home.sign(now_s=NOW_S)
    text = orders.write_text(orders.make_order(office.home, office.desk, office.store))
    order = orders.read_order(text)
    seen = [(change.what, change.name) for change in orders.changes(order, safe)]
    assert seen == [("new", "pi-01"), ("new", "server")]
    back = orders.write_text(orders.fulfil(order, safe, now_s=NOW_S))
    assert orders.take(office.home, office.desk, office.store, orders.read_signed(back), now_s=NOW_S) == ["pi-01"]
    errand.settle(office.grant_for("pi-01"))
    # Once more is nothing new; the same epoch with other contents is not signed.
    assert orders.take(office.home, office.desk, office.store, orders.read_signed(back), now_s=NOW_S) == []
    with pytest.raises(ConfigError, match="An epoch is signed once"):
        orders.fulfil(order, safe, now_s=NOW_S)
    office.desk.revoke("pi-01", now_s=NOW_S)
    order = orders.make_order(office.home, office.desk, office.store)
    assert [(change.what, change.name) for change in orders.changes(order, safe)] == [("gone", "pi-01")]
    orders.take(office.home, office.desk, office.store, orders.fulfil(order, safe, now_s=NOW_S), now_s=NOW_S)
    crl = x509.load_pem_x509_crl((office.home.folder / "ca" / "crl.pem").read_bytes())
    assert len(list(crl)) == 1


def test_an_order_can_put_no_foreign_key_into_a_certificate(office: Office, safe: Path) -> None:
    """A server that lies in its order: another device's request beside the roster's entry."""
    token = office.token(name="pi-01")
    mine = packet_of(token)
    office.desk.approve(office.desk.receive(mine, who=None, now_s=NOW_S))
    order = orders.make_order(office.home, office.desk, office.store)
    theirs = packet_of(token)  # the server's own keys, under the name
    with pytest.raises(CertificateError, match="not asked for with the keys that the roster lists"):
        orders.fulfil(msgspec.structs.replace(order, requests=(theirs,)), safe, now_s=NOW_S)
    for packet in (b"", mine[:-1], swapped(mine, csr=make_csr(new_tls_key(), "pi-01"))):
        with pytest.raises(RemoteError):
            orders.fulfil(msgspec.structs.replace(order, requests=(packet,)), safe, now_s=NOW_S)
    assert not (safe / "roster.cbor").exists()


def test_what_comes_back_is_checked_before_anything_changes(office: Office, safe: Path, tmp_path: Path) -> None:
    office.desk.approve(office.desk.receive(packet_of(office.token()), who=None, now_s=NOW_S))
    order = orders.make_order(office.home, office.desk, office.store)
    good = orders.fulfil(order, safe, now_s=NOW_S)
    (tmp_path / "other").mkdir()
    other = Authority.create(tmp_path / "other", "ca", title="x", key=new_tls_key(), now_s=NOW_S)
    foreign = other.issue_member("pi-01", new_tls_key().public_key(), now_s=NOW_S).public_bytes(Encoding.DER)
    replace = msgspec.structs.replace
    stranger = OperatorKey.generate()
    roster = orders.draft_roster(order.draft, fleet="lab", epoch=9, now_s=NOW_S, where="")
    bad: list[tuple[Any, type[RemoteError]]] = [
        (replace(good, roster=sign_roster(roster, stranger)), SignatureError),
        (replace(good, certificates=((good.certificates[0][0], foreign),)), CertificateError),
        (replace(good, revoked=other.crl((), number=5, now_s=NOW_S).decode()), CertificateError),
        (replace(good, revoked="nonsense"), CertificateError),
    ]
    for signed, error in bad:
        with pytest.raises(error):
            orders.take(office.home, office.desk, office.store, signed, now_s=NOW_S)
        assert not (office.home.folder / "roster.cbor").exists()
        assert office.store.certificates() == []
    assert orders.take(office.home, office.desk, office.store, good, now_s=NOW_S) == ["pi-01"]


def test_texts_that_are_no_order(shared: Office) -> None:
    text = orders.write_text(orders.make_order(shared.home, shared.desk, shared.store))
    for damaged in ("", "hello", text[:-3], text[:50] + "!" + text[51:], text.replace("order", "signed", 1)):
        with pytest.raises(ConfigError):
            orders.read_order(damaged)
    with pytest.raises(ConfigError, match="the order is malformed"):
        orders.read_order(to_text(encode({"format": 1}), "order"))
    assert from_text(to_text(b"abc", "grant"), "grant") == b"abc"
