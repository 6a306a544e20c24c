"""The status file: what `sordino-agent status` shows, written whole by the daemon when something changes.

It is not fsynced: it may be lost in a power cut, and an SD card does not bear an fsync per task.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from sordino_common.errors import ConfigError

FORM = 1  # grows when a field changes its meaning; new fields alone need a default
_MAX_BYTES = 1 << 20


class DatasetStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    train_rows: int
    test_rows: int


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A moment of the daemon's life. Times in seconds since 1970. No values of data, no keys."""

    name: str
    fleet: str
    server: str
    version: str
    state: str  # starting, running, draining, stopped
    pid: int
    boot: int
    started_s: float
    updated_s: float
    connected: bool
    connection: str
    server_online: bool
    roster_epoch: int | None
    executor: str
    worker_pid: int | None
    running: tuple[str, ...]
    tasks_done: int
    tasks_failed: int
    refusals: int
    plans: int
    store_used_bytes: int
    resident_bytes: int
    bytes_sent: int
    bytes_received: int
    datasets: tuple[DatasetStatus, ...] | None
    datasets_unreadable: tuple[str, ...]
    server_unlike: str = ""  # why the server can't be talked to, if its version of the protocol is the reason
    form: int = FORM


class _Form(msgspec.Struct, frozen=True, kw_only=True):
    form: int = 1


def write_status(path: Path, status: Status) -> None:
    """Replace the file at once. Raises `OSError`."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_bytes(msgspec.json.encode(status))
    draft.replace(path)


def read_status(path: Path) -> Status:
    """Raises `ConfigError` if there is none, or it is not ours."""
    try:
        data = path.read_bytes()[:_MAX_BYTES]
    except FileNotFoundError:
        raise ConfigError(f"{path}: not there; this agent has never run. Start it with: sordino-agent run") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    try:
        form = msgspec.json.decode(data, type=_Form).form
        if form <= FORM:
            return msgspec.json.decode(data, type=Status)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{path}: not a status file of this version: {error}. The agent writes it anew when it starts"
        ) from None
    raise ConfigError(
        f"{path}: a status file of form {form}, written by a newer sordino-agent; this one knows up to {FORM}. Upgrade "
        "sordino-agent"
    )


def is_alive(status: Status) -> bool:
    """Whether the daemon that wrote this still runs."""
    if status.state == "stopped":
        return False
    try:
        return b"sordino" in Path(f"/proc/{status.pid}/cmdline").read_bytes()
    except OSError:
        return False


def resident_bytes() -> int:
    """This process's resident set (Linux)."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
