"""Files and folders: who may read and write them, room on their disk, databases that are whole."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from sordino_common.channel.credentials import is_credential, seen_by_others
from sordino_common.database import integrity
from sordino_common.diagnosis.finding import SECURITY, Finding, error, ok, warning

MIB = 1 << 20
_INODES = 1000  # files of ours are few; SQLite makes and removes some


def private_file(path: Path, what: str) -> Iterator[Finding]:
    """A file that only its owner may read, and whose owner is us (or root, which may read it anyway)."""
    try:
        status = path.stat()
    except OSError as problem:
        yield error(
            what, f"{path}: {problem.strerror}", f"put it back from a backup, or see how it is made: {path.name}"
        )
        return
    mode = stat.S_IMODE(status.st_mode)
    if seen_by_others(path, status):
        yield error(what, f"{path} has mode {mode:04o}: others may read it", f"chmod 600 {path}", exit_code=SECURITY)
    elif os.geteuid() not in (0, status.st_uid) and not is_credential(path):
        yield error(
            what,
            f"{path} belongs to user {status.st_uid}, this is user {os.geteuid()}",
            f"run this as its owner, or: chown {os.geteuid()} {path}",
        )
    else:
        yield ok(what, f"{path}: only its owner may read it")


def own_folder(path: Path, what: str) -> Iterator[Finding]:
    """A folder that we can write, and nobody else can; nor can they put another one in its place."""
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        yield error(what, f"{path} is not a folder that this user can write", f"mkdir -p {path}, or change its owner")
        return
    if stat.S_IMODE(path.stat().st_mode) & 0o022:
        yield error(what, f"{path} can be written by others", f"chmod go-w {path}", exit_code=SECURITY)
        return
    for parent in path.resolve().parents:
        status = parent.stat()
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o022 and not mode & stat.S_ISVTX:
            yield error(
                what,
                f"{parent}, above {path}, can be written by others: they can put another folder in its place",
                f"chmod go-w {parent}",
                exit_code=SECURITY,
            )
            return
    yield ok(what, f"{path} is there, and only its owner writes it")


def loose_files(folder: Path, what: str) -> Iterator[Finding]:
    """Files in `folder` that others can write."""
    loose = sorted(path.name for path in folder.iterdir() if path.is_file() and path.stat().st_mode & 0o022)
    if loose:
        text = f"others can write {', '.join(loose[:5])}{' and more' if len(loose) > 5 else ''} in {folder}"
        yield error(what, text, f"chmod go-w {folder}/*", exit_code=SECURITY)


def disk_room(path: Path, *, wanted_bytes: int, why: str) -> Iterator[Finding]:
    """Room and inodes for us on the file system of `path`."""
    room = os.statvfs(path)
    yield from disk_findings(
        path, free_bytes=room.f_bavail * room.f_frsize, inodes=room.f_favail, total_inodes=room.f_files,
        wanted_bytes=wanted_bytes, why=why,
    )  # fmt: skip


def disk_findings(
    path: Path, *, free_bytes: int, inodes: int, total_inodes: int, wanted_bytes: int, why: str
) -> Iterator[Finding]:
    """`total_inodes` 0: a file system that does not count them."""
    free = f"{free_bytes // MIB} MiB are free at {path}"
    remedy = f"make room: du -xh {path} | sort -h | tail"
    if free_bytes < wanted_bytes // 10:
        yield error("disk", f"{free}; for {why}, {max(1, wanted_bytes // MIB)} MiB are asked for", remedy)
    elif free_bytes < wanted_bytes:
        yield warning("disk", f"{free}; for {why}, {max(1, wanted_bytes // MIB)} MiB are asked for", remedy)
    else:
        yield ok("disk", f"{free}; for {why}, {max(1, wanted_bytes // MIB)} MiB are asked for")
    if total_inodes and inodes < _INODES:
        yield warning("disk", f"{inodes} inodes are free at {path}", f"remove small files: find {path} -xdev | wc -l")


def whole_database(path: Path, what: str, *, remedy: str) -> Iterator[Finding]:
    """Nothing if there is no file."""
    if not path.exists():
        return
    damage = integrity(path) if path.stat().st_size else "empty"
    if damage:
        yield error("database", f"{path}, {what}: damaged: {damage}", remedy)
    else:
        yield ok("database", f"{path}, {what}: whole")
