"""The desk at which requests are filed, approved and certified. Knows no broker: packets in, records and packets out.

receive     verifies a request and files it once, whatever the broker repeats
approve     puts the device into the roster's draft: the operator has compared fingerprints
certify     after the roster was signed: certificates for what was approved, and the list of revoked ones
revoke      takes a member out of the draft, its certificates to the list, its key out of the world

what comes                                       what happens
-----------------------------------------------  ---------------------------------------------------------------
the same request again, whatever became of it    nothing new (`news` is False); its grant is delivered once more
an unknown, withdrawn or expired token           EnrolmentRefused
a used token with other keys                     EnrolmentRefused, counted: `pending` warns of a token that leaked
another name, role or zone than the token's      EnrolmentRefused
a request left in somebody else's place          EnrolmentRefused
keys that were revoked or replaced before        EnrolmentRefused
renew, rotate: not in the signed roster, or with EnrolmentRefused; the proof: SignatureError
other keys there
more requests of a name than are worth reading   EnrolmentRefused
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding

from sordino_common.channel.certificates import ends_s, read_certificate, read_csr
from sordino_common.channel.enrolment import (
    EnrolmentRefused,
    Grant,
    Request,
    SignedRequest,
    read_request_packet,
)
from sordino_common.channel.roster import Roster, RosterEntry
from sordino_common.errors import ConfigError
from sordino_common.transport.topics import token_user
from sordino_server.enrolment.ca import fleet_authority
from sordino_server.enrolment.store import CertificateRecord, EnrolmentStore, RequestRecord, RequestState
from sordino_server.home import DraftEntry, EnrolmentRequest, Home

RETIRE_AFTER_S: Final = 7.0 * 86_400
MOST_WAITING: Final = 8  # requests of one name that wait for the operator; nobody needs more than one


@dataclass(frozen=True, slots=True, kw_only=True)
class Filed:
    """A request that waits, or has waited, for the operator. `old_fingerprint`: of the keys that the name has now."""

    record: RequestRecord
    request: Request
    fingerprint: str
    old_fingerprint: str | None
    news: bool
    others: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """A grant and where it belongs: `place` is whose grant topic."""

    digest: bytes
    place: str
    request: Request
    packet: bytes
    granted_s: float


class EnrolmentDesk:
    """See the module's text. `now_s` is wall time."""

    def __init__(self, home: Home, store: EnrolmentStore) -> None:
        self._home = home
        self._store = store

    # --- requests --------------------------------------------------------------------------------------------------

    def receive(self, packet: bytes, *, who: str | None, now_s: float) -> Filed:
        """File a request. `who`: in whose place at the broker it lay; None: brought by hand. Raises `RemoteError`s."""
        signed = read_request_packet(packet)
        request = signed.request
        if request.fleet != self._home.spec.fleet:
            raise EnrolmentRefused(f"{request.name}: asks for fleet {request.fleet}, this is {self._home.spec.fleet}")
        place = token_user(request.token) if request.purpose == "enrol" else request.name
        if who is not None and who != place:
            raise EnrolmentRefused(f"{request.name}: its request was left in the place of {who}")
        try:
            return self._file(signed, now_s)
        except _TokenReused:  # after the transaction was rolled back
            self._store.count_other(request.token)
            raise

    def _file(self, signed: SignedRequest, now_s: float) -> Filed:
        request = signed.request
        with self._store.transaction():
            known = self._store.request(signed.digest)
            if known is not None:
                if known.state in ("delivered", "done"):  # it has not seen the answer: once more
                    self._store.set_request_state(known.digest, "granted")
                return self._filed(known, news=False)
            if request.purpose == "enrol":
                self._enrol(signed, now_s)
            else:
                self._member(signed)
            waiting = [r for r in self._store.requests("pending", "approved") if r.name == request.name]
            if len(waiting) >= MOST_WAITING:
                raise EnrolmentRefused(
                    f"{request.name}: {len(waiting)} requests of this name wait already; approve or refuse them"
                )
            record = RequestRecord(
                digest=signed.digest,
                packet=signed.packet,
                purpose=request.purpose,
                name=request.name,
                token=request.token,
                state="pending",
                filed_s=now_s,
                certificate=None,
                granted_s=None,
                grant_number=None,
            )
            if request.purpose == "enrol":
                self._store.set_token_state(request.token, "used")
            self._store.add_request(record)
        return self._filed(record, news=True)

    def _enrol(self, signed: SignedRequest, now_s: float) -> None:
        request = signed.request
        name, token = request.name, request.token.hex()
        record = self._store.token(request.token)
        if record is None:
            raise EnrolmentRefused(f"{name}: comes with token {token}, which was not made here")
        signed.verify_proof(record.proof_key)
        if record.state == "used":
            raise _TokenReused(
                f"{name}: token {token} was used by another request already; a token is for one device. Whoever has "
                f"sent this one ({signed.fingerprint}) knows the token"
            )
        if record.state == "withdrawn":
            raise EnrolmentRefused(f"{name}: token {token} was withdrawn")
        if record.expires_s <= now_s:
            raise EnrolmentRefused(f"{name}: token {token} has expired; make a new one: sordino enroll-token")
        if record.name is not None and record.name != name:
            raise EnrolmentRefused(f"{name}: token {token} is for {record.name}")
        if set(record.roles) != set(request.roles) or record.zone != request.zone:
            raise EnrolmentRefused(
                f"{name}: token {token} is for {','.join(record.roles)} in zone {record.zone}, the request says "
                f"{','.join(request.roles)} in {request.zone}"
            )
        if name == self._home.spec.server:
            raise EnrolmentRefused(f"{name}: this is the server's name")
        self._living(request)

    def _member(self, signed: SignedRequest) -> None:
        request = signed.request
        roster = self._signed_roster()
        entry = next((entry for entry in roster.entries if entry.name == request.name), None) if roster else None
        if entry is None:
            raise EnrolmentRefused(f"{request.name}: asks to {request.purpose}, but the signed roster lacks it")
        if request.purpose == "renew":
            if (request.sign_key, request.box_key) != (entry.sign_key, entry.box_key):
                raise EnrolmentRefused(f"{request.name}: asks to renew with other keys than the roster lists")
            return
        if request.previous != entry.sign_key:
            raise EnrolmentRefused(f"{request.name}: asks to replace a key that the roster does not list (any more)")
        signed.verify_proof(entry.sign_key)
        if request.sign_key == entry.sign_key or request.box_key == entry.box_key:
            raise EnrolmentRefused(f"{request.name}: asks to replace its keys by the same ones")
        self._living(request)

    def _living(self, request: Request) -> None:
        if self._store.is_dead(request.sign_key):
            raise EnrolmentRefused(
                f"{request.name}: its key was revoked or replaced in this fleet; the device has to make a new one"
            )

    def pending(self) -> list[Filed]:
        """What waits for the operator, oldest first."""
        return [self._filed(record, news=False) for record in self._store.requests("pending")]

    def find(self, text: str, *states: RequestState) -> Filed:
        """The one request with this name or fingerprint. Raises `ConfigError`: none, or several."""
        filed = [self._filed(r, news=False) for r in self._store.requests("pending", "approved")]
        found = [f for f in filed if text in (f.request.name, f.fingerprint) and f.record.state in states]
        if not found:
            raise ConfigError(f"there is no request of {text[:80]!r}; `sordino roster pending` shows them")
        if len(found) > 1:
            prints = ", ".join(f.fingerprint for f in found)
            raise ConfigError(f"{len(found)} requests of {text}: name the one that its device shows: {prints}")
        return found[0]

    def _filed(self, record: RequestRecord, *, news: bool) -> Filed:
        signed = read_request_packet(record.packet)
        now = next((entry for entry in self._home.draft().entries if entry.name == record.name), None)
        token = self._store.token(record.token) if record.token else None
        return Filed(
            record=record,
            request=signed.request,
            fingerprint=signed.fingerprint,
            old_fingerprint=None if now is None else now.fingerprint,
            news=news,
            others=0 if token is None else token.others,
        )

    # --- the operator's decisions ----------------------------------------------------------------------------------

    def approve(self, filed: Filed, *, roles: Sequence[str] = (), zone: str | None = None) -> None:
        """Into the draft; for a renewal nothing changes there. Raises `ConfigError` for a name or key that is taken."""
        request = filed.request
        if request.purpose != "renew":
            before = next((e for e in self._home.draft().entries if e.name == request.name), None)
            if request.purpose == "rotate":
                if before is None:
                    raise ConfigError(f"{request.name} is not in the roster any more")
                roles, zone = tuple(roles) or before.roles, zone or before.zone
            wish = EnrolmentRequest(
                name=request.name,
                sign_key=request.sign_key.hex(),
                box_key=request.box_key.hex(),
                fleet=request.fleet,
                roles=request.roles,
                zone=request.zone,
            )
            self._home.add(wish, roles=roles, zone=zone, replaces=request.previous.hex() or None)
        self._store.set_request_state(filed.record.digest, "approved")

    def refuse(self, filed: Filed) -> None:
        self._store.set_request_state(filed.record.digest, "refused")

    def require_member(self, name: str) -> None:
        """Raises `ConfigError` if `revoke` would."""
        self._member_named(name)

    def _member_named(self, name: str) -> tuple[DraftEntry | None, RosterEntry | None]:
        """As the draft, and as the signed roster has it: in one of them at least."""
        entry = next((entry for entry in self._home.draft().entries if entry.name == name), None)
        roster = self._signed_roster()
        signed = next((e for e in roster.entries if e.name == name), None) if roster is not None else None
        if name == self._home.spec.server:
            raise ConfigError(f"{name} is the server; a fleet without one has no roster")
        if entry is None and signed is None:
            raise ConfigError(f"{name} is not in the roster")
        return entry, signed

    def revoke(self, name: str, *, now_s: float) -> list[CertificateRecord]:
        """Out of the draft, and no way back for its keys and certificates. Returns the certificates that it had.

        Raises `ConfigError` if there is no such member."""
        entry, signed = self._member_named(name)
        with self._store.transaction():
            for key in (bytes.fromhex(entry.sign_key) if entry else b"", signed.sign_key if signed else b""):
                if key:
                    self._store.bury_key(key, name, at_s=now_s)
            for record in self._store.requests("pending", "approved"):
                if record.name == name:
                    self._store.set_request_state(record.digest, "refused")
            ended = [record for record in self._store.certificates(name) if record.revoked_s is None]
            for certificate in ended:
                self._store.revoke_certificate(certificate.serial, at_s=now_s)
        if entry is not None:
            self._home.remove(name)
        return ended

    def follow(self, roster: Roster, *, now_s: float) -> list[str]:
        """The records as the newest roster says, after a backup was restored: whom it leaves out is revoked, also where
        the draft or a certificate still has it. Returns those names."""
        members = {entry.name for entry in roster.entries}
        draft = self._home.draft()
        certified = {record.name for record in self._store.certificates() if record.revoked_s is None and record.name}
        gone = ({entry.name for entry in draft.entries} | certified) - members
        with self._store.transaction():
            for entry in draft.entries:
                newer = next((e for e in roster.entries if e.name == entry.name), None)
                if newer is None or newer.sign_key.hex() != entry.sign_key:
                    self._store.bury_key(bytes.fromhex(entry.sign_key), entry.name, at_s=now_s)
            for record in self._store.certificates():
                if record.name in gone and record.revoked_s is None:
                    self._store.revoke_certificate(record.serial, at_s=now_s)
        self._home.follow(roster, entries=roster.entries)
        return sorted(gone)

    # --- certificates ----------------------------------------------------------------------------------------------

    def certify(self, *, now_s: float) -> list[str]:
        """Certificates for what is approved and stands in the signed roster with its keys; returns the names.

        Raises `ConfigError` if the authority's key is not here."""
        authority = fleet_authority(self._home.folder)
        done = []
        for record, request in self.to_certify():
            key = read_csr(request.csr, name=request.name)
            certificate = authority.issue_member(request.name, key, now_s=now_s)
            self.take_certificate(record, request, certificate.public_bytes(Encoding.DER), now_s=now_s)
            done.append(request.name)
        return done

    def retire(self, *, now_s: float) -> None:
        """Certificates of replaced keys end a week later: with one of them the device fetches its new one."""
        with self._store.transaction():
            for record in self._store.requests("granted", "delivered", "done"):
                if record.purpose != "rotate" or record.granted_s is None or now_s < record.granted_s + RETIRE_AFTER_S:
                    continue
                for certificate in self._store.certificates(record.name):
                    if certificate.made_s < record.granted_s:
                        self._store.revoke_certificate(certificate.serial, at_s=now_s)

    def to_certify(self) -> list[tuple[RequestRecord, Request]]:
        """Approved requests whose keys the signed roster lists."""
        roster = self._signed_roster()
        listed = {} if roster is None else {e.name: (e.sign_key, e.box_key) for e in roster.entries}
        found = []
        for record in self._store.requests("approved"):
            request = read_request_packet(record.packet).request
            if listed.get(request.name) == (request.sign_key, request.box_key):
                found.append((record, request))
        return found

    def approved(self) -> list[tuple[RequestRecord, Request]]:
        """Approved requests, in the signed roster or not yet."""
        return [(record, read_request_packet(record.packet).request) for record in self._store.requests("approved")]

    def take_certificate(self, record: RequestRecord, request: Request, der: bytes, *, now_s: float) -> None:
        """Keep the certificate that the authority gave for the request. A key that was replaced dies."""
        certificate = read_certificate(der)
        with self._store.transaction():
            self._store.add_certificate(
                CertificateRecord(
                    serial=certificate.serial_number,
                    name=request.name,
                    made_s=now_s,
                    ends_s=ends_s(certificate),
                    revoked_s=None,
                )
            )
            self._store.grant(record.digest, der, wall_s=now_s)
            if request.previous:
                self._store.bury_key(request.previous, request.name, at_s=now_s)

    def grants(self, *states: RequestState) -> list[Granted]:
        """What was granted, is in one of `states` and may still be wanted, with today's roster; oldest first, the last
        one of each name only."""
        signed = self._home.roster_book(wall_s=lambda: 0.0).signed
        newest: dict[str, Granted] = {}
        for record in sorted(self._store.requests(*states), key=lambda r: r.grant_number or 0):
            request = read_request_packet(record.packet).request
            if signed is None or record.certificate is None or self._store.is_dead(request.sign_key):
                continue
            newest.pop(request.name, None)
            newest[request.name] = Granted(
                digest=record.digest,
                place=token_user(request.token) if request.purpose == "enrol" else request.name,
                request=request,
                packet=Grant(request=record.digest, certificate=record.certificate, signed_roster=signed).packet(),
                granted_s=record.granted_s or 0.0,
            )
        return list(newest.values())

    def note_delivery(self, *, delivered: Sequence[Granted], cleared: Sequence[Granted]) -> None:
        """They lie at the broker now, or no longer."""
        with self._store.transaction():
            for item in cleared:
                self._store.set_request_state(item.digest, "done")
            for item in delivered:
                self._store.set_request_state(item.digest, "delivered")

    def _signed_roster(self) -> Roster | None:
        return self._home.roster_book(wall_s=lambda: 0.0).current


class _TokenReused(EnrolmentRefused):
    """Refused, and counted."""
