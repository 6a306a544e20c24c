"""The agent's state in one line, for `systemctl status`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sordino_agent.status import Status

_LOW_BYTES: Final = 16 << 20  # SQLite's log and a model need a few MB


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
