"""Executors: a task in, an outcome out, one task at a time in the order asked for.

`on_done` is called exactly once per task, on the loop and never from inside `submit` or `cancel`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

from sordino_agent.errors import Cancelled
from sordino_agent.tasks import Done, Facts, Failure, Outcome, Task, TaskCost, failure_of
from sordino_common.clock import Loop, Timer
from sordino_common.errors import LimitExceeded

log = logging.getLogger("sordino.agent")

OnDone = Callable[[Outcome], None]
Cancel = Callable[[], None]

CANCELLED = Failure(code=Cancelled.code, reason="the task was cancelled")
NOT_BEGUN = Failure(code=Cancelled.code, reason="the task was cancelled", began=False)


class Executor(Protocol):
    """Who computes."""

    def submit(self, task: Task, on_done: OnDone) -> Cancel:
        """Run `task` when those before it are done. The function that comes back stops it; the outcome is then a
        `Failure` of code `cancelled`, unless it was too late. `Failure.began` is true if that can't be excluded."""
        ...

    def hold(self) -> Callable[[], None]:
        """Keep what tasks leave behind (a session's shares) until the function that comes back is called: whoever
        computes does not end because it is idle."""
        ...

    def close(self) -> None:
        """Stop everything; what was not done is cancelled. Idempotent."""
        ...


class Preparation(Protocol):
    """What `Workshop.prepare` gives: a priced task, and the function that runs it."""

    @property
    def cost(self) -> TaskCost: ...

    @property
    def run(self) -> Callable[[None], Facts]: ...


class Preparer(Protocol):
    """A workshop, as an executor sees it (this module must not import NumPy)."""

    def prepare(self, task: Task) -> Preparation: ...


class _Job:
    __slots__ = ("cancelled", "on_done", "task")

    def __init__(self, task: Task, on_done: OnDone) -> None:
        self.task = task
        self.on_done = on_done
        self.cancelled = False


class InlineExecutor:
    """Computes in this process and delivers when the modelled device would: for simulator and tests.

    A task is computed at the moment at which the device would begin it, and delivered `seconds_of(cost)` later in the
    loop's time; `Done.seconds` is that modelled time, so no wall time leaks into a result. A task that would take
    longer than `limit_s` is not computed: it fails at the limit, as the real one is killed there."""

    def __init__(
        self, loop: Loop, *, workshop: Preparer, seconds_of: Callable[[TaskCost], float], limit_s: float = float("inf")
    ) -> None:
        self._loop = loop
        self._workshop = workshop
        self._seconds_of = seconds_of
        self._limit_s = limit_s
        self._queue: deque[_Job] = deque()
        self._running: _Job | None = None
        self._timer: Timer | None = None

    def submit(self, task: Task, on_done: OnDone) -> Cancel:
        job = _Job(task, on_done)
        self._queue.append(job)
        if self._running is None:
            self._begin_next()
        return lambda: self._cancel(job)

    def hold(self) -> Callable[[], None]:
        return lambda: None  # this process keeps everything anyway

    def close(self) -> None:
        for job in (*((self._running,) if self._running is not None else ()), *tuple(self._queue)):
            self._cancel(job)

    def _begin_next(self) -> None:
        if not self._queue:
            return
        job = self._running = self._queue.popleft()
        outcome, seconds = self._compute(job.task)
        self._timer = self._loop.call_at(self._loop.now_s() + seconds, lambda: self._finish(job, outcome))

    def _compute(self, task: Task) -> tuple[Outcome, float]:
        cost = TaskCost(kind=task.kind)
        began = False
        try:
            prepared = self._workshop.prepare(task)
            cost, began = prepared.cost, True
            seconds = self._seconds_of(cost)
            if seconds > self._limit_s:
                return failure_of(too_long(task.kind, self._limit_s), task.kind), self._limit_s
            return Done(result=prepared.run(None), seconds=seconds), seconds
        except Exception as error:  # noqa: BLE001  whatever a task does, the device goes on; the log has the trace
            failure = failure_of(error, task.kind, began=began)
            log_failure(task.kind, failure, error)
            return failure, min(self._seconds_of(cost), self._limit_s)

    def _finish(self, job: _Job, outcome: Outcome) -> None:
        self._running = self._timer = None
        job.on_done(outcome)
        if self._running is None:
            self._begin_next()

    def _cancel(self, job: _Job) -> None:
        if job.cancelled:
            return
        if job is self._running:
            assert self._timer is not None
            self._timer.cancel()
            self._timer = self._loop.call_at(self._loop.now_s(), lambda: self._finish(job, CANCELLED))
        elif job in self._queue:
            self._queue.remove(job)
            self._loop.call_at(self._loop.now_s(), lambda: job.on_done(NOT_BEGUN))
        else:
            return
        job.cancelled = True


def too_long(task_kind: str, limit_s: float) -> LimitExceeded:
    """The error of a task that is stopped for its time."""
    return LimitExceeded(f"{task_kind}: stopped after {limit_s:g} s (limits.plan_seconds on the device)")


def log_failure(task_kind: str, failure: Failure, error: Exception | None = None) -> None:
    """One line for the device's log; with the trace if it is our bug."""
    text = failure.detail or failure.reason
    bug = error if failure.code == "local-error" else None
    log.warning("event=task-failed task=%s code=%s reason=%r", task_kind, failure.code, text, exc_info=bug)
