"""Run records in one SQLite file, as `sordino_common.database` opens it.

Who writes a run is settled by a lock file beside its parameters (`RunStore.hold`), since both lie in one folder.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sordino_common.database import Schema, open_database, transaction
from sordino_common.errors import ConfigError
from sordino_server.database.base import Duplicate, Row, StoreUnavailable


class SqliteDatabase:
    """`Database` at `path`."""

    def __init__(self, path: Path, *, schema: Schema, read_only: bool = False) -> None:
        self.name = str(path)
        self._db = open_database(path, schema, read_only=read_only)
        self._db.execute("PRAGMA foreign_keys=ON")

    def close(self) -> None:
        self._db.close()

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[Row]:
        with self._named():
            return self._db.execute(statement, values).fetchall()

    def write(self, statement: str, values: Sequence[Any] = ()) -> None:
        with self._named():
            self._db.execute(statement, values)

    def write_all(self, statement: str, many: Iterable[Sequence[Any]]) -> None:
        with self._named():
            self._db.executemany(statement, many)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._named(), transaction(self._db):
            yield

    def hold(self, run: str) -> AbstractContextManager[None]:
        """Nothing more: see the module's text."""
        return nullcontext()

    def held(self, run: str) -> bool:
        return False

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError as error:
            raise Duplicate(str(error)) from None
        except sqlite3.OperationalError as error:  # full, locked, read-only, an error of the disk
            raise StoreUnavailable(
                f"{self.name}: the run records can't be used: {error}. If the disk is full, free some room; a run goes "
                "on from its last checkpoint with: sordino train --resume RUN"
            ) from None
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.name}: damaged: {error}. Put the file back from a backup") from None
