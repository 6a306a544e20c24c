"""Keeps a run's live file: an observer of its events that also asks the conductor whom it waits for.

Written at once for what people wait to see, otherwise soon after an event, not more than every `LEAST_S`, and every
`MOST_S` while nothing happens, so that a reader can tell a quiet run from one that hangs. A file that can't be written
is said once in the log and never ends a run.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from sordino_common.clock import Loop, Timer
from sordino_server.conductor import Conductor
from sordino_server.dashboard.live import AgentNow, AgentState, Live, Notice, Spending, WaitNow, live_path, write_live
from sordino_server.rounds.events import Answered, Event, Note, RoundDone, RoundStarted, RunDone, RunStarted

log = logging.getLogger("sordino.server")

LEAST_S: Final = 0.5
MOST_S: Final = 5.0
NOTICES: Final = 50
Privacy = Callable[[], Mapping[str, Any] | None]


class Publisher:
    """Of one run, from `RunStarted` to `close`. `folder`: the fleet directory. `privacy`: the summary's `privacy`
    object as of now, if the run has one; it may take some milliseconds, and is asked when `spend` was called."""

    def __init__(
        self, folder: Path, run: str, *, dataset: str, conductor: Conductor, loop: Loop, privacy: Privacy
    ) -> None:
        self._path = live_path(folder, run)
        self._run = run
        self._dataset = dataset
        self._conductor = conductor
        self._loop = loop
        self._privacy = privacy
        self._begun: RunStarted | None = None
        self._started_s = loop.wall_s()
        self._state = "running"
        self._error = ""
        self._round = self._attempt = 0
        self._outcomes: dict[str, tuple[AgentState, str]] = {}
        self._notices: deque[Notice] = deque(maxlen=NOTICES)
        self._warnings = 0
        self._spent: tuple[Spending, ...] = ()
        self._spending = True  # something may have been released by an earlier process
        self._timer: Timer | None = None
        self._due_s = 0.0
        self._failed = self._closed = False

    def __call__(self, event: Event) -> None:
        if self._closed:
            return  # who comes and goes after the end is no news of this run
        now = True
        match event:
            case RunStarted():
                self._begun, self._round = event, event.first_round - 1
            case RoundStarted():
                self._round, self._attempt = event.round, event.attempt
                self._outcomes = {}
            case Answered():
                self._outcomes[event.name] = (event.outcome, event.note)
                now = False
            case RoundDone(record=record):
                self._outcomes = {name: (share.outcome, share.note) for name, share in record.shares.items()}
            case Note():
                self._notices.append(Notice(at_s=self._loop.wall_s(), level=event.level, text=event.text))
                self._warnings += event.level == "warning"
            case RunDone():
                self._state = "done"
            case _:
                now = False
        if now:
            self._write()
        else:
            self._soon()

    def compare(self) -> None:
        """The rounds are over: plain PyTorch trains now, for comparison."""
        self._state = "comparing"
        self._write()

    def spend(self) -> None:
        """Another release has begun."""
        self._spending = True
        self._soon()

    def close(self, state: str, error: str = "") -> None:
        """The run has ended; the file stays and says how."""
        self._state, self._error = state, error
        self._write(last=True)
        self._closed = True

    # --- writing ---------------------------------------------------------------------------------------------------

    def _soon(self) -> None:
        self._set_timer(max(self._loop.now_s(), self._due_s))

    def _write(self, *, last: bool = False) -> None:
        begun = self._begun
        if begun is None:
            return
        if not last and self._loop.now_s() < self._due_s:
            self._soon()
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_live(self._path, self._live(begun))
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("event=live-not-written run=%s reason=%r", self._run, error.strerror)
            self._failed = True
        self._due_s = self._loop.now_s() + LEAST_S
        self._set_timer(None if last else self._loop.now_s() + MOST_S)

    def _set_timer(self, when_s: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if when_s is None else self._loop.call_at(when_s, self._write)

    def _live(self, begun: RunStarted) -> Live:
        now_s, over = self._loop.wall_s(), self._state not in ("running", "comparing")
        waiting = None if over else self._conductor.waiting
        wait = None
        if waiting is not None:
            wait = WaitNow(
                purpose=waiting.purpose,
                names=waiting.names,
                have=waiting.have,
                quorum=waiting.quorum,
                since_s=now_s - waiting.waited_s,
                deadline_s=now_s + waiting.left_s,
            )
        up, down = self._conductor.bytes_now
        if self._spending:
            self._spent, self._spending = _spending(self._privacy()), False
        return Live(
            run=self._run,
            job=begun.job,
            mode=begun.mode,
            security=begun.security,
            dataset=self._dataset,
            pid=os.getpid(),
            state=self._state,
            error=self._error,
            started_s=self._started_s,
            updated_s=now_s,
            rounds=begun.rounds,
            round=self._round,
            attempt=self._attempt,
            connected=self._conductor.connected,
            agents=self._agents(wait),
            wait=wait,
            bytes_up=up,
            bytes_down=down,
            warnings=self._warnings,
            notices=tuple(self._notices),
            spent=self._spent,
        )

    def _agents(self, wait: WaitNow | None) -> tuple[AgentNow, ...]:
        awaited = frozenset(wait.names) if wait is not None else frozenset()
        agents = []
        for name, online in self._conductor.parties.items():
            state, note = self._outcomes.get(name, ("idle", ""))
            if not online:
                state = "offline"
            elif name in awaited:
                state, note = "awaited", ""
            agents.append(AgentNow(name=name, state=state, note=note))
        return tuple(agents)


def _spending(privacy: Mapping[str, Any] | None) -> tuple[Spending, ...]:
    """Of the job's unit, and of devices where a job protects both."""
    if privacy is None:
        return ()
    both = [privacy] if privacy.get("device") is None else [privacy, privacy["device"]]
    return tuple(
        Spending(unit=one["unit"], epsilon=one["epsilon"], delta=one["delta"], releases=one["releases"]) for one in both
    )
