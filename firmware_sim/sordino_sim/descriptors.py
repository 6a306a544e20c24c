"""File descriptors: a simulated agent over a real broker has a socket here, and the broker, our child, one for it."""

from __future__ import annotations

import resource
from typing import Final

from sordino_common.errors import ConfigError

_SPARE: Final = 128  # Python, torch, the store, the broker's own
_EACH: Final = 2  # a connection, and while it is made anew the old one


def require_descriptors(parties: int) -> None:
    """Let this process, and those that it starts, open as many as `parties` connections need.

    Raises `ConfigError` if the system's hard limit forbids that."""
    needed = _SPARE + _EACH * parties
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"{parties} parties over a real broker need {needed} open files, this system allows a process {hard}: "
            f"raise it (ulimit -Hn {needed}, or LimitNOFILE= in a unit), take fewer agents, or --transport memory"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
