"""The mark beside a journal: how many entries it has had. A journal that has fewer was cut short, or put back from an
older copy: what it forgot would be used a second time, so it is refused by name.

Written after each entry and before what the entry allows: a crash in between leaves a mark that is one behind. Not
noticed: journal and mark put back together, as with a disk image.
"""

from __future__ import annotations

from pathlib import Path

from sordino_agent.errors import JournalError
from sordino_common.channel.files import write_atomically
from sordino_common.database import Schema
from sordino_common.errors import ConfigError

_DIGITS = 15


class JournalMark:
    """Of the journal at `journal`; None: of one in memory, which needs no mark."""

    def __init__(self, journal: Path | None, schema: Schema) -> None:
        self._journal = journal
        self._schema = schema
        self._path = None if journal is None else journal.with_suffix(".mark")
        self._count = self._read()

    @property
    def count(self) -> int:
        """Entries that the journal has had."""
        return self._count

    def require_there(self) -> None:
        """Before the journal is opened, which would make it. Raises `ConfigError` if it is gone."""
        if self._journal is not None and self._count > 0 and not self._journal.exists():
            raise ConfigError(
                f"{self._journal}: {self._schema.what} is missing, but {self._path} says that it had {self._count} "
                f"entries. {self._schema.advice}"
            )

    def check(self, count: int) -> None:
        """`count` entries were found. Raises `ConfigError` if there were more."""
        if count < self._count:
            raise ConfigError(
                f"{self._journal}: {self._schema.what} has {count} entries, but {self._path} says that it had "
                f"{self._count}: it was cut short, or this is an old copy. {self._schema.advice}"
            )
        self.follow(count)

    def follow(self, count: int) -> None:
        """There are `count` entries now. Durable when it returns. Raises `JournalError`."""
        if self._path is None or count <= self._count:
            return
        try:
            write_atomically(self._path, b"%d\n" % count, mode=0o600)
        except OSError as error:  # a full disk: the entry stays, what it allows does not happen
            raise JournalError(f"{self._path}: can't be written: {error.strerror}; free some room") from None
        self._count = count

    def _read(self) -> int:
        if self._path is None:
            return 0
        try:
            text = self._path.read_bytes()[: _DIGITS + 2].decode("ascii", "replace")
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise ConfigError(f"{self._path}: can't be read: {error.strerror}") from None
        if not text.endswith("\n") or not text.strip().isdigit():
            raise ConfigError(f"{self._path}: expected a number of entries and a newline. {self._schema.advice}")
        return int(text)
