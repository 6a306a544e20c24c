"""How often this device has started: a number that only grows, because it is on disk before anyone hears it.

Peers take a greater boot number as "it restarted, the old session is dead" and refuse a smaller one as a replay.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Final

from sordino_common.channel.files import write_atomically
from sordino_common.errors import ConfigError, LimitExceeded

_MAX_BOOT: Final = (1 << 53) - 1  # one start a microsecond would take 285 years; JSON readers stay exact


def next_boot(path: Path) -> int:
    """The number after the one in `path` (1 if there is no file), written and fsynced before it is returned.

    Raises `ConfigError` if the file can't be read or written, or holds anything but a number; `LimitExceeded` if the
    disk is full."""
    return _write(path, _read(path) + 1)


def skip_to(path: Path, heard: int) -> None:
    """After a restore: the next boot comes after `heard`, which peers know. Raises as `next_boot`."""
    if _read(path) < heard < _MAX_BOOT:
        _write(path, heard)


def _read(path: Path) -> int:
    try:
        text = path.read_bytes()[:64]
    except FileNotFoundError:
        text = b"0\n"
    except OSError as error:
        raise ConfigError(f"{path}: the boot counter can't be read: {error.strerror}") from None
    if not re.fullmatch(rb"(0|[1-9][0-9]{0,15})\n", text) or int(text) >= _MAX_BOOT:
        raise ConfigError(
            f"{path}: expected one number below {_MAX_BOOT} and a newline. Write a number greater than every earlier "
            "boot into it: peers refuse a smaller one"
        )
    return int(text)


def _write(path: Path, boot: int) -> int:
    try:
        write_atomically(path, b"%d\n" % boot)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # it passes: a service must go on trying
            raise LimitExceeded(f"{path}: no room for the boot counter: {error.strerror}; free some") from None
        raise ConfigError(f"{path}: the boot counter can't be written: {error.strerror}") from None
    return boot
