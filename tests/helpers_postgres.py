"""A throw-away PostgreSQL cluster for tests: a unix socket in a folder of its own, ended by its own process id.

Its programs are Debian's (`/usr/lib/postgresql/*/bin`). They refuse to run as root: then the cluster is the user
`postgres`'s, or `nobody`'s.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

_PATIENCE_S = 60.0
_ROOM_BYTES = 1 << 30
_PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/pgsql/bin", "/opt/homebrew/opt/postgresql*/bin")


def find_postgres() -> Path | None:
    """The folder with `initdb` and `postgres`: of the newest version that is installed."""
    places = [place for pattern in _PLACES for place in Path("/").glob(pattern.lstrip("/"))]
    found = sorted((place for place in places if (place / "initdb").exists()), key=_version)
    onpath = shutil.which("initdb")
    return found[-1] if found else Path(onpath).parent if onpath else None


def require_postgres() -> Path:
    """Skip the test where there is no PostgreSQL."""
    programs = find_postgres()
    if programs is None:
        pytest.skip("no PostgreSQL server programs (apt install postgresql)")
    pytest.importorskip("psycopg", reason="no psycopg (pip install 'sordino[postgres]')")
    return programs


def _version(place: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in place.as_posix().replace("-", "/").split("/") if part.isdigit())


class Postgres:
    """A cluster. `url()` is a new, empty database in it. `crash` and `start` keep what is on disk."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        # Short: a socket's path has 107 bytes at most. In memory if that can be: every test waits for its fsyncs.
        memory = Path("/dev/shm")
        roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > _ROOM_BYTES
        self.folder = Path(tempfile.mkdtemp(prefix="sordino-pg-", dir=memory if roomy else None))
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = next(name for name in ("postgres", "nobody") if _exists(name))
            entry = pwd.getpwnam(user)
            os.chown(self.folder, entry.pw_uid, entry.pw_gid)
            self._as = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        self._numbers = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None
        self._run("initdb", "-D", "data", "-U", "sordino", "-A", "trust", "--no-locale", "-E", "UTF8", "-N")

    def start(self, *settings: str) -> None:
        """Start it, and wait until it takes connections. `settings`: name=value."""
        options = ["listen_addresses=", f"unix_socket_directories={self.folder}", "max_connections=30", *settings]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", "data", *(part for option in options for part in ("-c", option))],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **self._as,
            )
        deadline_s = time.monotonic() + _PATIENCE_S
        while self._call("pg_isready", "-h", str(self.folder), "-U", "sordino").returncode != 0:
            assert time.monotonic() < deadline_s and self._process.poll() is None, self.log
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)

    def url(self) -> str:
        name = f"runs{next(self._numbers)}"
        self._run("createdb", "-h", str(self.folder), "-U", "sordino", name)
        return f"postgresql://sordino@/{name}?host={self.folder}"

    def crash(self) -> None:
        """As `kill -9` of all its processes: no checkpoint, connections cut; the next start replays its log."""
        self._end(signal.SIGQUIT)

    def remove(self) -> None:
        self.crash()  # what would be flushed is removed
        shutil.rmtree(self.folder)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(how)
            try:
                process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @property
    def log(self) -> str:
        log = self.folder / "log"
        return log.read_text("utf-8", "replace") if log.exists() else ""

    def _run(self, program: str, *arguments: str) -> None:
        done = self._call(program, *arguments)
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}\n{self.log}"

    def _call(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._programs / program, *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
            **self._as,
        )


def _exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
