"""The machine: memory and its limits, the clock, versions of what is installed."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Final

from sordino_common.channel.roster import Roster
from sordino_common.diagnosis.finding import Finding, error, ok, warning
from sordino_common.messages.protocol import PROTOCOL

MIB = 1 << 20
CLOCK_TOLERANCE_S: Final = 120.0  # certificates and rosters last for months; a minute or two is no news
_LEAST_PYTHON: Final = (3, 11)
_TIME_ERROR: Final = 5  # adjtimex(2): the clock is not synchronized


# --- memory -----------------------------------------------------------------------------------------------------------


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that new work can have without swapping (Linux); None if nobody knows."""
    try:
        lines = meminfo.read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def cgroup_limit_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """The smallest memory.max (systemd's MemoryMax) on the way up from our control group, version 2; None: none."""
    try:
        line = next(line for line in own.read_text("ascii").splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    return smallest_limit(root, root / line[3:].lstrip("/"))


def unit_limit_bytes(unit: str, root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The same for a running systemd unit of the system."""
    return smallest_limit(root, root / "system.slice" / unit)


def smallest_limit(root: Path, folder: Path) -> int | None:
    limits = []
    for place in (folder, *folder.parents):
        try:
            text = (place / "memory.max").read_text("ascii").strip()
        except OSError:
            text = "max"
        if text.isdigit():
            limits.append(int(text))
        if place == root:
            break
    return min(limits, default=None)


def common_findings(
    roster: Roster | None, *, now_s: float, wanted_bytes: int, setting: str, base_bytes: int, unit: str, remedy: str
) -> Iterator[Finding]:
    """What both programs look at on their machine: memory (as `memory_findings`), clock, versions."""
    limits = [limit for limit in (cgroup_limit_bytes(), unit_limit_bytes(unit)) if limit is not None]
    yield from memory_findings(
        wanted_bytes=wanted_bytes,
        setting=setting,
        available=available_bytes(),
        limit=min(limits, default=None),
        base_bytes=base_bytes,
        unit=unit,
        remedy=remedy,
    )
    signed = {} if roster is None else {f"the roster of epoch {roster.epoch}": float(roster.issued_s)}
    yield from clock_findings(now_s, signed=signed, synchronized=clock_synchronized())
    yield from version_findings()


def memory_findings(
    *,
    wanted_bytes: int,
    setting: str,
    available: int | None,
    limit: int | None,
    base_bytes: int,
    unit: str,
    remedy: str,
) -> Iterator[Finding]:
    """`wanted_bytes` by `setting`, on top of `base_bytes` that the process itself takes. `unit`: that has `limit`."""
    wanted = f"{setting} ({wanted_bytes // MIB} MiB)"
    if limit is not None and limit < wanted_bytes + base_bytes:
        yield error(
            "memory",
            f"{wanted} and {base_bytes // MIB} MiB for the process pass MemoryMax ({limit // MIB} MiB): the kernel "
            "would kill it",
            f"{remedy}; or: systemctl set-property {unit} MemoryMax={-(-(wanted_bytes + base_bytes) // MIB)}M",
        )
    elif available is not None and available < wanted_bytes:
        yield warning("memory", f"{wanted} does not fit into the {available // MIB} MiB available", remedy)
    else:
        room = "what is available can't be read here" if available is None else f"{available // MIB} MiB are available"
        bound = "" if limit is None else f", MemoryMax is {limit // MIB} MiB"
        yield ok("memory", f"{wanted}: {room}{bound}")


# --- the clock --------------------------------------------------------------------------------------------------------


class _Timex(ctypes.Structure):
    """struct timex of adjtimex(2), as far as its size goes; nothing is set (`modes` 0), nothing read from it."""

    _fields_ = (("modes", ctypes.c_uint), ("rest", ctypes.c_byte * 508))


def clock_synchronized() -> bool | None:
    """What the kernel says: whether something (NTP, PTP) keeps the clock. None if it can't be asked."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.byref(_Timex()))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _TIME_ERROR


def clock_findings(
    now_s: float, *, signed: Mapping[str, float], synchronized: bool | None, tolerance_s: float = CLOCK_TOLERANCE_S
) -> Iterator[Finding]:
    """`signed`: moments, by the name of what was signed then, that are past for everybody (a roster's issue, births
    carry none). A clock that is behind one of them is wrong; one that is ahead can't be told from these."""
    behind = {name: at_s - now_s for name, at_s in signed.items() if at_s - now_s > tolerance_s}
    if behind:
        name, gap_s = max(behind.items(), key=lambda item: item[1])
        yield error(
            "clock",
            f"this clock is at least {_span(gap_s)} behind: {name} was signed later than it is here "
            f"(tolerance {tolerance_s:g} s)",
            "set it: timedatectl set-ntp true",
        )
    elif synchronized is False:
        yield warning(
            "clock",
            "nothing keeps this clock (the kernel says: not synchronized); certificates and rosters end by it",
            "timedatectl set-ntp true",
        )
    else:
        kept = "kept by a time service" if synchronized else "not behind anything that was signed"
        yield ok("clock", f"{time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(now_s))}, {kept}")


def skew_finding(name: str, *, theirs_s: float, asked_s: float, answered_s: float) -> Finding:
    """A peer's clock against ours, by its answer to a question: off by at most half the time that this took."""
    middle_s, doubt_s = (asked_s + answered_s) / 2, (answered_s - asked_s) / 2
    skew_s = theirs_s - middle_s
    text = f"{name}'s clock is {_span(abs(skew_s))} {'ahead of' if skew_s > 0 else 'behind'} this one"
    if abs(skew_s) > CLOCK_TOLERANCE_S + doubt_s:
        return warning("clock", text, f"on {name}, and here: timedatectl status")
    return ok("clock", f"{text} (to {doubt_s:.1f} s)")


def _span(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} seconds"


# --- versions ---------------------------------------------------------------------------------------------------------


def version_findings(
    distribution: str = "sordino",
    *,
    requires: list[str] | None = None,
    installed: Callable[[str], str] = metadata.version,
    python: tuple[int, int] = sys.version_info[:2],
) -> Iterator[Finding]:
    """What is installed, against what our package asks for (without extras)."""
    try:
        wanted = (metadata.requires(distribution) or []) if requires is None else requires
        ours = installed(distribution)
    except metadata.PackageNotFoundError:
        yield warning("versions", f"{distribution} is not installed as a package", "pip install sordino")
        return
    if python < _LEAST_PYTHON:
        yield error(
            "versions", f"Python {'.'.join(map(str, python))}, 3.11 or newer is needed", "install a newer Python"
        )
    found = []
    for line in wanted:
        match = re.match(r"([A-Za-z0-9._-]+)>=([0-9.]+)$", line.replace(" ", ""))
        if match is None or ";" in line:
            continue
        name, least = match.groups()
        try:
            there = installed(name)
        except metadata.PackageNotFoundError:
            yield error("versions", f"{name} is not installed", f"pip install '{name}>={least}'")
            continue
        if _numbers(there) < _numbers(least):
            yield error("versions", f"{name} {there}, {least} or newer is needed", f"pip install '{name}>={least}'")
        found.append(f"{name} {there}")
    yield ok(
        "versions",
        f"sordino {ours}, protocol {PROTOCOL}, Python {platform.python_version()} on {platform.machine()} "
        f"({os.cpu_count()} cores); {', '.join(found)}",
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])
