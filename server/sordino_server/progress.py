"""A run as people watch it: a live bar on a terminal, one line per event elsewhere, always on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Final, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from sordino_server.rounds.events import (
    Answered,
    Event,
    Note,
    RoundDone,
    RoundRecord,
    RoundStarted,
    RunDone,
    RunStarted,
    Waiting,
)

_NAMES_SHOWN: Final = 8
_NAMES_IN_BAR: Final = 2  # the bar has one line of perhaps 80 columns


def size(count: float) -> str:
    """Bytes for people: 999 B, 1.2 kB, 34.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000.0:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000.0
    return f"{count:.1f} TB"


def number(value: float) -> str:
    """Four significant digits, trailing zeros kept."""
    return f"{value:#.4g}".rstrip(".")


def some(names: tuple[str, ...], shown: int = _NAMES_SHOWN) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def line_of(event: Event, *, rounds: int) -> str | None:
    """The event as one line of a log; None for what only a live view shows."""
    match event:
        case RunStarted():
            start = f", going on at round {event.first_round}" if event.first_round > 1 else ""
            sees = "the server sees each agent's update" if event.security == "plain" else _loud(event.security)
            return f"run {event.run}: {event.mode} ({sees}), {event.rounds} rounds{start}, {len(event.members)} agents"
        case Waiting():
            return (
                f"{event.purpose}: {event.have} here, {event.quorum} needed, waiting for {some(event.names)} "
                f"({event.waited_s:.0f} s; {max(event.left_s, 0.0):.0f} s left)"
            )
        case RoundStarted(attempt=attempt) if attempt > 0:
            return f"round {event.round}: attempt {attempt + 1}, asking {some(event.asked)}"
        case RoundDone(record=record):
            return f"round {record.round}/{rounds}: " + ", ".join(figures(record))
        case Note():
            return f"warning: {event.text}" if event.level == "warning" else event.text
        case RunDone():
            return "done: " + result_line(event.summary)
        case _:
            return None


def figures(record: RoundRecord) -> list[str]:
    parts = [] if record.loss is None else [f"loss {number(record.loss)}"]
    parts += [f"{name} {number(value)}" for name, value in record.metrics.items()]
    answered = len(record.shares) - record.dropouts
    parts.append(f"agents {answered}/{len(record.shares)}")
    parts.append(f"up {size(record.bytes_up)}, down {size(record.bytes_down)}")
    parts.append(f"{record.seconds:.2f} s")
    return parts


def _loud(security: str) -> str:
    """`passive` is never said quietly: one cheating member could have falsified the result."""
    return security.replace("passive", "PASSIVE")


def result_line(summary: Mapping[str, object]) -> str:
    """The run's metrics beside plain PyTorch's."""
    parts = ["security PASSIVE (cheating would not be seen)"] if summary.get("security") == "passive" else []
    metrics, baseline = summary.get("metrics"), summary.get("baseline")
    privacy = summary.get("privacy")
    if isinstance(privacy, Mapping):
        parts.append(f"epsilon {number(privacy['epsilon'])} at delta {privacy['delta']:g} for one {privacy['unit']}")
    if isinstance(metrics, Mapping):
        for name, value in metrics.items():
            text = f"{name} {number(value)}"
            if isinstance(baseline, Mapping) and name in baseline:
                text += f" (plain PyTorch {number(baseline[name])})"
            parts.append(text)
    seconds = summary.get("seconds")
    if isinstance(seconds, float):
        parts.append(f"{seconds:.1f} s")
    overhead = summary.get("overhead_vs_torch")
    if isinstance(overhead, float):
        parts.append(f"{overhead:.1f} times plain PyTorch's time")
    return ", ".join(parts)


class ProgressView:
    """Use as a context manager and as an observer. `stream` is stderr unless told otherwise; `quiet` shows nothing."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._live = self._console.is_terminal and not quiet
        self._quiet = quiet
        self._rounds = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressView:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, event: Event) -> None:
        if self._quiet:
            return
        if isinstance(event, RunStarted):
            self._rounds = event.rounds
            self._print(line_of(event, rounds=self._rounds), "bold")
            if self._live:
                self._start(event)
            return
        if isinstance(event, RunDone):
            self._stop()
            self._print(line_of(event, rounds=self._rounds), "bold green")
            return
        if self._bar is not None and self._task is not None:
            self._update(self._bar, self._task, event)
            if isinstance(event, RoundDone | Waiting):
                return
        style = "yellow" if isinstance(event, Note) and event.level == "warning" else "dim"
        self._print(line_of(event, rounds=self._rounds), style if self._live else "")

    def _print(self, text: str | None, style: str) -> None:
        if text is not None:
            self._console.print(Text(text, style=style))

    def _start(self, event: RunStarted) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.fields[what]}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("[cyan]{task.fields[result]}"),
            TextColumn("{task.fields[who]}"),
            TextColumn("[dim]{task.fields[wire]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            refresh_per_second=8,
        )
        self._task = self._bar.add_task(
            "run", total=event.rounds, completed=event.first_round - 1, what="start", result="", who="", wire=""
        )
        self._bar.start()

    def _update(self, bar: Progress, task: TaskID, event: Event) -> None:
        match event:
            case RoundStarted():
                bar.update(task, what=f"round {event.round}", who=f"0/{len(event.asked)} agents")
            case Answered():
                wire = f"↑ {size(event.bytes_up)} ↓ {size(event.bytes_down)}"
                bar.update(task, who=f"{event.have}/{event.asked} agents", wire=wire)
            case Waiting():
                bar.update(task, who=f"{event.have} here, waiting for {some(event.names, _NAMES_IN_BAR)}")
            case RoundDone(record=record):
                parts = [] if record.loss is None else [f"loss {number(record.loss)}"]
                parts += [f"{name} {number(value)}" for name, value in record.metrics.items()]
                bar.update(task, completed=record.round, result="  ".join(parts))
            case _:
                pass

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
