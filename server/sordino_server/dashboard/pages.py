"""A `View` as HTML: one page of parts, each with an id of its own, so that a script can put the newer one in its place.

All text from outside goes through `escape`. A chart's figures stand in a table behind it, and every state is a sign and
a word as well as a colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Final
from urllib.parse import quote

from sordino_server.charts import HALF, Line, bar_chart, line_chart
from sordino_server.dashboard.terminal import clock, duration, wait_words
from sordino_server.dashboard.view import STATES, TROUBLE, AgentView, Point, RunView, State, View
from sordino_server.page import card, count, document, metric_text, table, tile, word
from sordino_server.progress import number, size, some

SIGNS: Final[dict[State, str]] = {
    "answered": "✓", "awaited": "…", "idle": "·", "online": "●", "refused": "✕", "missing": "!", "offline": "–",
    "unknown": "?",
}  # fmt: skip
_NAMED: Final = 48  # a map of more agents shows signs, and names when asked
_ROWS: Final = 1000  # of a table
_CHIPS: Final = 24
_TROUBLED: Final = 8
_POINTS: Final = 400  # of a curve: more can't be told apart

HEAD: Final = (
    '<link rel="stylesheet" href="/style.css"><script src="/refresh.js" defer></script>'
    '<link rel="icon" href="data:,"><noscript><meta http-equiv="refresh" content="10"></noscript>'
)
_FOOTER: Final = "sordino web. It only looks: nothing here changes a run. Times are UTC."


def page_html(view: View, *, chosen: str = "") -> str:
    """The whole page. `chosen`: the run whose curves are drawn; the present or latest one if it is not there."""
    bar = (
        '<div class="bar"><p id="news" role="status"></p>'
        '<button type="button" id="pause" hidden aria-pressed="false">Pause</button></div>'
    )
    body = f'{bar}<div id="parts">{parts_html(view, chosen=chosen)}</div>'
    return document(f"{view.fleet}: Sordino", [body], head=HEAD, footer=_FOOTER)


def parts_html(view: View, *, chosen: str = "") -> str:
    """What changes."""
    run = next((run for run in view.runs if run.run == chosen), view.now)
    parts = [
        ("head", _head(view)),
        ("trouble", _trouble(view)),
        ("tiles", _tiles(view, run)),
        ("now", _now(view, run)),
        ("fleet", _fleet(view)),
        ("curves", "" if run is None else _curves(view, run)),
        ("privacy", _privacy(view)),
        ("bytes", "" if run is None else _bytes(run)),
        ("runs", _runs(view, run)),
        ("notices", _notices(view)),
    ]
    return "".join(f'<div data-part id="{name}">{html}</div>' for name, html in parts if html)


# --- parts ---------------------------------------------------------------------------------------------------------


def _head(view: View) -> str:
    if not view.server:
        roster = "run records of a simulation"
    elif view.roster_expires_s is None:
        roster = "no signed roster"
    else:
        left_s = view.roster_expires_s - view.at_s
        roster = f"roster epoch {view.roster_epoch}, " + (
            "EXPIRED" if left_s <= 0 else f"valid for another {duration(left_s)}"
        )
    births = f" · broker: {view.births}" if view.births else ""
    at = clock(view.at_s, view.at_s)
    return (
        f'<header><p class="brand">sordino</p><h1>{escape(view.fleet)}</h1>'
        f'<p class="sub">{escape(roster + births)} · as of <time>{at}</time></p></header>'
    )


def _trouble(view: View) -> str:
    texts = list(view.trouble)
    texts += [
        f"run {run.run}: no news for {duration(run.silent_s)}. The training process hangs, or its disk is full."
        for run in view.runs
        if run.silent_s is not None
    ]
    texts += [
        f"run {run.run}: the broker is away" for run in view.runs if run.status == "running" and not run.connected
    ]
    if not texts:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<section class="alarm" role="alert"><h2>Trouble</h2><ul>{items}</ul></section>'


def _tiles(view: View, run: RunView | None) -> str:
    known = len(view.agents) - view.count("unknown")
    away = view.count("offline")
    seen = f"{known - away}/{len(view.agents)}" if known else f"{len(view.agents)}"
    unheard = "nothing is trained, and nobody listens to the broker (--connect)"
    note = _counted(view) if known else unheard if view.agents else "nobody is enrolled yet"
    tiles = [tile("agents online" if known else "agents", seen, note)]
    if run is not None:
        done = f"{run.round}/{run.rounds}" if run.rounds else str(run.round)
        tiles.append(tile("round", done, f"{run.job}, {run.status}", "hero" if run.active else ""))
        metric = next(iter(run.metrics.items()), None)
        if metric is not None:
            tiles.append(tile(word(metric[0]), metric_text(*metric), f"after round {_evaluated(run)}"))
        elif run.loss is not None:
            tiles.append(tile("training loss", number(run.loss), f"after round {run.points[-1].round}"))
        tiles.append(
            tile("traffic", size(run.bytes_up + run.bytes_down), f"↑ {size(run.bytes_up)}, ↓ {size(run.bytes_down)}")
        )
    most = max(view.datasets, key=lambda entry: entry.epsilon, default=None)
    if most is not None and most.runs:
        tiles.append(tile("epsilon, at most", number(most.epsilon), f"{most.dataset}, one {most.unit}"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _now(view: View, run: RunView | None) -> str:
    """What the run waits for; or how it ended."""
    if run is None:
        return card("No run yet", '<p class="empty">Start one: <code>sordino train JOB</code></p>', "")
    rows = []
    if run.rounds:
        share = f'<progress max="{run.rounds}" value="{min(run.round, run.rounds)}" aria-label="rounds"></progress>'
        rows.append(f'<p class="rounds">{share} <span>round {run.round} of {run.rounds}</span></p>')
    wait = run.wait
    if wait is not None:
        rows.append(f"<p><strong>{escape(wait.purpose)}</strong>: {escape(wait_words(wait, view.at_s))}</p>")
        rows.append(_chips(wait.names))
    elif run.status == "comparing":
        rows.append("<p>The rounds are over; plain PyTorch trains for comparison.</p>")
    if run.error and not run.active:
        rows.append(f'<p class="error"><strong>{escape(run.status)}</strong>: {escape(run.error)}</p>')
        if run.status in ("interrupted", "failed"):
            rows.append(f"<p>Go on with: <code>sordino train --resume {escape(run.run)}</code></p>")
    warned = f" · {count(run.warnings, 'warning')}" if run.warnings else ""
    legend = (
        f'<span class="tag {escape(run.status)}">{escape(run.status)}</span> {escape(run.mode)}: {escape(run.security)}'
    )
    return card(f"Run {run.run}", "".join(rows), legend + warned)


def _chips(names: Sequence[str]) -> str:
    if not names:
        return ""
    items = "".join(f'<li title="{escape(name)}">{escape(name)}</li>' for name in names[:_CHIPS])
    more = f'<li class="more">and {len(names) - _CHIPS} more</li>' if len(names) > _CHIPS else ""
    return f'<p class="label">awaited</p><ul class="chips">{items}{more}</ul>'


def _fleet(view: View) -> str:
    if not view.agents:
        return card("Fleet", '<p class="empty">nobody is enrolled yet: <code>sordino roster add</code></p>', "")
    named = len(view.agents) <= _NAMED
    zones: dict[str, list[AgentView]] = {}
    for agent in view.agents:
        zones.setdefault(agent.zone, []).append(agent)
    if len(zones) > max(1, len(view.agents) // 3):
        zones = {"": list(view.agents)}
    maps = []
    for zone, agents in sorted(zones.items()):
        head = f"<h3>{escape(zone or 'no zone')} <span>{len(agents)}</span></h3>" if len(zones) > 1 else ""
        cells = "".join(_cell(agent, named=named) for agent in agents)
        maps.append(f'{head}<ul class="map{" named" if named else ""}">{cells}</ul>')
    legend = " ".join(
        f'<span class="key-state"><span class="sign {state}" aria-hidden="true">{SIGNS[state]}</span>'
        f"{view.count(state)} {state}</span>"
        for state in STATES
        if view.count(state)
    )
    troubled = sorted(view.agents, key=lambda agent: (agent.state not in TROUBLE, agent.name))
    rows = [
        (
            escape(agent.name),
            f'<span class="sign {agent.state}" aria-hidden="true">{SIGNS[agent.state]}</span> {agent.state}',
            f"{agent.answered}/{agent.asked}" if agent.asked else "",
            escape(agent.zone),
            escape(", ".join(agent.roles)),
            escape(agent.version),
            escape(agent.note),
        )
        for agent in troubled[:_ROWS]
    ]
    columns = ("agent", "state", "answered", "zone", "roles", "version", "why")
    behind = _details("fleet-table", "as a table", table(columns, rows))
    return card("Fleet", "".join(maps) + _troubled(troubled) + behind, legend)


def _troubled(agents: Sequence[AgentView]) -> str:
    """Who needs a person's eye, by name and reason."""
    bad = [agent for agent in agents if agent.state in TROUBLE]
    if not bad:
        return ""
    groups: dict[tuple[State, str], list[str]] = {}
    for agent in bad:
        groups.setdefault((agent.state, agent.note), []).append(agent.name)
    ordered = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    items = "".join(
        f"<li><strong>{state}</strong>{escape(f' ({note})' if note and note != state else '')}: "
        f"{escape(some(tuple(names)))}</li>"
        for (state, note), names in ordered[:_TROUBLED]
    )
    more = f"<li>and {len(groups) - _TROUBLED} more reasons, in the table</li>" if len(groups) > _TROUBLED else ""
    return f'<ul class="troubled">{items}{more}</ul>'


def _cell(agent: AgentView, *, named: bool) -> str:
    about = f"{agent.name}: {agent.state}" + (f", {agent.note}" if agent.note else "")
    if agent.asked:
        about += f"; answered {agent.answered} of {agent.asked}"
    hidden = "" if named else ' class="vh"'
    return (
        f'<li class="{agent.state}" title="{escape(about)}"><span class="sign {agent.state}" aria-hidden="true">'
        f"{SIGNS[agent.state]}</span><span{hidden}>{escape(agent.name)}</span>"
        f'<span class="vh">: {agent.state}</span></li>'
    )


def _curves(view: View, run: RunView) -> str:
    before = next((other for other in view.runs if other.job == run.job and other is not run and other.points), None)
    names = list(dict.fromkeys(name for point in run.points for name in point.metrics))[:3]
    cards = []
    for name in names:
        lines = [] if before is None else [_line(before, name, "b")]
        lines.append(_line(run, name, "a"))
        cards.append(_curve_card(word(name), lines, run, before, name))
    if not cards and all(point.loss is None for point in run.points):
        text = "No round has been evaluated yet, and under privacy no loss of training rows is told."
        return card("Curves", f'<p class="empty">{text}</p>', "")
    if any(point.loss is not None for point in run.points):
        lines = [] if before is None else [_line(before, "", "b")]
        cards.append(_curve_card("training loss", [*lines, _line(run, "", "a")], run, before, ""))
    return '<div class="two">' + "".join(cards) + "</div>"


def _curve_card(title: str, lines: Sequence[Line], run: RunView, before: RunView | None, metric: str) -> str:
    lines = [line for line in lines if line.points]
    drawn = line_chart(
        lines, x_label="round", height=220.0, width=HALF, label=f"{title} by round; figures in the table"
    )
    rows = [
        (str(point.round), metric_text(metric, value) if metric else number(value))
        for point in run.points[-_ROWS:]
        if (value := _value(point, metric)) is not None
    ]
    legend = f'<span class="key a"></span>{escape(run.run)}'
    if before is not None and len(lines) > 1:
        legend += f' &nbsp; <span class="key b"></span>{escape(before.run)}'
    name = f"figures-{'-'.join(title.split())}" if metric != title or not metric else "figures"
    return card(title, drawn + _details(escape(name), "figures", table(("round", title), rows)), legend)


def _line(run: RunView, metric: str, style: str) -> Line:
    points = [
        (float(point.round), value)
        for point in run.points
        if (value := _value(point, metric)) is not None and math.isfinite(value)
    ]
    step = max(1, math.ceil(len(points) / _POINTS))
    return Line(label=run.run, style=style, points=[*points[:-1:step], *points[-1:]])


def _value(point: Point, metric: str) -> float | None:
    return point.metrics.get(metric) if metric else point.loss


def _privacy(view: View) -> str:
    if not view.datasets:
        return ""
    rows = [
        (
            escape(entry.dataset),
            f"one {escape(entry.unit)}",
            number(entry.epsilon) if entry.runs else "",
            f'<span class="nw">{entry.delta:.2g}</span>' if entry.runs else "",
            str(entry.runs),
            str(entry.releases),
            f"{count(entry.uncounted, 'run')} not counted" if entry.uncounted else "",
        )
        for entry in view.datasets
    ]
    legend = (
        "all runs of this server added up, so never too little; each device's own budget and exact account: "
        "<code>sordino-agent budget</code>"
    )
    head = ("dataset", "whose privacy", "epsilon", "delta", "runs", "noised releases", "")
    return card("Privacy spent", table(head, rows), legend)


def _bytes(run: RunView) -> str:
    points = run.points[-60:]
    if not points:
        return ""
    stacks = [(float(point.bytes_up), float(point.bytes_down)) for point in points]
    texts = [(size(point.bytes_up), size(point.bytes_down)) for point in points]
    label = "bytes by round; figures in the table"
    chart = bar_chart(stacks, ("to the server", "to the agents"), first_x=points[0].round, show=texts, label=label)
    legend = '<span class="swatch a"></span>to the server &nbsp; <span class="swatch b"></span>to the agents'
    answers = [(float(point.answered), float(point.asked - point.answered)) for point in points]
    told = [(count(point.answered, "answer"), f"{point.asked - point.answered} without") for point in points]
    label = "answers by round; figures in the table"
    took = bar_chart(answers, ("answered", "not answered"), first_x=points[0].round, show=told, label=label)
    asked = '<span class="swatch a"></span>answered &nbsp; <span class="swatch b"></span>not answered'
    rows = [
        (str(p.round), f"{p.answered}/{p.asked}", size(p.bytes_up), size(p.bytes_down), f"{p.seconds:.2f}")
        for p in reversed(points)
    ]
    head = ("round", "answered", "to the server", "to the agents", "seconds")
    behind = _details("rounds-table", "figures", table(head, rows))
    return (
        '<div class="two">' + card("Bytes per round", chart + behind, legend)
        + card("Answers per round", took, asked) + "</div>"
    )  # fmt: skip


def _runs(view: View, shown: RunView | None) -> str:
    if not view.runs:
        return ""
    rows = []
    for run in view.runs:
        marked = ' aria-current="true"' if run is shown else ""
        metrics = ", ".join(f"{word(name)} {metric_text(name, value)}" for name, value in list(run.metrics.items())[:3])
        rows.append(
            (
                f'<a href="/?run={quote(run.run)}"{marked}>{escape(run.run)}</a>',
                f'<span class="tag {escape(run.status)}">{escape(run.status)}</span>',
                f"{run.round}/{run.rounds}" if run.rounds else str(run.round),
                escape(metrics),
                clock(run.created_s, view.at_s),
            )
        )
    total = ", ".join(
        f"{many} {status}" for status, many in sorted(view.runs_by_status.items(), key=lambda entry: -entry[1])
    )
    return card("Runs", table(("run", "state", "rounds", "result", "started"), rows), escape(total))


def _notices(view: View) -> str:
    items = "".join(
        f'<li class="{notice.level}"><time>{clock(notice.at_s, view.at_s)}</time> '
        f'<span class="level">{notice.level}</span> {escape(notice.text)}</li>'
        for notice in view.notices[:30]
    )
    body = f'<ul class="notices">{items}</ul>' if items else '<p class="empty">nothing was said</p>'
    return card("Errors and notices", body, "")


def _details(name: str, summary: str, body: str) -> str:
    return f'<details id="{name}"><summary>{summary}</summary>{body}</details>'


def _counted(view: View) -> str:
    return ", ".join(_counts(view))


def _counts(view: View) -> Iterator[str]:
    for state in STATES:
        if many := view.count(state):
            yield f"{many} {state}"


def _evaluated(run: RunView) -> int:
    return next((point.round for point in reversed(run.points) if point.metrics), 0)
