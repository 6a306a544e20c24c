"""Where the packaged service keeps its state, and whose it is when root has run a command for it.

The package makes /var/lib/sordino-agent, which belongs to the service's user; root runs `init`, `enroll`, `renew` and
`rotate`. What they leave in a state folder of somebody else is handed to that somebody, and its configuration can be
read, and not written, by the folder's group.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
from pathlib import Path
from typing import Final

from sordino_agent.config import load_agent_config
from sordino_common.errors import ConfigError

CONFIG_FOLDER: Final = Path("/etc/sordino")
STATE_FOLDER: Final = Path("/var/lib/sordino-agent")


def state_dir_for(folder: Path) -> str:
    """`state_dir` of a configuration in `folder`: the service's, if this is where its package looks; else `state`."""
    return str(STATE_FOLDER) if folder.resolve() == CONFIG_FOLDER and STATE_FOLDER.is_dir() else "state"


def look_as_owner(config: Path) -> None:
    """Give up root for good, for the user whose state folder it is: what the service can't read, its check must not.
    Does nothing for other users, or without a service."""
    if os.geteuid() != 0:
        return
    with contextlib.suppress(ConfigError, FileNotFoundError):  # it is told where it matters
        owner = load_agent_config(config).state_dir.stat()
        if owner.st_uid == 0:
            return
        try:
            groups = os.getgrouplist(pwd.getpwuid(owner.st_uid).pw_name, owner.st_gid)
        except KeyError:  # a number without a name
            groups = [owner.st_gid]
        os.setgroups(groups)
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)


def settle(config: Path) -> None:
    """Hand over what root has made for the service of `config`. Does nothing for other users, or without a service."""
    if os.geteuid() != 0 or not config.is_file():
        return
    with contextlib.suppress(ConfigError):  # it is told where it matters
        state = load_agent_config(config).state_dir
        with contextlib.suppress(FileNotFoundError):
            _hand_over(state, config)


def _hand_over(state: Path, config: Path) -> None:
    folder = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        owner = os.fstat(folder)
        if owner.st_uid == 0:
            return
        for name in os.listdir(folder):  # noqa: PTH208  by handle: the path could lead elsewhere by now
            # The folder is another user's, who could have put a link to any file here: only what is a file of root's
            # with this one name is handed over.
            try:
                handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            except OSError:
                continue
            try:
                found = os.fstat(handle)
                if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_uid == 0:
                    os.fchown(handle, owner.st_uid, owner.st_gid)
            finally:
                os.close(handle)
        if config.stat().st_uid == 0:
            os.chown(config, 0, owner.st_gid)
            config.chmod(0o640)
    finally:
        os.close(folder)
