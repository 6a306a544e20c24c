"""One agent per state directory: two would have one identity, one boot number each, and journals that race."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sordino_common.errors import ConfigError

LOCK_FILE: Final = "lock"


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Hold `folder` until the end of this, or of the process, however that comes.

    Raises `ConfigError`, with the process id of who holds it."""
    path = folder / LOCK_FILE
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{path}: can't be opened: {error.strerror}") from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(file, 20, 0).decode("ascii", "replace").strip() or "unknown"
            raise ConfigError(
                f"{folder}: another sordino-agent (process {holder}) uses this state directory. Stop it first "
                "(systemctl stop sordino-agent), or give this one a name, a key and a folder of its own"
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, b"%d\n" % os.getpid(), 0)
        yield
    finally:
        os.close(file)
