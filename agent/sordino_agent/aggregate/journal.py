"""What this device has answered as a helper: one cut per session, one session per sum of a run. On disk before the
answer is computed, and it stays so after a restart.

Two answers for two sets of one session would give away the masks of the contributors in which the sets differ.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

from sordino_agent.errors import JournalError
from sordino_agent.journal_mark import JournalMark
from sordino_common.aggregate.helper import SumAnswered
from sordino_common.database import Schema, open_database
from sordino_common.messages import SumTerms

SCHEMA: Final = Schema(
    what="the journal of sums",
    program="sordino-agent",
    create=(
        """CREATE TABLE answered (
    session BLOB PRIMARY KEY, run TEXT NOT NULL, number INTEGER NOT NULL, members BLOB NOT NULL,
    answered_s REAL NOT NULL, UNIQUE (run, number)) STRICT, WITHOUT ROWID""",
    ),
    advice="Put it back from where you keep it. If it is lost, enrol this device under another name: under this one "
    "it could be made to answer a sum twice",
)


class SumJournal:
    """SQLite at `path`; None: in memory, for the simulator, whose devices keep the object over their restarts."""

    def __init__(self, path: Path | None) -> None:
        self._mark = JournalMark(path, SCHEMA)
        self._mark.require_there()
        self._db = open_database(path, SCHEMA)
        try:
            self._mark.check(self._count())
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    def require_unanswered(self, terms: SumTerms) -> None:
        """Raise `SumAnswered` if this session, or this sum of this run, was answered, by this or an earlier boot."""
        try:
            found = self._db.execute(
                "SELECT session FROM answered WHERE session=? OR (run=? AND number=?)",
                (terms.session, terms.run, terms.index),
            ).fetchone()
        except sqlite3.DatabaseError as error:
            raise JournalError(f"the journal of sums can't be read: {error}") from None
        if found is not None:
            raise _answered(terms)

    def burn(self, terms: SumTerms, members: bytes, *, wall_s: float) -> None:
        """The cut `members` (digest) of this session is about to be answered. Durable when it returns. Raises as
        `require_unanswered`, and `JournalError` if it can't be written."""
        try:
            self._db.execute(
                "INSERT INTO answered VALUES (?,?,?,?,?)", (terms.session, terms.run, terms.index, members, wall_s)
            )
        except sqlite3.IntegrityError:
            raise _answered(terms) from None
        except sqlite3.DatabaseError as error:  # a full disk: what can't be burnt must not be answered
            raise JournalError(f"the journal of sums can't be written: {error}; free some room") from None
        self._mark.follow(self._count())

    def _count(self) -> int:
        try:
            (count,) = self._db.execute("SELECT count(*) FROM answered").fetchone()
        except sqlite3.DatabaseError as error:
            raise JournalError(f"the journal of sums can't be read: {error}") from None
        return int(count)


def _answered(terms: SumTerms) -> SumAnswered:
    return SumAnswered(
        f"sum {terms.index} of run {terms.run} was answered by this helper before; it answers once, with one set of "
        "contributors. Begin a new sum under the next index"
    )
