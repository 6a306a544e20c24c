"""A finding: one thing that was looked at, what was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

Level = Literal["ok", "warning", "error"]
CONFIGURATION: Final = 2
BROKER: Final = 3
SECURITY: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`remedy`: a command where there is one. `exit_code` is what an error of this kind ends a command with."""

    level: Level
    what: str
    text: str
    remedy: str = ""
    exit_code: int = 0


def ok(what: str, text: str) -> Finding:
    return Finding(level="ok", what=what, text=text)


def warning(what: str, text: str, remedy: str) -> Finding:
    return Finding(level="warning", what=what, text=text, remedy=remedy)


def error(what: str, text: str, remedy: str, *, exit_code: int = CONFIGURATION) -> Finding:
    return Finding(level="error", what=what, text=text, remedy=remedy, exit_code=exit_code)


def untried(what: str, text: str, remedy: str) -> Finding:
    """What could not be looked at, and why: a warning, since it may be anything."""
    return warning(what, f"not tried: {text}", remedy)


def exit_code(findings: Iterable[Finding]) -> int:
    """That of the worst error: configuration (2) before security (4) before broker (3); 0 if there is none."""
    codes = {finding.exit_code for finding in findings if finding.level == "error"}
    return next((code for code in (CONFIGURATION, SECURITY, BROKER) if code in codes), 0)


def count_line(findings: Iterable[Finding]) -> str:
    """The last line for people."""
    levels = [finding.level for finding in findings]
    errors, warnings = levels.count("error"), levels.count("warning")
    return f"{len(levels)} things looked at: {errors} errors, {warnings} warnings"
