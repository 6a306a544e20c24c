"""What `sordino-agent check` finds of the machine: executor, memory and its limits, clock, versions."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Final

from sordino_agent.config import LoadedConfig
from sordino_common.channel.roster import Roster
from sordino_common.diagnosis import machine
from sordino_common.diagnosis.finding import Finding, error

UNIT: Final = "sordino-agent.service"
_DAEMON_BYTES: Final = 96 << 20  # the daemon, and its worker before it has any data (both measured, rounded up)


def machine_findings(loaded: LoadedConfig, roster: Roster | None, *, now_s: float) -> Iterator[Finding]:
    config = loaded.config
    if config.executor == "torch" and importlib.util.find_spec("torch") is None:
        yield error("executor", "torch is not installed", "pip install 'sordino[torch]', or set executor: numpy")
    yield from machine.common_findings(
        roster,
        now_s=now_s,
        wanted_bytes=config.limits.memory_bytes,
        setting="limits.memory_bytes",
        base_bytes=_DAEMON_BYTES,
        unit=UNIT,
        remedy="lower limits.memory_bytes",
    )
