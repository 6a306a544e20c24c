"""A privacy plan on the screen, as JSON, and as a page (`privacy.html`, `privacy.json`)."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sordino_common.channel.files import write_atomically
from sordino_common.errors import ConfigError
from sordino_server.accounting.adversary import NOT_COVERED
from sordino_server.accounting.privacy_plan import Level, PrivacyPlan, UnitPlan
from sordino_server.accounting.privacy_words import paragraph
from sordino_server.charts import Line, line_chart
from sordino_server.page import card, page, table, tile
from sordino_server.progress import number

_HEAD = ("noise multiplier", "epsilon (PLD)", "epsilon (RDP)", "epsilon (moments)", "")


def plan_json(plan: PrivacyPlan) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "job": plan.job,
        **plan.first.to_json(),
        "rounds": plan.rounds,
        "local_steps": plan.local_steps,
        "noise": plan.noise_at,
        "helpers": plan.helpers,
        "not_covered": list(NOT_COVERED),
        "paragraph": paragraph(plan),
        "device": None if plan.second is None else plan.second.to_json(),
    }


def render(plan: PrivacyPlan, console: Console) -> None:
    """Figures, the table of other noise levels, the paragraph."""
    for unit in _units(plan):
        for name, value in _facts(unit):
            console.print(Text(f"{name:<22}{value}"))
        made = Table(box=None, header_style="bold", pad_edge=False)
        for at, column in enumerate(_HEAD):
            made.add_column(column, justify="right" if at < len(_HEAD) - 1 else "left")
        for level in unit.levels:
            made.add_row(*(Text(cell) for cell in _row(unit, level)))
        console.print()
        console.print(made)
        console.print()
    console.print(Text(paragraph(plan)))


def write_plan(plan: PrivacyPlan, folder: Path) -> None:
    """`privacy.html` and `privacy.json` in `folder`. Raises `ConfigError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        encoded = msgspec.json.format(msgspec.json.encode(plan_json(plan)), indent=2) + b"\n"
        write_atomically(folder / "privacy.json", encoded)
        write_atomically(folder / "privacy.html", plan_html(plan).encode())
    except OSError as error:
        raise ConfigError(f"{folder}: the report can't be written: {error.strerror}") from None


def plan_html(plan: PrivacyPlan) -> str:
    """The page: tiles, the paragraph, ε against noise, all figures."""
    first = plan.first
    tiles = [
        tile("epsilon", number(first.found.epsilon), f"at delta {first.delta:g}, for one {first.unit}", "hero"),
        tile("noise multiplier", number(first.steps.noise_multiplier), f"times {first.bound}"),
        tile("noised releases", f"{first.steps.count}", f"over {plan.rounds} rounds"),
    ]
    head = (
        f'<header><p class="brand">sordino</p><h1>{escape(plan.job)}</h1>'
        f'<p class="sub">privacy plan · {escape(first.unit)} level</p></header>'
        f'<div class="tiles">{"".join(tiles)}</div>'
    )
    sections = [
        head,
        card("What is promised", f"<p>{escape(paragraph(plan))}</p>", ""),
    ]
    for unit in _units(plan):
        lines = [
            Line(
                label=f"{unit.found.accountant.upper()} accountant",
                style="a",
                points=[(level.noise_multiplier, level.found.epsilon) for level in unit.levels],
            ),
            Line(
                label="moments accountant",
                style="b",
                points=[(level.noise_multiplier, level.found.moments) for level in unit.levels],
            ),
        ]
        legend = (
            f'<span class="key a"></span>{escape(unit.found.accountant.upper())} &nbsp; <span class="key b"></span>the '
            "moments accountant of 2016, for comparison"
        )
        chart = line_chart(lines, x_label="noise multiplier")
        sections.append(card(f"Epsilon against noise, for one {unit.unit}", chart, legend))
        rows = [[escape(cell) for cell in _row(unit, level)] for level in unit.levels]
        facts = [(escape(name), escape(value)) for name, value in _facts(unit)]
        sections.append(card("Other noise levels", table(_HEAD, rows), "everything else as planned"))
        sections.append(card("Figures", table(("", ""), facts, header=False), ""))
    return page(f"{plan.job}, privacy: Sordino", sections)


def _units(plan: PrivacyPlan) -> tuple[UnitPlan, ...]:
    return (plan.first,) if plan.second is None else (plan.first, plan.second)


def _facts(unit: UnitPlan) -> list[tuple[str, str]]:
    found = unit.found
    asked = "" if unit.target is None else f" (asked for: {unit.target:g})"
    pld = "does not apply" if found.pld is None else number(found.pld)
    facts = [
        ("unit", unit.unit),
        ("epsilon", f"{number(found.epsilon)} at delta {unit.delta:g}, by {found.accountant}{asked}"),
        ("by accountant", f"PLD {pld}, RDP {number(found.rdp)}, moments {number(found.moments)}"),
        ("noise multiplier", f"{number(unit.steps.noise_multiplier)} times {unit.bound}"),
        ("noised releases", f"{unit.steps.count}"),
    ]
    if unit.unit == "record":
        facts.append(("sampling rate", f"{unit.steps.sampling_rate:g} (Poisson)"))
    facts.append(("holds against", unit.promise.adversary))
    facts.append(
        ("a device's budget", f"at least epsilon {number(unit.ledger_epsilon)} at delta {unit.delta:g}, unspent")
    )
    return facts


def _row(unit: UnitPlan, level: Level) -> tuple[str, ...]:
    found = level.found
    planned = abs(level.noise_multiplier / unit.steps.noise_multiplier - 1.0) < 1e-6
    return (
        number(level.noise_multiplier),
        "" if found.pld is None else number(found.pld),
        number(found.rdp),
        number(found.moments),
        "planned" if planned else "",
    )
