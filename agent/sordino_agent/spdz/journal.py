"""The burn journal: what may be used once is on disk before it is used, and after a restart it stays used.

A session id is burnt when the session is accepted; the steps whose shares may leave are burnt ahead, in blocks, before
the first share of a block leaves (`burn_steps`); a block costs one fsync. Whatever a crash leaves behind, the session
is refused afterwards, so no share is ever sent twice under the same preprocessing. Beside it lie the checkpoints: this
party's masked values m of a run's state. They say nothing without the masks, which the dealer has.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, Final

from sordino_agent.errors import JournalError, SessionReused, UnknownCheckpoint
from sordino_agent.journal_mark import JournalMark
from sordino_common.database import Schema, open_database
from sordino_common.errors import LocalError
from sordino_common.messages import Array, SpdzValues, decode, encode
from sordino_common.messages.base import from_plain, to_plain

KEEP_RUNS: Final = 16  # runs whose checkpoints are kept
MOST_SESSIONS: Final = 1_000_000  # burnt ids are never forgotten; a server that opens more has no good reason
SCHEMA: Final = Schema(
    what="the burn journal",
    program="sordino-agent",
    create=(
        """CREATE TABLE sessions (
    session BLOB PRIMARY KEY, run TEXT NOT NULL, burnt_s REAL NOT NULL, step INTEGER NOT NULL, attempt INTEGER NOT NULL
) STRICT, WITHOUT ROWID""",
        """CREATE TABLE checkpoints (
    run TEXT NOT NULL, session BLOB NOT NULL, step INTEGER NOT NULL, kept_s REAL NOT NULL, state BLOB NOT NULL,
    PRIMARY KEY (run, session, step)) STRICT, WITHOUT ROWID""",
    ),
    advice="Put it back from where you keep it. If it is lost, enrol this device under another name: under this one "
    "it could be made to use masks twice",
)


class BurnJournal:
    """SQLite at `path`; None: in memory, for the simulator, whose devices keep the object over their restarts."""

    def __init__(self, path: Path | None) -> None:
        self._mark = JournalMark(path, SCHEMA)
        self._mark.require_there()
        self._db = open_database(path, SCHEMA)
        try:
            self._mark.check(self._sessions())
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    # --- burning ---------------------------------------------------------------------------------------------------

    def burn_session(self, session: bytes, *, run: str, wall_s: float) -> None:
        """Durable when it returns. Raises `SessionReused` if the id was burnt before, by this or an earlier boot."""
        count = self._sessions()
        if count >= MOST_SESSIONS:
            raise JournalError(f"{count} sessions are burnt in this device's journal, as many as it holds")
        try:
            self._write("INSERT INTO sessions VALUES (?,?,?,?,?)", (session, run, wall_s, 0, 0))
        except sqlite3.IntegrityError:
            raise SessionReused(
                f"session {session.hex()} was used on this device before; a session runs once, open a new one"
            ) from None
        self._mark.follow(count + 1)

    def _sessions(self) -> int:
        (count,) = self._one("SELECT count(*) FROM sessions") or (0,)
        return int(count)

    def is_burnt(self, session: bytes) -> bool:
        return self._one("SELECT count(*) FROM sessions WHERE session=?", session) == (1,)

    def burn_steps(self, session: bytes, *, step: int, attempt: int) -> None:
        """Shares of steps before `step`, under attempts up to `attempt`, may leave. Durable when it returns."""
        changed = self._write("UPDATE sessions SET step=?, attempt=? WHERE session=?", (step, attempt, session))
        if changed != 1:
            raise LocalError(f"session {session.hex()} was not burnt before its steps")

    def burnt_steps(self, session: bytes) -> tuple[int, int]:
        """(step, attempt) as last burnt."""
        found = self._one("SELECT step, attempt FROM sessions WHERE session=?", session)
        if found is None:
            raise LocalError(f"session {session.hex()} is not in the journal")
        return int(found[0]), int(found[1])

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def keep(self, run: str, session: bytes, state: SpdzValues, *, wall_s: float) -> None:
        """Keep m of the state after `state.step` steps. Durable when it returns."""
        self._write(
            "INSERT OR REPLACE INTO checkpoints VALUES (?,?,?,?,?)",
            (run, session, state.step, wall_s, encode(to_plain(state))),
        )
        self._write(
            "DELETE FROM checkpoints WHERE run NOT IN"
            " (SELECT run FROM checkpoints GROUP BY run ORDER BY max(kept_s) DESC LIMIT ?)",
            (KEEP_RUNS,),
        )

    def forget_before(self, run: str, session: bytes, step: int) -> None:
        """The server has the masks of (session, step): earlier checkpoints of the run will not be asked for."""
        self._write(
            "DELETE FROM checkpoints WHERE run=? AND (session<>? OR step<?)"
            " AND EXISTS (SELECT 1 FROM checkpoints WHERE run=? AND session=? AND step=?)",
            (run, session, step, run, session, step),
        )

    def checkpoint(self, run: str, session: bytes, step: int) -> tuple[tuple[str, ...], tuple[Array, ...]]:
        """Names and m. Raises `UnknownCheckpoint`."""
        row = self._one("SELECT state FROM checkpoints WHERE run=? AND session=? AND step=?", run, session, step)
        if row is None:
            raise UnknownCheckpoint(
                f"this device has no checkpoint of run {run} after {step} steps of session {session.hex()}"
            )
        state = from_plain(decode(row[0]), SpdzValues)
        return state.names, state.values

    # -----------------------------------------------------------------------------------------------------------------

    def _one(self, statement: str, *values: object) -> tuple[Any, ...] | None:
        try:
            row: tuple[Any, ...] | None = self._db.execute(statement, values).fetchone()
        except sqlite3.DatabaseError as error:
            raise JournalError(f"the burn journal can't be read: {error}") from None
        return row

    def _write(self, statement: str, values: tuple[object, ...]) -> int:
        try:
            return self._db.execute(statement, values).rowcount
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as error:  # a full disk: what can't be burnt must not be used
            raise JournalError(f"the burn journal can't be written: {error}; free some room") from None
