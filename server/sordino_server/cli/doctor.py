"""`sordino doctor`: what could keep the fleet from working, each finding with its remedy."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from sordino_common.diagnosis.finding import Finding, count_line, exit_code
from sordino_server.cli.output import HERE, FleetOption, JsonOption, installed_version, print_json, printing

_COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}


def doctor(
    fleet: FleetOption = HERE,
    as_json: JsonOption = False,
    offline: Annotated[bool, typer.Option("--offline", help="Leave the network alone.")] = False,
    wait_s: Annotated[float, typer.Option("--wait", min=0.1, help="Seconds to wait for agents.")] = 3.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Warnings and errors only.")] = False,
) -> None:
    """Look for everything that could keep the fleet from working. Keys and their modes, roster, certificates, clocks,
    disk, memory, versions, run records, the broker's limits and access rules, agents; each finding with its remedy.
    Changes nothing.

    Exit code: 0 all well, or warnings only; 2 something is configured wrong; 3 the broker can't be reached or used;
    4 a matter of security (modes, keys, roster)."""
    from sordino_server.doctor import examine

    findings = examine(fleet, offline=offline, wait_s=wait_s, version=installed_version())
    code = exit_code(findings)
    if as_json:
        print_json({"exit_code": code, "findings": msgspec.to_builtins(findings)})
    else:
        show_findings(findings, quiet=quiet)
    if code:
        raise typer.Exit(code)


def show_findings(findings: list[Finding], *, quiet: bool) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", "what", "found"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        if quiet and finding.level == "ok":
            continue
        colour = _COLOURS[finding.level]
        text = escape(finding.text)
        if finding.remedy:
            text += f"\n[bold]-> {escape(finding.remedy)}[/]"
        table.add_row(f"[{colour}]{finding.level}[/]", escape(finding.what), text)
    with printing(400) as console:
        if table.row_count:
            console.print(table)
        console.print(count_line(findings))
