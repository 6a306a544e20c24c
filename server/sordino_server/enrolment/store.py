"""What the fleet directory knows of tokens, requests and certificates: `enrolment.sqlite`.

No secret is in it: of a token there is the public half of the key that its secret leads to. Whoever steals the file can
make no request; whoever changes it can, which is why the operator compares fingerprints.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from sordino_common.database import Schema, open_database, transaction
from sordino_common.errors import ConfigError
from sordino_server.enrolment.ca import Revoked

FILE: Final = "enrolment.sqlite"
SCHEMA: Final = Schema(
    what="the enrolment records",
    program="sordino",
    create=(
        """CREATE TABLE tokens (
    id BLOB PRIMARY KEY, proof_key BLOB NOT NULL, name TEXT, roles TEXT NOT NULL, zone TEXT NOT NULL,
    made_s REAL NOT NULL, expires_s REAL NOT NULL, state TEXT NOT NULL, others INTEGER NOT NULL)
    STRICT, WITHOUT ROWID""",
        """CREATE TABLE requests (
    digest BLOB PRIMARY KEY, packet BLOB NOT NULL, purpose TEXT NOT NULL, name TEXT NOT NULL, token BLOB NOT NULL,
    state TEXT NOT NULL, filed_s REAL NOT NULL, certificate BLOB, granted_s REAL, grant_number INTEGER)
    STRICT, WITHOUT ROWID""",
        """CREATE TABLE certificates (
    serial TEXT PRIMARY KEY, name TEXT NOT NULL, made_s REAL NOT NULL, ends_s REAL NOT NULL, revoked_s INTEGER)
    STRICT, WITHOUT ROWID""",
        """CREATE TABLE dead_keys (sign_key BLOB PRIMARY KEY, name TEXT NOT NULL, at_s REAL NOT NULL)
    STRICT, WITHOUT ROWID""",
        "CREATE TABLE lists (number INTEGER PRIMARY KEY, issued_s INTEGER NOT NULL) STRICT",
    ),
    advice="Put it back from a backup. If it is lost, make new tokens; certificates that it had revoked have to be "
    "revoked again, and the broker keeps the list that it has until then",
)

TokenState = Literal["open", "used", "withdrawn"]
# granted: has its certificate; delivered: lies at the broker; done: was taken away there after a while
RequestState = Literal["pending", "approved", "granted", "delivered", "done", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord:
    """`others`: requests of other keys that came with the token after it was used."""

    id: bytes
    proof_key: bytes
    name: str | None
    roles: tuple[str, ...]
    zone: str
    made_s: float
    expires_s: float
    state: TokenState
    others: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    digest: bytes
    packet: bytes
    purpose: str
    name: str
    token: bytes
    state: RequestState
    filed_s: float
    certificate: bytes | None
    granted_s: float | None
    grant_number: int | None  # grants are in the order of this: a clock may be set back


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateRecord:
    serial: int
    name: str
    made_s: float
    ends_s: float
    revoked_s: int | None


class EnrolmentStore:
    """A context manager. Several processes may use one file. `read_only`: to look; the file has to be there."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        self._db = open_database(folder / FILE, SCHEMA, read_only=read_only)

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> EnrolmentStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """The write lock, and all or nothing."""
        with transaction(self._db):
            yield

    # --- tokens ----------------------------------------------------------------------------------------------------

    def add_token(self, record: TokenRecord) -> None:
        self._write(
            "INSERT INTO tokens VALUES (?,?,?,?,?,?,?,?,?)",
            record.id,
            record.proof_key,
            record.name,
            msgspec.json.encode(record.roles).decode(),
            record.zone,
            record.made_s,
            record.expires_s,
            record.state,
            record.others,
        )

    def token(self, token: bytes) -> TokenRecord | None:
        found = self._all("SELECT * FROM tokens WHERE id=?", token)
        return _token(found[0]) if found else None

    def tokens(self) -> list[TokenRecord]:
        return [_token(row) for row in self._all("SELECT * FROM tokens ORDER BY made_s, id")]

    def set_token_state(self, token: bytes, state: TokenState) -> None:
        self._write("UPDATE tokens SET state=? WHERE id=?", state, token)

    def count_other(self, token: bytes) -> None:
        self._write("UPDATE tokens SET others=others+1 WHERE id=?", token)

    # --- requests --------------------------------------------------------------------------------------------------

    def add_request(self, record: RequestRecord) -> None:
        self._write(
            "INSERT INTO requests VALUES (?,?,?,?,?,?,?,?,?,?)",
            record.digest,
            record.packet,
            record.purpose,
            record.name,
            record.token,
            record.state,
            record.filed_s,
            record.certificate,
            record.granted_s,
            record.grant_number,
        )

    def request(self, digest: bytes) -> RequestRecord | None:
        found = self._all("SELECT * FROM requests WHERE digest=?", digest)
        return _request(found[0]) if found else None

    def requests(self, *states: RequestState) -> list[RequestRecord]:
        rows = self._all("SELECT * FROM requests ORDER BY filed_s, name, digest")
        return [record for record in map(_request, rows) if record.state in states]

    def set_request_state(self, digest: bytes, state: RequestState) -> None:
        self._write("UPDATE requests SET state=? WHERE digest=?", state, digest)

    def grant(self, digest: bytes, certificate: bytes, *, wall_s: float) -> None:
        self._write(
            "UPDATE requests SET state='granted', certificate=?, granted_s=?,"
            " grant_number=(SELECT coalesce(max(grant_number), 0) + 1 FROM requests) WHERE digest=?",
            certificate,
            wall_s,
            digest,
        )

    # --- certificates, keys, lists ---------------------------------------------------------------------------------

    def add_certificate(self, record: CertificateRecord) -> None:
        self._write(
            "INSERT INTO certificates VALUES (?,?,?,?,?)",
            f"{record.serial:x}",
            record.name,
            record.made_s,
            record.ends_s,
            record.revoked_s,
        )

    def certificates(self, name: str | None = None) -> list[CertificateRecord]:
        rows = self._all("SELECT * FROM certificates ORDER BY made_s, serial")
        return [
            CertificateRecord(serial=int(row[0], 16), name=row[1], made_s=row[2], ends_s=row[3], revoked_s=row[4])
            for row in rows
            if name is None or row[1] == name
        ]

    def revoke_certificate(self, serial: int, *, at_s: float) -> None:
        self._write(
            "UPDATE certificates SET revoked_s=? WHERE serial=? AND revoked_s IS NULL", int(at_s), f"{serial:x}"
        )

    def revoked(self) -> list[Revoked]:
        return [
            Revoked(serial=record.serial, at_s=record.revoked_s)
            for record in self.certificates()
            if record.revoked_s is not None
        ]

    def bury_key(self, sign_key: bytes, name: str, *, at_s: float) -> None:
        """No request of this key is taken any more."""
        self._write("INSERT OR IGNORE INTO dead_keys VALUES (?,?,?)", sign_key, name, at_s)

    def is_dead(self, sign_key: bytes) -> bool:
        return bool(self._all("SELECT 1 FROM dead_keys WHERE sign_key=?", sign_key))

    def last_list(self) -> tuple[int, int]:
        """(number, time of issue) of the last revocation list. The first has number 1, and `broker-config` makes it."""
        found = self._all("SELECT number, issued_s FROM lists ORDER BY number DESC LIMIT 1")
        return (int(found[0][0]), int(found[0][1])) if found else (1, 0)

    def note_list(self, number: int, issued_s: int) -> None:
        self._write("INSERT INTO lists VALUES (?,?)", number, issued_s)

    def _all(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{FILE}: can't be read: {error}") from None

    def _write(self, statement: str, *values: object) -> None:
        try:
            self._db.execute(statement, values)
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{FILE}: can't be written: {error}; is the disk full?") from None


def _token(row: tuple[Any, ...]) -> TokenRecord:
    names = TokenRecord.__dataclass_fields__
    fields = dict(zip(names, row, strict=True))
    return TokenRecord(**{**fields, "roles": tuple(msgspec.json.decode(fields["roles"]))})


def _request(row: tuple[Any, ...]) -> RequestRecord:
    return RequestRecord(**dict(zip(RequestRecord.__dataclass_fields__, row, strict=True)))
