"""What `RunStore` needs of a database, and no more: statements, transactions, and being the only one that writes a run.

Statements are written once, for both: `?` for values, upserts as `INSERT ... ON CONFLICT`; tables are those of the
SQLite schema, whose types PostgreSQL has under other names. What a statement has written is on disk when it returns, or
when its transaction ends; a process that is killed in between leaves all of it or nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from sordino_common.database import Schema
from sordino_common.errors import ConfigError, FleetUnavailable, SordinoError

Row = tuple[Any, ...]


class StoreUnavailable(FleetUnavailable):
    """The run records, or the disk under them, can't be reached or written now: full, or a database that is away."""

    code = "store"


class Duplicate(SordinoError):
    """A row with this key is there already."""


class Held(SordinoError):
    """Another process holds it."""


class Database(Protocol):
    """One connection. Raises `StoreUnavailable`, `ConfigError` (damaged, not allowed), `Duplicate`."""

    @property
    def name(self) -> str:
        """For error texts; without a password."""
        ...

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[Row]:
        """What a SELECT, or a statement with RETURNING, gives."""
        ...

    def write(self, statement: str, values: Sequence[Any] = ()) -> None: ...

    def write_all(self, statement: str, many: Iterable[Sequence[Any]]) -> None: ...

    def transaction(self) -> AbstractContextManager[None]:
        """All that is written within, or nothing."""
        ...

    def hold(self, run: str) -> AbstractContextManager[None]:
        """Be the one connection that writes `run`, until the end of this or of the process. Raises `Held`."""
        ...

    def held(self, run: str) -> bool:
        """Whether a connection holds `run`; takes nothing."""
        ...

    def close(self) -> None: ...


def open_records(path: Path, url: str | None, *, schema: Schema, read_only: bool = False) -> Database:
    """The SQLite file at `path`, or the PostgreSQL database at `url`, in the newest schema. With `read_only` nothing is
    made or migrated.

    Raises `ConfigError` (address, damage, a newer version) and `StoreUnavailable`."""
    if url is None:
        from sordino_server.database.sqlite import SqliteDatabase

        return SqliteDatabase(path, schema=schema, read_only=read_only)
    if not url.startswith(("postgresql://", "postgres://")):
        scheme = url.partition("://")[0] if "://" in url else "no scheme"
        raise ConfigError(
            f"database: expected postgresql://USER@HOST/NAME, found {scheme[:40]!r}; without `database` the run "
            f"records are in {path}"
        )
    try:
        from sordino_server.database.postgres import PostgresDatabase
    except ImportError as error:
        raise ConfigError(
            f"database: PostgreSQL needs the package psycopg ({error}): pip install 'sordino[postgres]'"
        ) from None
    return PostgresDatabase(url, schema=schema, read_only=read_only)
