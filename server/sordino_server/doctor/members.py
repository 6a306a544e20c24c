"""What `sordino doctor` hears from the agents themselves: who answers, their versions, their clocks against ours."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator

from sordino_common.diagnosis.finding import Finding, error, ok, untried, warning
from sordino_common.diagnosis.machine import skew_finding
from sordino_common.errors import ConfigError, SordinoError
from sordino_common.messages import Health, HealthReport
from sordino_server.fleet import drive, open_fleet, roll_call
from sordino_server.home import Home
from sordino_server.rounds.effects import Ask, Effect, Result, ask


def member_findings(home: Home, *, wait_s: float, version: str) -> Iterator[Finding]:
    """As the fleet's server, so not while another process is that."""
    try:
        with open_fleet(home, version=version) as fleet:
            found, missing = roll_call(fleet, wait_s=wait_s)
            names = [name for name in sorted(found) if name in fleet.members]
            clocks: dict[str, tuple[float, float, float]] = {}
            for name in names:  # one at a time: the time that the answer takes is the doubt about its clock
                asked_s = time.time()
                reply = drive(fleet, lambda name=name: _health(name, wait_s=wait_s))  # type: ignore[misc]
                if reply is not None:
                    clocks[name] = (reply.wall_s, asked_s, time.time())
    except ConfigError as problem:
        yield untried("agents", f"who answers, versions, clocks: {problem}", "try again when that process has ended")
        return
    except SordinoError as problem:
        yield error("agents", str(problem), "settle that first", exit_code=problem.exit_code)
        return
    versions: dict[str, list[str]] = {}
    for name, described in found.items():
        versions.setdefault(described.version, []).append(name)
    yield from presence_findings(tuple(found), missing)
    yield from version_findings(versions, ours=version)
    for name, (theirs_s, asked_s, answered_s) in clocks.items():
        if not math.isfinite(theirs_s):
            yield warning("clock", f"{name} says no time that could be one", f"on {name}: timedatectl status")
            continue
        yield skew_finding(name, theirs_s=theirs_s, asked_s=asked_s, answered_s=answered_s)


def presence_findings(found: tuple[str, ...], missing: dict[str, str]) -> Iterator[Finding]:
    """Who answers, and why others don't: versions of the protocol that don't match are errors."""
    unlike = {name: why for name, why in missing.items() if "protocol" in why}
    for name, why in sorted(unlike.items()):
        yield error("versions", why, f"upgrade the older side; {name} takes part in nothing until then", exit_code=2)
    silent = sorted(missing.keys() - unlike.keys())
    if silent:
        told = ", ".join(f"{name} ({missing[name]})" for name in silent[:8])
        text = (
            f"{len(found)} of {len(found) + len(missing)} answer; not: {told}{' and more' if len(silent) > 8 else ''}"
        )
        yield warning("agents", text, "on the device: sordino-agent check")
    elif not missing and not found:
        yield warning("agents", "the roster lists none that holds data", "sordino enroll-token, or sordino roster add")
    elif not unlike:
        yield ok("agents", f"all {len(found)} answer")


def version_findings(versions: dict[str, list[str]], *, ours: str) -> Iterator[Finding]:
    """Software versions that differ but work together."""
    others = {version: names for version, names in versions.items() if version != ours}
    if others:
        told = "; ".join(f"{version}: {', '.join(sorted(names)[:5])}" for version, names in sorted(others.items()))
        yield warning("versions", f"not {ours} as here, but working together: {told}", "upgrade them when convenient")
    elif versions:
        yield ok("versions", f"all run {ours}, as this server")


def _health(name: str, *, wait_s: float) -> Generator[Effect, Result, HealthReport | None]:
    answers = yield from ask(
        Ask(
            purpose=f"the clock of {name}",
            messages={name: Health()},
            expects=HealthReport,
            quorum=1,
            deadline_s=wait_s,
            straggler_s=wait_s,
        )
    )
    reply = answers.replies.get(name)
    return reply if isinstance(reply, HealthReport) else None
