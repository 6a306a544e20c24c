"""What the server or the broker could send instead of the grant that was meant."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from helpers_office import NOW_S, Office
from sordino_agent.config import load_agent_config
from sordino_agent.errand import Errand
from sordino_agent.service import roster_book
from sordino_common.channel.certificates import new_tls_key, read_csr
from sordino_common.channel.enrolment import EnrolmentRefused, Grant, read_grant_packet
from sordino_common.channel.identity import DeviceKey, OperatorKey
from sordino_common.channel.roster import Roster, sign_roster
from sordino_common.errors import CertificateError, CodecError, RemoteError, RosterError, SignatureError
from sordino_common.messages.codec import encode
from sordino_server.enrolment.ca import Authority, fleet_authority


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
