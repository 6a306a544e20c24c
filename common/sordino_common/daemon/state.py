"""Whether what a daemon keeps on disk is still there and can be written: a probe for its watchdog."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path


class StateProbe:
    """Whether the databases in `folder` are still those that were there, and can be written.

    Each is opened anew and locked for writing, which writes nothing: an SD card does not bear a write per beat."""

    def __init__(self, folder: Path, databases: Sequence[Path]) -> None:
        self._folder = folder
        self._known = {path: _identity(path) for path in databases}

    def __call__(self) -> str | None:
        """What is wrong, or None."""
        if not os.access(self._folder, os.W_OK | os.X_OK):
            return f"{self._folder} can't be written"
        for path, known in self._known.items():
            try:
                if _identity(path) != known:
                    return f"{path} is not the file that was opened: it was replaced under the running process"
            except OSError as error:
                return f"{path}: {error.strerror}: it was removed under the running process"
            try:
                _lock(path)
            except sqlite3.Error as error:
                return f"{path} can't be written: {error}"
        return None


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _lock(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=0.0)) as database:
        database.isolation_level = None
        database.execute("BEGIN IMMEDIATE")
        database.execute("ROLLBACK")
