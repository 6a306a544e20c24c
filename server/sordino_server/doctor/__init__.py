"""`sordino doctor`: everything that could keep the fleet from working, seen from the server's host.

- `house`    the fleet directory: keys, their modes, roster, certificates, run records, disk
- `host`     memory, clock, versions, torch and its GPU, ports
- `reach`    the broker under the server's rights: limits, access rules, the roster that it keeps
- `members`  the agents themselves: who answers, versions, clocks
"""

from __future__ import annotations

import time
from pathlib import Path

from sordino_common.diagnosis.finding import Finding, error, untried
from sordino_common.errors import ConfigError
from sordino_server.doctor.host import host_findings
from sordino_server.doctor.house import house_findings, signed_roster
from sordino_server.doctor.members import member_findings
from sordino_server.doctor.reach import file_findings, reach_findings
from sordino_server.home import Home

_LATER = "settle that first, then: sordino doctor"


def examine(folder: Path, *, offline: bool, wait_s: float, version: str) -> list[Finding]:
    """Look at everything that can be looked at; what can't is said to be untried. Nothing is changed."""
    try:
        home = Home(folder)
    except ConfigError as problem:
        remedy = (
            "mend the file at this place" if (folder / "fleet.yaml").exists() else "name it: sordino doctor --fleet DIR"
        )
        return [error("fleet", str(problem), remedy), *host_findings(None, now_s=time.time())]
    roster = signed_roster(home)
    findings = [*house_findings(home, roster, now_s=time.time()), *host_findings(roster, now_s=time.time())]
    findings += file_findings(home, now_s=time.time())
    if offline:
        text = "the broker's reach, limits, access rules and roster; agents, their versions and clocks (--offline)"
        return [*findings, untried("broker", text, "sordino doctor, without --offline")]
    met = list(reach_findings(home, roster, now_s=time.time()))
    findings += met
    if roster is None or any(finding.level == "error" and finding.what == "broker" for finding in met):
        why = "there is no roster" if roster is None else "the broker was not reached"
        return [*findings, untried("agents", f"who answers, versions, clocks: {why}", _LATER)]
    return [*findings, *member_findings(home, wait_s=wait_s, version=version)]
