"""Who belongs to the fleet: names and public keys, signed by the operator's offline key.

A roster's `epoch` only grows. The *body* is the canonical CBOR of the list

    ["sordino-roster", 1, fleet, epoch, issued_s, expires_s, [[name, sign_key, box_key, roles, zone, not_after_s], ...]]

with entries sorted by name and roles sorted; its SHA-256 is the `digest` that every handshake names. A *signed roster*
is the canonical CBOR of [body, Ed25519 signature for the purpose "roster"]. Times are seconds since 1970 UTC.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sordino_common.channel.files import write_atomically
from sordino_common.channel.identity import OperatorKey, check_box_key, check_sign_key, verify
from sordino_common.errors import (
    CodecError,
    ConfigError,
    LocalError,
    RemoteError,
    RosterError,
    RosterVersion,
    StaleEpoch,
)
from sordino_common.messages.base import NAME_PATTERN
from sordino_common.messages.codec import Limits, decode, encode

ROLES: Final = frozenset({"data", "compute", "helper", "server", "dealer"})
FORM: Final = 1  # of the body
MAX_ENTRIES: Final = 20_000  # twice the largest fleet that DESIGN.md section 8 names
MAX_ROSTER_BYTES: Final = 8 * 1024 * 1024  # MAX_ENTRIES entries with every field at its bound
_LIMITS: Final = Limits(payload_bytes=MAX_ROSTER_BYTES, depth=4, items=16 + 12 * MAX_ENTRIES, text_bytes=64)
_MAX_INT: Final = (1 << 53) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RosterEntry:
    """One party. `roles` may be given as any collection and is kept sorted; `not_after_s` ends this entry early."""

    name: str
    sign_key: bytes
    box_key: bytes
    roles: Collection[str]
    zone: str = "default"
    not_after_s: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", tuple(sorted(set(self.roles))))
        if not isinstance(self.name, str) or not re.match(NAME_PATTERN, self.name):
            raise RosterError(
                f"roster: {str(self.name)[:80]!r} is no name: lower-case letters, digits and -, at most 63"
            )
        where = f"roster entry {self.name}"
        unknown = [str(role)[:40] for role in self.roles if role not in ROLES]
        if unknown or not self.roles:
            raise RosterError(f"{where}: roles must be some of {', '.join(sorted(ROLES))}; got {unknown or 'none'}")
        if not isinstance(self.zone, str) or not re.match(NAME_PATTERN, self.zone):
            raise RosterError(f"{where}: the zone must be a name, got {str(self.zone)[:80]!r}")
        for key in (self.sign_key, self.box_key):
            if not isinstance(key, bytes):
                raise RosterError(f"{where}: keys are 32 bytes, got {type(key).__name__}")
        for fault in (check_sign_key(self.sign_key), check_box_key(self.box_key)):
            if fault is not None:
                raise RosterError(f"{where}: {fault}")
        if self.not_after_s is not None:
            _check_int(self.not_after_s, f"{where}: not_after_s")


@dataclass(frozen=True, kw_only=True)
class Roster:
    """A whole fleet at one epoch. Raises `RosterError` at construction unless it is consistent: unique names and keys,
    exactly one server, expiry after issue."""

    fleet: str
    epoch: int
    issued_s: int
    expires_s: int
    entries: tuple[RosterEntry, ...]
    body: bytes = field(init=False, repr=False, compare=False)
    digest: bytes = field(init=False, repr=False, compare=False)
    server: RosterEntry = field(init=False, repr=False, compare=False)
    _by_name: dict[str, RosterEntry] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        entries = tuple(sorted(self.entries, key=lambda entry: entry.name))
        if not isinstance(self.fleet, str) or not re.match(NAME_PATTERN, self.fleet):
            raise RosterError(f"roster: {str(self.fleet)[:80]!r} is no fleet name")
        for what in ("epoch", "issued_s", "expires_s"):
            _check_int(getattr(self, what), f"roster: {what}")
        if self.epoch < 1:
            raise RosterError("roster: epochs start at 1")
        if self.expires_s <= self.issued_s:
            raise RosterError(f"roster: expires at {self.expires_s}, not after it is issued ({self.issued_s})")
        if len(entries) > MAX_ENTRIES:
            raise RosterError(f"roster: {len(entries)} entries, at most {MAX_ENTRIES} are taken")
        seen: dict[str | bytes, str] = {}
        for entry in entries:
            for value in (entry.name, entry.sign_key, entry.box_key):
                if value in seen:
                    raise RosterError(f"roster: {seen[value]} and {entry.name} have the same name or key")
                seen[value] = entry.name
        servers = [entry for entry in entries if "server" in entry.roles]
        if len(servers) != 1:
            names = ", ".join(entry.name for entry in servers) or "none"
            raise RosterError(f"roster: exactly one entry has the role server, got {names}")
        body = encode(
            [
                "sordino-roster",
                FORM,
                self.fleet,
                self.epoch,
                self.issued_s,
                self.expires_s,
                [
                    [entry.name, entry.sign_key, entry.box_key, list(entry.roles), entry.zone, entry.not_after_s]
                    for entry in entries
                ],
            ]
        )
        put = object.__setattr__
        put(self, "entries", entries)
        put(self, "server", servers[0])
        put(self, "body", body)
        put(self, "digest", hashlib.sha256(body).digest())
        put(self, "_by_name", {entry.name: entry for entry in entries})

    def ends_s(self, entry: RosterEntry) -> int:
        """When `RosterBook.party` takes this entry of ours no longer."""
        return self.expires_s if entry.not_after_s is None else min(self.expires_s, entry.not_after_s)

    def entry(self, name: str) -> RosterEntry:
        """The entry of `name`. Raises `RosterError` if the roster has none."""
        entry = self._by_name.get(name)
        if entry is None:
            raise RosterError(f"roster: {name[:80]!r} is not in epoch {self.epoch} of fleet {self.fleet}")
        return entry


def sign_roster(roster: Roster, operator_key: OperatorKey) -> bytes:
    """The signed roster, ready to be published."""
    return encode([roster.body, operator_key.sign("roster", roster.body)])


def read_roster(signed: bytes, *, operator_key: bytes) -> Roster:
    """The roster in `signed`; the signature is checked before the body is parsed.

    Raises `CodecError`, `SignatureError` or `RosterError`."""
    outer = decode(signed, Limits(payload_bytes=MAX_ROSTER_BYTES + 128, depth=1, items=3))
    if not (isinstance(outer, list) and len(outer) == 2 and all(isinstance(part, bytes) for part in outer)):
        raise CodecError("signed roster: expected [body, signature]")
    body, signature = outer
    verify(operator_key, "roster", body, signature)
    roster = _parse(decode(body, _LIMITS))
    if roster.body != body:
        raise RosterError("roster: entries or roles are not in their canonical order")
    return roster


def _parse(fields: Any) -> Roster:
    if not (isinstance(fields, list) and len(fields) > 1 and fields[0] == "sordino-roster"):
        raise RosterError("roster: expected the list [sordino-roster, ...]")
    if fields[1] != FORM:
        raise RosterVersion(
            f"roster: of form {str(fields[1])[:20]}, this software knows form {FORM}: upgrade it to what the operator "
            "signs with"
        )
    if len(fields) != 7:
        raise RosterError(f"roster: expected 7 fields, got {len(fields)}")
    _, _, fleet, epoch, issued_s, expires_s, rows = fields
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 6 for row in rows):
        raise RosterError("roster: every entry is [name, sign_key, box_key, roles, zone, not_after_s]")
    entries = []
    for name, sign_key, box_key, roles, zone, not_after_s in rows:
        if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
            raise RosterError("roster: roles are a list of text")
        entries.append(
            RosterEntry(name=name, sign_key=sign_key, box_key=box_key, roles=roles, zone=zone, not_after_s=not_after_s)
        )
    return Roster(fleet=fleet, epoch=epoch, issued_s=issued_s, expires_s=expires_s, entries=tuple(entries))


def _check_int(value: object, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_INT:
        raise RosterError(f"{what} must be a whole number from 0 to {_MAX_INT}, got {str(value)[:40]}")


class RosterBook:
    """The newest roster that a party has seen, on disk (`path`) before it takes effect."""

    def __init__(
        self, *, fleet: str, operator_key: bytes, wall_s: Callable[[], float], path: Path | None = None
    ) -> None:
        """Reads `path` if it exists. Raises `ConfigError` for an unusable operator key or an unreadable file, and
        `RemoteError`s if the file holds anything but a roster of this fleet and operator."""
        fault = check_sign_key(operator_key)
        if fault is not None:
            raise ConfigError(f"operator key: {fault}")
        self.fleet = fleet
        self.operator_key = operator_key
        self.current: Roster | None = None
        self.signed: bytes | None = None
        self.wall_s: Final = wall_s
        self._path = path
        if path is not None and path.exists():
            try:
                signed = path.read_bytes()
            except OSError as error:
                raise ConfigError(f"{path}: the roster can't be read: {error.strerror}") from None
            try:
                self.current = self._read(signed)
            except RemoteError as error:
                raise type(error)(f"{path}: {error}") from None
            self.signed = signed

    def accept(self, signed: bytes) -> bool:
        """Take `signed` as the current roster: True if it is new, False if it is the one we have.

        Raises `CodecError`, `SignatureError`, `StaleEpoch` (older than ours), `RosterError` (another fleet, expired, or
        a different roster of our very epoch), `LocalError` (can't be written); then nothing has changed."""
        roster = self._read(signed)
        if self.current is not None:
            if hmac.compare_digest(roster.digest, self.current.digest):
                return False
            if roster.epoch < self.current.epoch:
                raise StaleEpoch(
                    f"roster: epoch {roster.epoch} is older than epoch {self.current.epoch}, which is in force"
                )
            if roster.epoch == self.current.epoch:
                raise RosterError(
                    f"roster: a second, different roster of epoch {roster.epoch}. The operator signs each epoch once: "
                    f"sign a roster of epoch {roster.epoch + 1}"
                )
        if roster.expires_s <= self.wall_s():
            raise RosterError(
                f"roster: epoch {roster.epoch} has expired already. Check this device's clock, or sign a new one"
            )
        if self._path is not None:
            try:
                write_atomically(self._path, signed)
            except OSError as error:
                raise LocalError(f"{self._path}: the roster can't be written: {error.strerror}") from None
        self.current = roster
        self.signed = signed
        return True

    def require(self) -> Roster:
        """The current roster. Raises `RosterError` if there is none or it has expired."""
        roster = self.current
        if roster is None:
            raise RosterError(f"roster: none of fleet {self.fleet} was received yet")
        if roster.expires_s <= self.wall_s():
            raise RosterError(
                f"roster: epoch {roster.epoch} has expired. The operator must sign a new one (sordino roster sign)"
            )
        return roster

    def party(self, name: str) -> RosterEntry:
        """The entry of `name` in the current roster. Raises `RosterError` if either is missing or expired."""
        entry = self.require().entry(name)
        if entry.not_after_s is not None and entry.not_after_s <= self.wall_s():
            raise RosterError(
                f"roster: the entry of {name} has expired. The operator must renew it and sign a new roster"
            )
        return entry

    def _read(self, signed: bytes) -> Roster:
        roster = read_roster(signed, operator_key=self.operator_key)
        if roster.fleet != self.fleet:
            raise RosterError(f"roster: it is one of fleet {roster.fleet}, this is fleet {self.fleet}")
        return roster
