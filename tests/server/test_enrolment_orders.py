"""Keys on another machine: orders that go there, and what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from helpers_office import NOW_S, Office, packet_of, swapped
from sordino_common.channel.certificates import make_csr, new_tls_key
from sordino_common.channel.enrolment import from_text, to_text
from sordino_common.channel.identity import OperatorKey
from sordino_common.channel.roster import sign_roster
from sordino_common.errors import CertificateError, ConfigError, RemoteError, SignatureError
from sordino_common.messages.codec import encode
from sordino_server.enrolment import order as orders
from sordino_server.enrolment.ca import Authority


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
