"""Signing on another machine: an order goes there, what was signed comes back. Both are a line of text each.

    sordino roster export -o order.txt          here: the draft, requests for certificates, revocations
    sordino roster sign --order order.txt --keys DIR -o signed.txt
                                                there: DIR holds operator.key, ca.key, ca.pem, and what was signed last
    sordino roster import signed.txt            here

The machine with the keys believes nothing that the order says but shows it: who is new, who has gone, whose keys have
changed, against the roster that it signed last. It signs no epoch twice and none that is older.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal, TypeVar

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from sordino_common.channel.certificates import check_certificate, read_certificate, read_csr
from sordino_common.channel.enrolment import from_text, read_request_packet, to_text
from sordino_common.channel.files import write_atomically
from sordino_common.channel.identity import OperatorKey, fingerprint_of
from sordino_common.channel.roster import Roster, RosterEntry, read_roster, sign_roster
from sordino_common.errors import CertificateError, CodecError, ConfigError, RosterError
from sordino_common.messages.base import Name, from_plain, to_plain
from sordino_common.messages.codec import Limits, decode, encode
from sordino_server.enrolment.ca import Authority, Revoked, fleet_authority, has_authority
from sordino_server.enrolment.delivery import take_list
from sordino_server.enrolment.desk import EnrolmentDesk
from sordino_server.enrolment.store import EnrolmentStore
from sordino_server.home import Draft, Home, draft_roster

LAST_FILE: Final = "roster.cbor"
_LIMITS: Final = Limits(payload_bytes=32 << 20, depth=6, items=1_000_000)
Natural = Annotated[int, msgspec.Meta(ge=0)]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class RevokedOrder(_Strict, frozen=True, kw_only=True):
    serial: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{1,40}\Z")]
    at_s: Natural


class Order(_Strict, frozen=True, kw_only=True):
    """What is to be signed. `requests`: the devices' own, which name their certificate's key and are signed by the key
    that the roster will list. `list_after_s`: when the last list of revoked certificates was issued."""

    format: Literal[1] = 1
    fleet: Name
    epoch: Natural
    draft: Draft
    requests: tuple[bytes, ...]
    revoked: tuple[RevokedOrder, ...]
    list_number: Natural
    list_after_s: Natural
    what: ClassVar[str] = "order"


class Signed(_Strict, frozen=True, kw_only=True):
    """What comes back. `certificates`: (digest of the request, certificate)."""

    format: Literal[1] = 1
    roster: bytes
    certificates: tuple[tuple[bytes, bytes], ...]
    revoked: str
    list_number: Natural
    what: ClassVar[str] = "signed"


T = TypeVar("T", Order, Signed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What the new roster changes of the last one, as the person who signs sees it."""

    what: Literal["new", "gone", "other keys", "other roles"]
    name: str
    fingerprint: str
    roles: str


def make_order(home: Home, desk: EnrolmentDesk, store: EnrolmentStore) -> Order:
    """Of the draft as it is, and of what was approved."""
    draft = home.draft()
    book = home.roster_book(wall_s=time.time)
    listed = {(entry.name, entry.sign_key) for entry in draft.entries}
    number, issued_s = store.last_list()
    return Order(
        fleet=home.spec.fleet,
        epoch=max(draft.epoch, book.current.epoch if book.current else 0) + 1,
        draft=draft,
        requests=tuple(
            record.packet for record, request in desk.approved() if (request.name, request.sign_key.hex()) in listed
        ),
        revoked=tuple(RevokedOrder(serial=f"{r.serial:x}", at_s=r.at_s) for r in store.revoked()),
        list_number=number + 1,
        list_after_s=issued_s,
    )


def write_text(value: Order | Signed) -> str:
    return to_text(encode(to_plain(value)), value.what)


def read_order(text: str) -> Order:
    """Raises `ConfigError`."""
    return _read(text, Order)


def read_signed(text: str) -> Signed:
    """Raises `ConfigError`."""
    return _read(text, Signed)


def changes(order: Order, keys: Path) -> list[Change]:
    """Against the roster that was signed last with the keys in `keys`. Raises `ConfigError` for an epoch that is not
    newer, or another fleet."""
    roster, last = _roster(order, now_s=0.0), _last(keys)
    if last is not None and last.fleet != order.fleet:
        raise ConfigError(f"the order is of fleet {order.fleet}; with the keys in {keys}, {last.fleet} was signed last")
    if last is not None and order.epoch <= last.epoch:
        raise ConfigError(
            f"the order asks for epoch {order.epoch}, but epoch {last.epoch} was signed with the keys in {keys}. "
            "An epoch is signed once: import what was signed, then export again"
        )
    before = {entry.name: entry for entry in last.entries} if last is not None else {}
    found: list[Change] = []
    for entry in roster.entries:
        old = before.pop(entry.name, None)
        if old is None:
            found.append(_change("new", entry))
        elif (old.sign_key, old.box_key) != (entry.sign_key, entry.box_key):
            found.append(_change("other keys", entry))
        elif (old.roles, old.zone) != (entry.roles, entry.zone):
            found.append(_change("other roles", entry))
    return found + [_change("gone", entry) for entry in before.values()]


def fulfil(order: Order, keys: Path, *, now_s: float) -> Signed:
    """Sign. What was signed is in `keys` before this returns. Raises `ConfigError` and `RemoteError`s."""
    changes(order, keys)
    operator = OperatorKey.load(keys / "operator.key")
    authority = Authority(keys, "ca") if (keys / "ca.pem").exists() else None
    if authority is None and (order.requests or order.revoked):
        raise ConfigError(f"{keys}: ca.pem and ca.key are not here; certificates and revocations need them")
    roster = _roster(order, now_s=now_s)
    certificates = []
    for packet in order.requests:
        wanted = read_request_packet(packet)
        name, entry = wanted.request.name, roster.entry(wanted.request.name)
        if (entry.sign_key, entry.box_key) != (
            wanted.request.sign_key,
            wanted.request.box_key,
        ) or "server" in entry.roles:
            raise CertificateError(f"certificate for {name}: it was not asked for with the keys that the roster lists")
        assert authority is not None
        certificate = authority.issue_member(name, read_csr(wanted.request.csr, name=name), now_s=now_s)
        certificates.append((wanted.digest, certificate.public_bytes(Encoding.DER)))
    revoked = b""
    if authority is not None:
        listed = [Revoked(serial=int(entry.serial, 16), at_s=entry.at_s) for entry in order.revoked]
        revoked = authority.crl(listed, number=order.list_number, now_s=now_s, after_s=order.list_after_s)
    signed = sign_roster(roster, operator)
    try:
        write_atomically(keys / LAST_FILE, signed)
    except OSError as error:
        raise ConfigError(f"{keys / LAST_FILE}: can't be written: {error.strerror}") from None
    return Signed(
        roster=signed, certificates=tuple(certificates), revoked=revoked.decode(), list_number=order.list_number
    )


def take(home: Home, desk: EnrolmentDesk, store: EnrolmentStore, signed: Signed, *, now_s: float) -> list[str]:
    """Put what was signed into force; the names that have a new certificate.

    Everything is checked before anything changes. Raises `ConfigError` and `RemoteError`s."""
    book = home.roster_book(wall_s=lambda: now_s)
    roster = read_roster(signed.roster, operator_key=home.operator_public())
    keys = {(entry.name, entry.sign_key) for entry in roster.entries}
    waiting = {record.digest: (record, request) for record, request in desk.approved()}
    granted = []
    if signed.certificates or signed.revoked:
        if not has_authority(home.folder):
            raise ConfigError(f"{home.folder}: certificates came back, but this fleet has no authority")
        ca = fleet_authority(home.folder).certificate
        for digest, der in signed.certificates:
            if digest not in waiting:
                continue  # imported before, or refused meanwhile
            record, request = waiting[digest]
            certificate = read_certificate(der)
            key = read_csr(request.csr, name=request.name)
            check_certificate(certificate, ca=ca, name=request.name, key=key, now_s=now_s)
            if (request.name, request.sign_key) not in keys:
                raise RosterError(f"roster: a certificate for {request.name}, but the roster that came along lacks it")
            granted.append((record, request, der))
    if signed.revoked:
        _check_list(signed.revoked.encode(), fleet_authority(home.folder).certificate)
    book.accept(signed.roster)
    home.follow(roster)
    for record, request, der in granted:
        desk.take_certificate(record, request, der, now_s=now_s)
    if signed.revoked and signed.list_number > store.last_list()[0]:
        take_list(home, store, signed.revoked.encode(), number=signed.list_number)
    return [request.name for _, request, _ in granted]


def _check_list(pem: bytes, ca: x509.Certificate) -> None:
    try:
        listed = x509.load_pem_x509_crl(pem)
        good = listed.is_signature_valid(ca.public_key())  # type: ignore[arg-type]  # any key of an authority
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CertificateError(f"list of revoked certificates: malformed: {str(error)[:200]}") from None
    if not good or listed.issuer != ca.subject:
        raise CertificateError("list of revoked certificates: not issued by the fleet's authority")


def _roster(order: Order, *, now_s: float) -> Roster:
    return draft_roster(order.draft, fleet=order.fleet, epoch=order.epoch, now_s=now_s, where="the order")


def _last(keys: Path) -> Roster | None:
    path = keys / LAST_FILE
    if not path.exists():
        return None
    return read_roster(path.read_bytes(), operator_key=OperatorKey.load(keys / "operator.key").public)


def _change(what: Literal["new", "gone", "other keys", "other roles"], entry: RosterEntry) -> Change:
    return Change(
        what=what,
        name=entry.name,
        fingerprint=fingerprint_of(entry.sign_key, entry.box_key),
        roles=f"{','.join(entry.roles)} in {entry.zone}",
    )


def _read(text: str, expected: type[T]) -> T:
    packet = from_text(text, expected.what)
    try:
        return from_plain(decode(packet, _LIMITS), expected)
    except (CodecError, msgspec.ValidationError) as error:
        raise ConfigError(f"the {expected.what} is malformed: {error}") from None
