"""A `View` on a terminal: one frame of lines that fit, from 80 x 24 upwards. No fact is told by colour alone."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from rich.text import Text

from sordino_server.dashboard.live import WaitNow
from sordino_server.dashboard.view import STATES, TROUBLE, AgentView, RunView, State, View
from sordino_server.progress import number, size, some
from sordino_server.waits import printable

STYLES: Final[dict[State, str]] = {
    "answered": "green", "awaited": "cyan", "idle": "", "online": "green", "refused": "bold red", "missing": "yellow",
    "offline": "yellow", "unknown": "dim",
}  # fmt: skip
# Who needs a person's eye comes first.
_ORDER: Final[tuple[State, ...]] = (
    "refused", "missing", "offline", "awaited", "unknown", "idle", "online", "answered"
)  # fmt: skip
_LEAST_AGENTS: Final = 4
_NOTICES: Final = 4


def frame(view: View, *, width: int, height: int) -> list[Text]:
    """At most `height` lines of at most `width` columns."""
    head = [*_head(view), *_run_lines(view.now, view.at_s, width)]
    budgets = list(_budget_lines(view))[: max(2, height // 8)]
    notices = [*_trouble_lines(view), *_notice_lines(view, _NOTICES if height < 40 else 3 * _NOTICES)]
    room = height - len(head) - len(budgets) - len(notices)
    if room < _LEAST_AGENTS:
        notices = notices[: max(1, len(notices) - (_LEAST_AGENTS - room))]
        room = height - len(head) - len(budgets) - len(notices)
    lines = [*head, *_agent_lines(view, max(room, 0), width), *budgets, *notices][:height]
    for line in lines:
        line.plain = printable(line.plain)  # names, notes and errors come from devices
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return lines


def duration(seconds: float) -> str:
    """12 s, 3 min, 5 h, 12 d."""
    for most, unit, factor in ((90.0, "s", 1.0), (5400.0, "min", 60.0), (172_800.0, "h", 3600.0)):
        if seconds < most:
            return f"{max(0.0, seconds) / factor:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def clock(at_s: float, now_s: float) -> str:
    """The time of a day, in UTC; with its date if it was not today."""
    at, now = datetime.fromtimestamp(at_s, UTC), datetime.fromtimestamp(now_s, UTC)
    return at.strftime("%H:%M:%S" if at.date() == now.date() else "%Y-%m-%d %H:%M")


def counts(view: View) -> str:
    """7 answered, 2 awaited, 1 offline."""
    return ", ".join(f"{many} {state}" for state in STATES if (many := view.count(state))) or "none"


def waiting_line(run: RunView, at_s: float, *, shown: int = 6) -> str:
    """For whom, for what, how many are there and needed, how long it may take; empty if nobody is awaited."""
    wait = run.wait
    if wait is None:
        return ""
    names = some(wait.names, shown) or "nobody: it goes on at once"
    return f"{wait.purpose}: {wait_words(wait, at_s)}; awaited: {names}"


def wait_words(wait: WaitNow, at_s: float) -> str:
    """How many are there, needed, or to come, for how long, and how long it may take."""
    since, left = duration(at_s - wait.since_s), duration(max(0.0, wait.deadline_s - at_s))
    # Whoever listens for the rest only tells who is missing.
    rest = wait.have == 0 and wait.quorum == len(wait.names)
    here = f"{len(wait.names)} to come" if rest else f"{wait.have} here, {wait.quorum} needed"
    return f"{here}, for {since}, {left} left"


# --- lines ---------------------------------------------------------------------------------------------------------


def _head(view: View) -> Iterator[Text]:
    if not view.server:
        roster = "run records of a simulation"
    elif view.roster_expires_s is None:
        roster = "no signed roster"
    else:
        roster = f"roster epoch {view.roster_epoch}, expires in {duration(view.roster_expires_s - view.at_s)}"
    yield Text.assemble((f"sordino {view.fleet}", "bold"), f"  {roster}  {clock(view.at_s, view.at_s)} UTC")
    births = f"  (broker: {view.births})" if view.births else ""
    trouble = any(view.count(state) for state in TROUBLE)
    yield Text.assemble(
        ("agents ", "bold"), (f"{len(view.agents)}: {counts(view)}", "yellow" if trouble else ""), births
    )


def _run_lines(run: RunView | None, at_s: float, width: int) -> Iterator[Text]:
    if run is None:
        yield Text("no run yet: sordino train JOB")
        return
    style = {"failed": "bold red", "done": "green", "running": "cyan"}.get(run.status, "yellow")
    yield Text.assemble(("run ", "bold"), run.run, "  ", (run.status, style), f"  {run.mode}")
    yield Text(f"    {run.security}", style="dim")
    figures = [] if run.loss is None else [f"loss {number(run.loss)}"]
    figures += [f"{name} {number(value)}" for name, value in run.metrics.items()]
    total = run.rounds or 0
    bar = _bar(run.round / total if total else 0.0, 20 if width < 100 else 40)
    yield Text(f"    round {run.round}/{total or '?'} {bar} {', '.join(figures)}")
    wire = f"up {size(run.bytes_up)}, down {size(run.bytes_down)}"
    last = run.points[-1].seconds if run.points else None
    pace = "" if last is None else f", last round {last:.2f} s"
    broker = ", the broker is away" if run.status == "running" and not run.connected else ""
    warned = f", {run.warnings} warnings" if run.warnings else ""
    yield Text(f"    {wire}{pace}{warned}{broker}", style="yellow" if broker else "")
    if run.silent_s is not None:
        yield Text(
            f"    NO NEWS for {duration(run.silent_s)}: the training process hangs, or its disk is full", "bold red"
        )
    elif run.wait is not None:
        yield Text(f"    {waiting_line(run, at_s)}", "cyan")
    elif run.status == "comparing":
        yield Text("    the rounds are over; plain PyTorch trains for comparison", "cyan")
    if run.error and not run.active:
        yield Text(f"    {run.error}", "red")


def _agent_lines(view: View, room: int, width: int) -> Iterator[Text]:
    if not view.agents or room < 2:
        return
    ordered = sorted(view.agents, key=lambda agent: (_ORDER.index(agent.state), agent.name))
    longest = max(len(agent.name) for agent in ordered)
    name_columns = min(longest, max(12, width // 3))
    versions = any(agent.version for agent in ordered)
    shown = ordered if len(ordered) <= room - 1 else ordered[: room - 2]
    head = f"{'agent':{name_columns}}  {'state':9} {'answered':>9}  " + (f"{'version':9} " if versions else "") + "why"
    yield Text(head, style="bold")
    for agent in shown:
        yield _agent_line(agent, name_columns, versions=versions)
    rest = ordered[len(shown) :]
    if rest:
        tally = {state: sum(agent.state == state for agent in rest) for state in _ORDER}
        yield Text(f"and {len(rest)} more: " + ", ".join(f"{n} {state}" for state, n in tally.items() if n), "dim")


def _agent_line(agent: AgentView, columns: int, *, versions: bool) -> Text:
    name = agent.name
    name = name if len(name) <= columns else name[: columns - 1] + "…"
    share = f"{agent.answered}/{agent.asked}" if agent.asked else ""
    version = f"{agent.version[:9]:9} " if versions else ""
    why = agent.note if agent.note else ",".join(agent.roles)
    return Text.assemble(
        f"{name:{columns}}  ", (f"{agent.state:9}", STYLES[agent.state]), f" {share:>9}  {version}", (why, "dim")
    )


def _budget_lines(view: View) -> Iterator[Text]:
    for entry in view.datasets:
        more = f", and {entry.uncounted} runs that are not counted" if entry.uncounted else ""
        runs = f"{entry.runs} run{'' if entry.runs == 1 else 's'}"
        yield Text.assemble(
            ("privacy ", "bold"),
            f"{entry.dataset}, one {entry.unit}: epsilon {number(entry.epsilon)} at delta {entry.delta:.2g} "
            f"at most, {runs}, {entry.releases} releases{more}",
        )


def _trouble_lines(view: View) -> Iterator[Text]:
    for text in view.trouble:
        yield Text(f"! {text}", "bold red")


def _notice_lines(view: View, most: int) -> Iterator[Text]:
    for notice in view.notices[:most]:
        mark, style = ("! ", "yellow") if notice.level == "warning" else ("  ", "dim")
        yield Text(f"{mark}{clock(notice.at_s, view.at_s)} {notice.text}", style)


def _bar(share: float, columns: int) -> str:
    done = round(min(1.0, max(0.0, share)) * columns)
    return "[" + "#" * done + "-" * (columns - done) + "]"
