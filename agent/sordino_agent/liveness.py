"""What the agent stands on, as probes for the watchdog, and its state in one line for `systemctl status`.

Probes complain about what a restart mends, or makes visible by a named refusal to start: a journal that was replaced
or removed under the daemon, one that can't be locked or written, a task that is past its time and was not ended. A full
disk, a broker that is away and a worker that is slow are none of that: they stand in the line, and the agent goes on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sordino_agent.status import Status

_LOW_BYTES: Final = 16 << 20  # SQLite's log and a model need a few MB


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
                    return f"{path} is not the file that was opened: it was replaced under the running agent"
            except OSError as error:
                return f"{path}: {error.strerror}: it was removed under the running agent"
            try:
                _lock(path)
            except sqlite3.Error as error:
                return f"{path} can't be written: {error}"
        return None


def low_disk(folder: Path) -> str | None:
    """A note if there is hardly room for a journal's next entry."""
    free = shutil.disk_usage(folder).free
    return None if free >= _LOW_BYTES else f"{free >> 10} KiB free in {folder}: what must be journalled is refused"


def status_line(status: Status, *, complaint: str | None, notes: Sequence[str]) -> str:
    """One line of what matters to a tired person; what is wrong comes first."""
    parts = [] if complaint is None else [f"UNWELL: {complaint}"]
    parts += notes
    if status.state in ("draining", "stopped"):
        parts.append(status.state)
    parts.append(f"{status.name} of {status.fleet}")
    parts.append("connected" if status.connected else f"not connected: {status.connection}")
    if status.connected and not status.server_online:
        parts.append(f"{status.server} is not online")
    parts.append("no roster yet" if status.roster_epoch is None else f"roster epoch {status.roster_epoch}")
    if status.datasets_unreadable:
        parts.append(f"datasets that can't be read: {', '.join(status.datasets_unreadable)}")
    parts.append(f"{len(status.running)} tasks" if status.running else "idle")
    return "; ".join(parts)


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _lock(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=0.0)) as database:
        database.isolation_level = None
        database.execute("BEGIN IMMEDIATE")
        database.execute("ROLLBACK")
