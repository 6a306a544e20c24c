"""Where a `View` comes from: roster, run records, live files and births. Reads only, and holds nothing between views.

Finished rounds never change, so they are read once and kept, without who took part in each.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from sordino_common.channel.roster import Roster
from sordino_common.errors import SordinoError
from sordino_server.dashboard.births import Births
from sordino_server.dashboard.live import Live, Notice, Spending, live_path, read_live
from sordino_server.dashboard.view import AgentView, DatasetView, Point, RunView, State, Totals, View
from sordino_server.home import Home
from sordino_server.store import RUNS_FILE, RunRow, RunStore

RUNS: Final = 12  # shown; all are counted
SILENT_S: Final = 30.0  # a live file is written every 5 s
_NOTICES: Final = 50


@dataclass(slots=True)
class _Read:
    """What was read of a run's rounds."""

    points: list[Point] = field(default_factory=list)
    tally: dict[str, tuple[int, int]] = field(default_factory=dict)  # agent -> (answered, asked)

    def catch_up(self, store: RunStore, run: str) -> None:
        found = store.outline(run, after=self.points[-1].round if self.points else -1)
        for record in found.records:
            answered, asked = found.rounds.get(record.round, (0, 0))
            self.points.append(
                Point(
                    round=record.round,
                    loss=record.loss,
                    metrics=dict(record.metrics),
                    answered=answered,
                    asked=asked,
                    bytes_up=record.bytes_up,
                    bytes_down=record.bytes_down,
                    seconds=record.seconds,
                )
            )
        for name, (answered, asked) in found.agents.items():
            before = self.tally.get(name, (0, 0))
            self.tally[name] = before[0] + answered, before[1] + asked


class Source:
    """Of the fleet directory `folder`, or of a folder of run records that `sordino-sim run --store` has left.

    One thread's, and to be closed. `births`: who listens to the broker, if anybody does. `database`: where run
    records are, if not where fleet.yaml says. Raises `ConfigError` if the folder is neither."""

    def __init__(
        self,
        folder: Path,
        *,
        version: str,
        births: Births | None = None,
        database: str | None = None,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self.folder = folder
        self._version = version
        self._births = births
        self._wall_s = wall_s
        self._home = None
        if (folder / "fleet.yaml").exists() or not (folder / RUNS_FILE).exists():
            self._home = Home(folder)
            database = database or self._home.spec.database
        self._database = database
        self._read: dict[str, _Read] = {}
        self._costed: dict[str, tuple[float, str, tuple[Spending, ...], bool]] = {}
        self._summed: tuple[tuple[int, float], Totals] = ((-1, 0.0), Totals())
        self._store: RunStore | None = None  # opened once there are records

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def view(self, *, runs: int = RUNS) -> View:
        """The fleet now. What can't be read is named in `trouble`; raises `ConfigError` if run records can't be."""
        now_s = self._wall_s()
        trouble: list[str] = []
        roster = self._roster(trouble)
        if self._store is None and (self._database is not None or (self.folder / RUNS_FILE).exists()):
            self._store = RunStore(self.folder, wall_s=self._wall_s, database=self._database, read_only=True)
        store = self._store
        rows = () if store is None else store.runs()
        recent = tuple(reversed(rows[-runs:])) if runs else ()
        shown = [row for row in rows if row.status == "running" and row not in recent]
        views: tuple[RunView, ...] = ()
        datasets: tuple[DatasetView, ...] = ()
        if store is not None:
            views = tuple(self._run(store, row, now_s, trouble) for row in (*shown, *recent))
            datasets = _datasets(self._costs(store, rows, trouble))
        first = next((run for run in views if run.active), views[0] if views else None)
        told = None if first is None else _live(self.folder, first.run, trouble)
        tally = {} if first is None else self._read[first.run].tally
        statuses: dict[str, int] = {}
        for row in rows:
            statuses[row.status] = statuses.get(row.status, 0) + 1
        return View(
            fleet=self._home.spec.fleet if self._home is not None else self.folder.resolve().name,
            server=self._home.spec.server if self._home is not None else "",
            version=self._version,
            at_s=now_s,
            roster_epoch=None if roster is None else roster.epoch,
            roster_expires_s=None if roster is None else float(roster.expires_s),
            births="" if self._births is None else self._births.state,
            agents=self._agents(roster, told if first is not None and first.active else None, tally),
            runs=views,
            runs_by_status=statuses,
            totals=self._totals(rows),
            datasets=datasets,
            notices=_notices(told, views),
            trouble=tuple(dict.fromkeys(trouble)),
        )

    # --- parts -----------------------------------------------------------------------------------------------------

    def _roster(self, trouble: list[str]) -> Roster | None:
        if self._home is None:
            return None
        try:
            book = self._home.roster_book(wall_s=self._wall_s)
            if book.current is None:
                trouble.append("the roster is not signed yet: sordino roster sign")
            return book.current
        except SordinoError as error:
            trouble.append(f"the roster can't be used: {error}")
            return None

    def _totals(self, rows: Sequence[RunRow]) -> Totals:
        """Read again when some run has changed."""
        if self._store is None:
            return Totals()
        newest = len(rows), max((row.changed_s for row in rows), default=0.0)
        if self._summed[0] != newest:
            self._summed = newest, Totals(**self._store.totals())
        return self._summed[1]

    def _run(self, store: RunStore, row: RunRow, now_s: float, trouble: list[str]) -> RunView:
        read = self._read.setdefault(row.run, _Read())
        read.catch_up(store, row.run)
        live = _live(self.folder, row.run, trouble)
        spec = _spec(row)
        status = row.status
        active = status == "running"
        if active and live is not None and live.state == "comparing":
            status = "comparing"
        silent_s = None
        if status == "running" and live is not None and now_s - live.updated_s > SILENT_S:
            silent_s = now_s - live.updated_s
        up, down = sum(p.bytes_up for p in read.points), sum(p.bytes_down for p in read.points)
        spent, uncounted = _cost(row, live, store)
        return RunView(
            run=row.run,
            job=row.job,
            mode=row.mode,
            dataset=str(_at(spec, "data", "dataset") or ""),
            security=live.security if live is not None else str((row.summary or {}).get("security", "")),
            status=status,
            error=row.error or "",
            created_s=row.created_s,
            changed_s=row.changed_s,
            round=max(live.round if active and live is not None else 0, read.points[-1].round if read.points else 0),
            rounds=live.rounds if live is not None else _at(spec, "train", "rounds"),
            points=tuple(read.points),
            wait=live.wait if active and live is not None else None,
            bytes_up=max(up, live.bytes_up if active and live is not None else 0),
            bytes_down=max(down, live.bytes_down if active and live is not None else 0),
            connected=live.connected if active and live is not None else False,
            warnings=live.warnings if live is not None else 0,
            spent=spent,
            uncounted=uncounted,
            silent_s=silent_s,
        )

    def _costs(
        self, store: RunStore, rows: Iterable[RunRow], trouble: list[str]
    ) -> Iterable[tuple[str, tuple[Spending, ...], bool]]:
        """(dataset, ε of its units, whether there is more that is not known) of every run."""
        for row in rows:
            known = self._costed.get(row.run)
            if known is None or known[0] != row.changed_s or row.status == "running":
                spent, uncounted = _cost(row, _live(self.folder, row.run, trouble), store)
                known = (row.changed_s, str(_at(_spec(row), "data", "dataset") or "?"), spent, uncounted)
                self._costed[row.run] = known
            yield known[1:]

    def _agents(
        self, roster: Roster | None, live: Live | None, tally: Mapping[str, tuple[int, int]]
    ) -> tuple[AgentView, ...]:
        entries = {} if roster is None else {e.name: e for e in roster.entries if "server" not in e.roles}
        told = {} if live is None else {agent.name: agent for agent in live.agents}
        versions = {} if self._births is None else self._births.online
        names = sorted({*entries, *told, *(tally if roster is None else ())})
        agents = []
        for name in names:
            state: State = "unknown"
            if name in told:
                state = told[name].state
            elif self._births is not None and self._births.heard:
                state = "online" if name in versions else "offline"
            entry = entries.get(name)
            answered, asked = tally.get(name, (0, 0))
            agents.append(
                AgentView(
                    name=name,
                    state=state,
                    roles=() if entry is None else tuple(entry.roles),
                    zone="" if entry is None else entry.zone,
                    note=told[name].note if name in told else "",
                    version=versions.get(name, ""),
                    answered=answered,
                    asked=asked,
                )
            )
        return tuple(agents)


def _live(folder: Path, run: str, trouble: list[str]) -> Live | None:
    try:
        return read_live(live_path(folder, run))
    except OSError as error:
        trouble.append(f"{live_path(folder, run)}: can't be read: {error.strerror}")
        return None


def _cost(row: RunRow, live: Live | None, store: RunStore) -> tuple[tuple[Spending, ...], bool]:
    """(ε of the run by unit, whether releases have begun whose price is not known here)."""
    privacy = (row.summary or {}).get("privacy")
    if isinstance(privacy, Mapping):
        both = [privacy] if privacy.get("device") is None else [privacy, privacy["device"]]
        return tuple(
            Spending(unit=one["unit"], epsilon=one["epsilon"], delta=one["delta"], releases=one["releases"])
            for one in both
        ), False
    begun = store.begun(row.run)
    if live is not None and live.spent:
        return live.spent, False
    return (), begun > 0


def _datasets(costs: Iterable[tuple[str, tuple[Spending, ...], bool]]) -> tuple[DatasetView, ...]:
    found: dict[tuple[str, str], list[Spending]] = {}
    uncounted: dict[str, int] = {}
    for dataset, spent, more in costs:
        uncounted[dataset] = uncounted.get(dataset, 0) + int(more)
        for one in spent:
            if one.releases:
                found.setdefault((dataset, one.unit), []).append(one)
    for dataset, many in uncounted.items():
        if many and all(key[0] != dataset for key in found):
            found[dataset, "record"] = []
    return tuple(
        DatasetView(
            dataset=dataset,
            unit=unit,
            epsilon=sum(one.epsilon for one in ones),
            delta=sum(one.delta for one in ones),
            releases=sum(one.releases for one in ones),
            runs=len(ones),
            uncounted=uncounted[dataset],
        )
        for (dataset, unit), ones in sorted(found.items())
    )


def _notices(live: Live | None, runs: Iterable[RunView]) -> tuple[Notice, ...]:
    """The newest first: what the shown run has told, and how others have failed."""
    told = list(live.notices) if live is not None else []
    told += [
        Notice(at_s=run.changed_s, level="warning", text=f"run {run.run} {run.status}: {run.error}")
        for run in runs
        if run.error
    ]
    return tuple(sorted(told, key=lambda notice: -notice.at_s)[:_NOTICES])


def _spec(row: RunRow) -> Any:
    try:
        return json.loads(row.job_json)
    except ValueError:
        return {}


def _at(value: Any, *keys: str) -> Any:
    """The entry below `keys`; None where there is none: a record may be of another version."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
