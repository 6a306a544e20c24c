"""Run records in PostgreSQL, by psycopg: one connection, no pool, no reconnection.

A run is held by an advisory lock of the connection that writes it. The server lets go of it when that connection ends,
however it ends; and since the holder has no other connection, it can't write a run that it no longer holds. So a lost
connection ends a run by name (exit code 3), and it goes on with --resume. A pooler between us and the server must not
share a session among clients (PgBouncer: `pool_mode = session`).

`synchronous_commit` is set for our session, and a server with `fsync = off` is refused: numbers that must never be
given twice would be, after a power cut.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from sordino_common.database import Schema
from sordino_common.errors import ConfigError, SordinoError
from sordino_server.database.base import Duplicate, Held, Row, StoreUnavailable

# SQLite's types, at the size that SQLite gives them; text is compared by its bytes, whatever the server's locale says.
_WORDS: Final = ((r"\bREAL\b", "DOUBLE PRECISION"), (r"\bINTEGER\b", "BIGINT"), (r"\bTEXT\b", 'TEXT COLLATE "C"'))
_ENDING: Final = re.compile(r"\)\s+STRICT(, WITHOUT ROWID)?\s*$")
_DEFAULTS: Final[dict[str, str | int]] = {
    "connect_timeout": 10,
    "application_name": "sordino",
    # A host that vanished is noticed within a minute, by us and (below) by the server, who then frees our locks.
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
}
_SESSION: Final = (
    "SET synchronous_commit TO on",
    "SET lock_timeout TO '10s'",
    "SET tcp_keepalives_idle TO 30",
    "SET tcp_keepalives_interval TO 10",
    "SET tcp_keepalives_count TO 3",
)


class PostgresDatabase:
    """`Database` at `url` (libpq's: postgresql://USER@HOST:PORT/NAME?sslmode=verify-full...)."""

    def __init__(self, url: str, *, schema: Schema, read_only: bool = False) -> None:
        try:
            given = conninfo_to_dict(url)
        except psycopg.ProgrammingError:  # its text may quote the password
            raise ConfigError("database: not an address of PostgreSQL: expected postgresql://USER@HOST/NAME") from None
        where = given.get("host") or given.get("hostaddr") or "the local socket"
        self.name = f"PostgreSQL database {given.get('dbname') or given.get('user') or ''} at {where}"
        try:
            address = make_conninfo(url, **{name: value for name, value in _DEFAULTS.items() if name not in given})
            self._db = psycopg.connect(address, autocommit=True)
        except psycopg.Error as error:
            raise StoreUnavailable(f"{self.name}: no connection: {_line(error)}. {_REMEDY}") from None
        try:
            self._prepare(schema, read_only=read_only)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[Row]:
        with self._named():
            return self._run(statement, values).fetchall()

    def write(self, statement: str, values: Sequence[Any] = ()) -> None:
        with self._named():
            self._run(statement, values)

    def write_all(self, statement: str, many: Iterable[Sequence[Any]]) -> None:
        with self._named(), self._db.cursor() as cursor:
            cursor.executemany(_translated(statement), [_plain(values) for values in many])

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._named(), self._db.transaction():
            yield

    @contextmanager
    def hold(self, run: str) -> Iterator[None]:
        key = _lock_key(run)
        if self.rows("SELECT pg_try_advisory_lock(?)", (key,)) != [(True,)]:
            raise Held(run)
        try:
            yield
        finally:
            with suppress(SordinoError):  # with the connection the lock is gone, too
                self.rows("SELECT pg_advisory_unlock(?)", (key,))

    def held(self, run: str) -> bool:
        key = _lock_key(run)
        found = self.rows(
            "SELECT 1 FROM pg_locks WHERE locktype='advisory' AND granted AND classid=? AND objid=? AND objsubid=1"
            " AND database=(SELECT oid FROM pg_database WHERE datname=current_database())",
            (key >> 32, key & 0xFFFFFFFF),
        )
        return bool(found)

    def _prepare(self, schema: Schema, *, read_only: bool) -> None:
        if self.rows("SHOW fsync") != [("on",)]:
            raise ConfigError(
                f"{self.name}: the server runs with fsync = off, so what it says is written can be lost; numbers that "
                "must never be given twice would be. Set fsync = on in postgresql.conf"
            )
        for statement in (*_SESSION, *(("SET default_transaction_read_only TO on",) if read_only else ())):
            self.write(statement)
        with self.transaction():
            if not read_only:
                self.rows("SELECT pg_advisory_xact_lock(?)", (_lock_key("*schema"),))  # two that begin at once
            if self.rows("SELECT to_regclass('sordino_schema') IS NOT NULL") != [(True,)]:
                if read_only:
                    raise ConfigError(f"{self.name}: no run records are in it yet; `sordino train` makes them")
                self.write("CREATE TABLE sordino_schema (version BIGINT NOT NULL)")
                self._make(schema.create)
                self.write("INSERT INTO sordino_schema VALUES (?)", (schema.version,))
                return
            ((found,),) = self.rows("SELECT version FROM sordino_schema")
            if not 1 <= found <= schema.version:
                raise ConfigError(
                    f"{self.name}: {schema.what} has schema {found}, written by a newer {schema.program}; this one "
                    f"knows up to {schema.version}. Upgrade {schema.program}, or restore the dump from before"
                )
            if found < schema.version:
                if read_only:
                    raise ConfigError(
                        f"{self.name}: {schema.what} has schema {found}, this {schema.program} writes "
                        f"{schema.version}. Start `sordino train` once: it migrates them"
                    )
                for step in schema.steps[found - 1 :]:
                    self._make(step)
                self.write("UPDATE sordino_schema SET version=?", (schema.version,))

    def _make(self, statements: Sequence[str]) -> None:
        for statement in statements:
            theirs = _ENDING.sub(")", statement)
            for word, other in _WORDS:
                theirs = re.sub(word, other, theirs)
            self.write(theirs)

    def _run(self, statement: str, values: Sequence[Any]) -> psycopg.Cursor[Row]:
        return self._db.execute(_translated(statement), _plain(values))

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except psycopg.errors.UniqueViolation as error:
            raise Duplicate(_line(error)) from None
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:  # away, full, too busy; connection closed
            raise StoreUnavailable(f"{self.name}: the run records can't be used: {_line(error)}. {_REMEDY}") from None
        except (psycopg.ProgrammingError, psycopg.InternalError) as error:
            raise ConfigError(
                f"{self.name}: can't be used for run records: {_line(error)}. Give sordino a database of its own, "
                "and a role that may create tables in it"
            ) from None


_REMEDY: Final = (
    "Is the server running, does `psql` reach it with the same address, has its disk room? A run goes on from its last "
    "checkpoint with: sordino train --resume RUN"
)


def _translated(statement: str) -> bytes:
    """psycopg's placeholders. None of our statements has a ? or a % of its own."""
    return statement.replace("?", "%s").encode()


def _plain(values: Sequence[Any]) -> list[Any]:
    """As SQLite takes them: NaN is no number, hence NULL; PostgreSQL's text holds no NUL."""
    return [
        None
        if isinstance(value, float) and math.isnan(value)
        else value.replace("\0", "\ufffd")
        if isinstance(value, str)
        else value
        for value in values
    ]


def _lock_key(run: str) -> int:
    """A 63-bit number; the chance that two runs share one is about runs² / 2^64."""
    return int.from_bytes(hashlib.sha256(f"sordino/run/{run}".encode()).digest()[:8], "big") >> 1


def _line(error: psycopg.Error) -> str:
    return " ".join(str(error).split())
