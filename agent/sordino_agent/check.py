"""`sordino-agent check`: everything that could keep this agent from working, each finding with its remedy.

- `check_state`    folder, key, databases, disk; our place in the roster
- `check_offer`    datasets, budgets, models, policy
- `check_machine`  memory and its limits, executor, clock, versions
- `check_broker`   reach, limits, access rules, certificates, what the broker keeps

What is common with the server's `doctor` is in `sordino_common.diagnosis`. Nothing is written, nothing is started.
"""

from __future__ import annotations

import time
from pathlib import Path

from sordino_agent.check_broker import broker_findings, file_findings
from sordino_agent.check_machine import machine_findings
from sordino_agent.check_offer import offer_findings
from sordino_agent.check_state import Standing, standing, state_findings
from sordino_agent.config import NO_CONFIGURATION, load_agent_config
from sordino_common.diagnosis.finding import Finding, error, exit_code, ok, untried
from sordino_common.errors import ConfigError

__all__ = ["Finding", "check", "exit_code"]


def check(path: Path, *, offline: bool) -> list[Finding]:
    """Look at everything; what depends on something that is broken is left out."""
    try:
        loaded = load_agent_config(path)
    except ConfigError as problem:
        text, remedy = str(problem), "mend the file at this place"
        if not path.exists():
            text, remedy = text.removesuffix(f"; {NO_CONFIGURATION}"), NO_CONFIGURATION
        return [error("configuration", text, remedy)]
    findings = [ok("configuration", f"{path} is valid")]
    findings += state_findings(loaded)
    found: Standing = standing(loaded, now_s=time.time())
    findings += found.findings
    findings += offer_findings(loaded)
    findings += machine_findings(loaded, found.roster, now_s=time.time())
    if offline:
        findings += file_findings(loaded, now_s=time.time())
        text = "reach, limits, access rules, the broker's certificate and roster, the server's version (--offline)"
        findings.append(untried("broker", text, "sordino-agent check, without --offline"))
    else:
        findings += broker_findings(loaded, found.roster, now_s=time.time())
    return findings
