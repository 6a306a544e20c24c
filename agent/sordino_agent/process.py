"""`ProcessExecutor`: tasks run in a worker process, which can be killed, so that no Plan can hurt the daemon.

One worker, one task at a time. A task that passes its time is killed with its worker; so is a cancelled one that does
not stop by itself within `GRACE_S`. A worker that dies costs the task that it ran, by name; the next task gets a fresh
one. After `idle_s` without work the worker ends, so that an idle device holds the small daemon only.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import msgspec

from sordino_agent.errors import WorkerDied
from sordino_agent.executor import CANCELLED, NOT_BEGUN, Cancel, OnDone, log_failure, too_long
from sordino_agent.pipe import HEADER, FrameReader, WorkerSetup, encode_setup, widen
from sordino_agent.tasks import Failure, Outcome, Task, decode_outcome, encode_task, failure_of
from sordino_common.channel.credentials import VARIABLE
from sordino_common.clock import Loop, Timer
from sordino_common.errors import CodecError

log = logging.getLogger("sordino.agent")

START_S: Final = 60.0  # importing NumPy from a cold SD card takes seconds
GRACE_S: Final = 2.0  # one node of a Plan is much shorter
LATE_S: Final = 5.0  # from a kill until the pipe's end is seen
REAP_S: Final = 1.0  # between the end of a worker's pipe and the end of its process
_READ_BYTES: Final = 1 << 16  # a buffer of more would be fetched from the system and given back for every frame
_WRITE_PARTS: Final = 16
_FRAME_SLACK: Final = 1 << 20  # of an outcome, beside its arrays


class FileLoop(Loop, Protocol):
    """What `Reactor` is: a loop that watches files too."""

    def register(self, fileobj: int, events: int, callback: Callable[[int], None]) -> None: ...

    def unregister(self, fileobj: int) -> None: ...


class _Job(msgspec.Struct, kw_only=True, eq=False):
    task: Task
    on_done: OnDone
    stopped: Failure | None = None  # why we ended it


class ProcessExecutor:
    """Runs tasks in `python -m sordino_agent.start_worker`. `limit_s` bounds a task, `answer_bytes` its
    answer."""

    def __init__(
        self,
        loop: FileLoop,
        *,
        setup: WorkerSetup,
        limit_s: float,
        answer_bytes: int,
        threads: int = 1,
        idle_s: float = 60.0,
    ) -> None:
        self._loop = loop
        self._setup = setup
        self._limit_s = limit_s
        self._answer_bytes = answer_bytes
        self._threads = threads
        self._idle_s = idle_s
        self._queue: deque[_Job] = deque()
        self._running: _Job | None = None
        self._holds = 0
        self._worker: _Worker | None = None
        self._due_s: float | None = None  # the running task's deadline, or the idle worker's end
        self._when_due: Callable[[], None] = lambda: None
        # Deadlines are far away, and most are lifted at once (a task is a round): the timer is set again only for an
        # earlier one, and looks when it comes.
        self._timer: Timer | None = None
        self._timer_s = 0.0

    @property
    def worker_pid(self) -> int | None:
        """The worker's process, while there is one."""
        return self._worker.pid if self._worker is not None else None

    def overdue(self) -> str | None:
        """A complaint if a task is past its time and its worker has not been got rid of; slow is not overdue."""
        late_s = 0.0 if self._due_s is None else self._loop.now_s() - self._due_s
        if self._running is None or late_s <= LATE_S:
            return None
        return (
            f"`{self._running.task.kind}` was to end {late_s:.0f} s ago, and process {self.worker_pid} is still there"
        )

    def submit(self, task: Task, on_done: OnDone) -> Cancel:
        job = _Job(task=task, on_done=on_done)
        self._queue.append(job)
        if self._running is None:
            self._begin_next()
        return partial(self._cancel, job)

    def hold(self) -> Callable[[], None]:
        """An idle worker does not end while anybody holds it: not for its age, nor for a new set-up."""
        self._holds += 1
        held = True
        if self._running is None:
            self._due_s = None

        def release() -> None:
            nonlocal held
            if held:
                held = False
                self._holds -= 1
                if self._running is None:
                    self._rest()

        return release

    def replace_setup(self, setup: WorkerSetup) -> None:
        """Another set-up for the next worker; an idle worker ends, a busy one after its task, one that is held when it
        is let go."""
        self._setup = setup
        if self._worker is not None:
            self._worker.outdated = True
            if self._running is None:
                self._rest()

    def close(self) -> None:
        running, waiting = self._running, tuple(self._queue)
        self._queue.clear()
        self._running = self._due_s = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._worker is not None:
            self._worker.kill()
            self._worker.bury()
            self._worker = None
        if running is not None:
            self._deliver_soon(running, CANCELLED)
        for job in waiting:
            self._deliver_soon(job, NOT_BEGUN)

    def _begin_next(self) -> None:
        if self._running is not None:
            return
        if not self._queue:
            self._rest()
            return
        job = self._running = self._queue.popleft()
        if self._worker is not None and self._worker.ending:
            self._set_due(GRACE_S, self._worker.kill)
            return  # `_on_end` begins it with a fresh worker
        try:
            if self._worker is None:
                self._worker = _Worker(
                    self._loop,
                    self._setup,
                    threads=self._threads,
                    max_bytes=self._answer_bytes + _FRAME_SLACK,
                    on_frame=self._on_frame,
                    on_end=self._on_end,
                )
            self._hand_over(job, self._worker)
        except OSError as error:
            self._running = None
            died = WorkerDied(f"no worker process can be started: {error.strerror}")
            failure = failure_of(died, job.task.kind, began=False)
            self._deliver_soon(job, failure)
            self._loop.call_at(self._loop.now_s(), self._begin_next)

    def _hand_over(self, job: _Job, worker: _Worker) -> None:
        worker.send(encode_task(job.task))
        if worker.ready:
            self._set_due(self._limit_s, self._stop)
        else:
            self._set_due(START_S, self._stop)

    def _rest(self) -> None:
        worker = self._worker
        if worker is not None and not worker.ending and not self._holds:
            if worker.outdated:
                self._retire(worker)
            else:
                self._set_due(self._idle_s, partial(self._retire, worker))

    def _retire(self, worker: _Worker) -> None:
        """Ask it to end. One that does not (it was stopped, or hangs in a library's end) must not keep its memory."""
        worker.end()
        self._set_due(GRACE_S, worker.kill)

    def _cancel(self, job: _Job) -> None:
        if job in self._queue:
            self._queue.remove(job)
            self._deliver_soon(job, NOT_BEGUN)
        elif job is self._running and job.stopped is None:
            job.stopped = CANCELLED
            assert self._worker is not None
            self._worker.interrupt()
            self._set_due(GRACE_S, self._worker.kill)

    def _stop(self) -> None:
        """The running task's time is over, or its worker's before it was ready."""
        job, worker = self._running, self._worker
        assert job is not None
        assert worker is not None
        kind = job.task.kind
        if worker.ready:
            job.stopped = failure_of(too_long(kind, self._limit_s), kind)
        else:
            late = WorkerDied(f"the worker process was not ready after {START_S:g} s")
            job.stopped = failure_of(late, kind, began=False)
        worker.kill()

    # --- from the worker -------------------------------------------------------------------------------------------

    def _on_frame(self, frame: bytes | memoryview) -> None:
        worker, job = self._worker, self._running
        assert worker is not None
        if not worker.ready:
            worker.ready = True
            if job is not None and job.stopped is None:
                self._set_due(self._limit_s, self._stop)
            return
        if job is None:
            raise CodecError("pipe: an outcome that nobody waits for")
        outcome = decode_outcome(frame)
        if outcome == CANCELLED and job.stopped is None:
            self._hand_over(job, worker)  # the signal was for the task before, which had just ended by itself
        else:
            self._finish(job, outcome)

    def _on_end(self, reason: str) -> None:
        self._worker = self._due_s = None
        job = self._running
        if job is None:
            self._begin_next()
        elif reason == _ENDED and job.stopped is None:
            self._running = None  # it had not begun: the worker was on its way out
            self._queue.appendleft(job)
            self._begin_next()
        else:
            died = failure_of(WorkerDied(f"the worker process {reason}; the next task gets a fresh one"), job.task.kind)
            failure = job.stopped or died
            log_failure(job.task.kind, failure)
            self._finish(job, failure)

    def _finish(self, job: _Job, outcome: Outcome) -> None:
        self._running = self._due_s = None
        job.on_done(outcome)
        if self._running is None and (self._queue or not self._holds):  # else it waits where it is
            self._begin_next()

    def _deliver_soon(self, job: _Job, outcome: Outcome) -> None:
        self._loop.call_at(self._loop.now_s(), lambda: job.on_done(outcome))

    def _set_due(self, after_s: float, callback: Callable[[], None]) -> None:
        """Call `callback` in `after_s`, unless `_due_s` is another by then."""
        self._due_s = due_s = self._loop.now_s() + after_s
        self._when_due = callback
        if self._timer is None or due_s < self._timer_s:
            self._arm(due_s)

    def _arm(self, due_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(due_s, self._look)
        self._timer_s = due_s

    def _look(self) -> None:
        self._timer = None
        if self._due_s is None:
            return
        if self._loop.now_s() < self._due_s:
            self._arm(self._due_s)
        else:
            self._when_due()


_ENDED: Final = "ended as asked"


class _Worker:
    """One worker process and its pipes. `on_end` comes once, when its output has ended and it is reaped."""

    def __init__(
        self,
        loop: FileLoop,
        setup: WorkerSetup,
        *,
        threads: int,
        max_bytes: int,
        on_frame: Callable[[bytes | memoryview], None],
        on_end: Callable[[str], None],
    ) -> None:
        self.ready = False
        self.ending = False
        self.outdated = False
        self._loop = loop
        self._on_frame = on_frame
        self._on_end = on_end
        self._frames = FrameReader(max_bytes=max_bytes)
        self._outbox: deque[bytes | bytearray | memoryview] = deque()
        self._writing = False
        count = str(threads)
        names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sordino_agent.start_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C in the daemon's terminal is the daemon's business
            # It has no business with the keys that a service manager hands to the daemon.
            env={key: value for key, value in os.environ.items() if key != VARIABLE} | dict.fromkeys(names, count),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input = self._process.stdin
        self._in = self._process.stdin.fileno()
        self._out = self._process.stdout.fileno()
        for pipe in (self._in, self._out):
            os.set_blocking(pipe, False)
            widen(pipe)
        loop.register(self._out, selectors.EVENT_READ, self._readable)
        log.info("event=worker-started pid=%d", self._process.pid)
        self.send(encode_setup(setup))

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, payload: bytes | bytearray) -> None:
        # Header and payload at once: two writes would wake the worker twice.
        self._outbox += (HEADER.pack(len(payload)), payload)
        self._write()

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        """Close its input: it ends by itself."""
        if not self.ending:
            self.ending = True
            self._stop_writing()
            self._input.close()

    def bury(self) -> str:
        """Close the pipes, reap the process, and say how it ended."""
        self.end()
        self._loop.unregister(self._out)
        assert self._process.stdout is not None
        self._process.stdout.close()
        try:
            status = self._process.wait(timeout=REAP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        log.info("event=worker-ended pid=%d status=%d", self._process.pid, status)
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def _write(self) -> None:
        try:
            while self._outbox:
                written = os.writev(self._in, list(self._outbox)[:_WRITE_PARTS])
                while self._outbox and written >= len(self._outbox[0]):
                    written -= len(self._outbox.popleft())
                if written:
                    self._outbox[0] = memoryview(self._outbox[0])[written:]
        except BlockingIOError:
            if not self._writing:
                self._writing = True
                self._loop.register(self._in, selectors.EVENT_WRITE, lambda _events: self._write())
            return
        except BrokenPipeError:  # it died; the end of its output tells
            self._outbox.clear()
        if self._writing:
            self._stop_writing()

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.unregister(self._in)

    def _readable(self, _events: int) -> None:
        try:
            data = os.read(self._out, _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            asked = self.ending
            reason = self.bury()
            self._on_end(_ENDED if asked else reason)
            return
        try:
            for frame in self._frames.feed(data):
                self._on_frame(frame)
        except CodecError as error:
            log.warning("event=worker-frame reason=%r", str(error))
            self.kill()
