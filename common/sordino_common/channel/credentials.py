"""Secrets that systemd hands to a service: `credential:NAME` in the place of a path in any of our configurations.

LoadCredential=NAME in a unit puts the secret into a folder that only this service sees, and names it in
CREDENTIALS_DIRECTORY; encrypted ones (LoadCredentialEncrypted=, systemd-creds) are plain there. Where the file system
can, the service's user gets its right to read by an access control list, whose mask shows as the group's bits of the
mode: a credential is 0440 and root's then, and still nobody else's.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from sordino_common.errors import ConfigError

PREFIX: Final = "credential:"
VARIABLE: Final = "CREDENTIALS_DIRECTORY"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def located(text: str, folder: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """The file that `text` names: a credential, or a path relative to `folder`. Raises `ConfigError`."""
    if not text.startswith(PREFIX):
        return folder / Path(text).expanduser()
    name = text.removeprefix(PREFIX)
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"{text[:120]!r}: expected {PREFIX}NAME of letters, digits, dots and hyphens")
    where = environ.get(VARIABLE)
    if where is None:
        raise ConfigError(
            f"{text}: no credentials were handed over ({VARIABLE} is not set). A unit with LoadCredential={name} gets "
            f"it; by hand: systemd-run --pipe --wait -p LoadCredential={name} COMMAND"
        )
    return Path(where) / name


def is_credential(path: Path, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `path` lies in this service's folder of credentials."""
    where = environ.get(VARIABLE)
    return where is not None and path.parent == Path(where)


def seen_by_others(path: Path, status: os.stat_result) -> bool:
    """Whether the mode lets others than its owner, and us, at a file with a secret."""
    mode = stat.S_IMODE(status.st_mode)
    handed_over = is_credential(path) and status.st_uid == 0 and not mode & 0o037
    return bool(mode & 0o077) and not handed_over
