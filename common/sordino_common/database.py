"""SQLite files that outlive their software: one way to make, open, migrate and refuse them.

A file carries the number of its schema in `PRAGMA user_version`. What `open_database` finds, what it does:

    no file                     made under another name, complete, then linked into place: never a half-made one
    the schema that we know     opened
    an older one                copied to NAME.schema-K.bak, then migrated in one transaction
    a newer one                 refused: found and known number, and what to do
    empty, cut short, garbage,  refused, and left as it is: somebody may still get its content back
    or a database of others

Everything is looked at before anything is written; a file that is refused has not changed by a byte.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sordino_common.channel.files import sync_folder
from sordino_common.errors import ConfigError, SordinoError

WAIT_S: Final = 10.0  # for another process's transaction
_LOOKED_AT: Final = 32 << 20  # bytes; a longer file takes longer to be checked whole than a start should


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """What one kind of file holds. `create`: statements that make the newest schema; `steps[k]`: those that lead from
    schema k + 1 to k + 2. `what` and `program` name the file and its software in texts; `error` is what is raised.
    `advice` ends the text of a file that is damaged: what its loss would mean."""

    what: str
    program: str
    create: tuple[str, ...]
    steps: tuple[tuple[str, ...], ...] = ()
    error: type[SordinoError] = ConfigError
    advice: str = "Put it back from where you keep it"

    @property
    def version(self) -> int:
        return len(self.steps) + 1


def open_database(path: Path | None, schema: Schema, *, read_only: bool = False) -> sqlite3.Connection:
    """The database at `path` (None: a new one in memory) in its newest schema, mode 0600, a commit on the disk when it
    returns. No transaction is begun by itself. With `read_only` nothing is made, migrated or written.

    Raises `schema.error`, naming file, finding and remedy."""
    if path is None:
        db = sqlite3.connect(":memory:", isolation_level=None)
        _make(db, schema)
        return db
    try:
        if not read_only and not path.exists():
            _create(path, schema)
        return _open(path, schema, read_only=read_only)
    except (sqlite3.DatabaseError, OSError) as error:
        raise schema.error(f"{path}: {schema.what} can't be used: {error}. {schema.advice}") from None


def schema_version(path: Path) -> int:
    """The number in the file. Raises `sqlite3.DatabaseError` if it is no database, or can't be read."""
    with contextlib.closing(_connect(path, read_only=True)) as db:
        return _version(db)


def integrity(path: Path) -> str:
    """Empty if SQLite finds nothing wrong in the file, else what it found first. Reads all of it, writes nothing."""
    try:
        with contextlib.closing(_connect(path, read_only=True)) as db:
            return _damage(db)
    except sqlite3.DatabaseError as error:
        return str(error)


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """The write lock, and all or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def backup_path(path: Path, version: int) -> Path:
    """Where the copy of a file of schema `version` lies that was made before it was migrated."""
    return path.with_name(f"{path.name}.schema-{version}.bak")


def _open(path: Path, schema: Schema, *, read_only: bool) -> sqlite3.Connection:
    if path.stat().st_size == 0:
        raise schema.error(f"{path}: empty, so {schema.what} was lost: a full disk, or a restore. {schema.advice}")
    db = _connect(path, read_only=read_only)
    try:
        found = _version(db)
        if found > schema.version:
            raise schema.error(
                f"{path}: {schema.what} has schema {found}, written by a newer {schema.program}; this one knows up to "
                f"{schema.version}. Upgrade {schema.program}, or put back the file from before the upgrade"
            )
        if found < 1:
            raise schema.error(
                f"{path}: a database, but not {schema.what}: its schema has the number {found}, {schema.version} is "
                f"expected. {schema.advice}"
            )
        damage = _damage(db) if path.stat().st_size <= _LOOKED_AT else ""
        if damage:
            raise schema.error(f"{path}: {schema.what} is damaged: {damage}. {schema.advice}")
        if found < schema.version:
            if read_only:
                raise schema.error(
                    f"{path}: {schema.what} has schema {found}, this {schema.program} writes {schema.version}. Start "
                    "it once: it migrates the file"
                )
            _migrate(db, path, schema, found)
        if not read_only:
            path.chmod(0o600)
            _durable(db)
    except BaseException:
        db.close()
        raise
    return db


def _connect(path: Path, *, read_only: bool) -> sqlite3.Connection:
    mode = "ro" if read_only else "rw"  # rw: nothing is made here
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=WAIT_S)


def _durable(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")  # a commit is on the disk when it returns


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _damage(db: sqlite3.Connection) -> str:
    try:
        found = str(db.execute("PRAGMA quick_check(1)").fetchone()[0])
    except UnicodeDecodeError:  # SQLite quotes what it has found
        return "a name in it is no text"
    return "" if found == "ok" else found


def _make(db: sqlite3.Connection, schema: Schema) -> None:
    with transaction(db):
        for statement in schema.create:
            db.execute(statement)
        db.execute(f"PRAGMA user_version={schema.version}")


def _create(path: Path, schema: Schema) -> None:
    """A whole new file at `path`; if another process is sooner, its file stays."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    draft.unlink(missing_ok=True)
    os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        # The old journal, which leaves one file when it is closed; WAL comes when the file is opened.
        with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous=FULL")
            _make(db, schema)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def _migrate(db: sqlite3.Connection, path: Path, schema: Schema, found: int) -> None:
    copy = backup_path(path, found)
    draft = copy.with_name(f".{copy.name}.{os.getpid()}.new")
    draft.unlink(missing_ok=True)
    os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as target:
            db.backup(target)
        handle = os.open(draft, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        draft.replace(copy)
        sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)
    db.execute("PRAGMA synchronous=FULL")
    with transaction(db):
        # Another process may have been here meanwhile.
        for step in schema.steps[max(_version(db), found) - 1 :]:
            for statement in step:
                db.execute(statement)
        db.execute(f"PRAGMA user_version={schema.version}")
