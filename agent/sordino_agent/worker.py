"""The process that computes, started by the daemon with a pipe on stdin and stdout (`start_worker.py`).

It reads a set-up frame, then a task per frame, and writes an outcome per task. It holds no key and no connection; what
it knows is the device's data and the Plan it runs. It ends when the pipe closes or the daemon is gone.

SIGUSR1 cancels the task that runs, at the next node of its Plan. The daemon kills what does not stop by itself.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import resource
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final

from sordino_agent.data.catalogue import FileCatalogue
from sordino_agent.errors import Cancelled
from sordino_agent.executor import CANCELLED, log_failure
from sordino_agent.pipe import WorkerSetup, decode_setup, header, read_frame
from sordino_agent.spdz.tasks import SpdzTask
from sordino_agent.tasks import Done, Outcome, decode_task, encode_outcome, failure_of
from sordino_agent.workshop import ExecutorName, Programs, Workshop, plan_limits
from sordino_common.daemon.logs import inherited, set_up_logging

# Beyond what tasks may hold: BLAS's packing buffers and the interpreter's own allocations.
_SLACK_BYTES: Final = 96 << 20
_READ_BYTES: Final = 1 << 16  # a round's frame in one call of the system
_NICE: Final = 5  # the daemon's keep-alive goes first


class _Interrupts:
    """The cancel flag, and whether the daemon is still there."""

    def __init__(self) -> None:
        self.cancelled = False
        self._daemon = os.getppid()

    def on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        self.cancelled = True

    def check(self) -> None:
        if self.cancelled:
            raise Cancelled(CANCELLED.reason)
        if os.getppid() != self._daemon:
            os._exit(0)  # nobody is left to answer


def main() -> int:
    """Serve the daemon at stdin/stdout until it closes the pipe."""
    set_up_logging("sordino-agent", form=inherited(), level=logging.WARNING)
    interrupts = _Interrupts()
    signal.signal(signal.SIGUSR1, interrupts.on_signal)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Nothing that a library prints may get into the frames.
    output = io.FileIO(os.dup(1), "w")
    os.dup2(2, 1)
    source = open(0, "rb", buffering=_READ_BYTES, closefd=False)  # noqa: SIM115  it is read for as long as we live
    first = read_frame(source.read)
    if first is None:
        return 0
    setup = decode_setup(first)
    workshop = _workshop(setup)
    _confine(setup.memory_bytes)
    _write(output, b"")  # ready
    _serve(workshop, partial(read_frame, source.read), partial(_write, output), interrupts)
    return 0


def _serve(
    workshop: Workshop,
    read: Callable[[], bytes | None],
    write: Callable[[bytes | bytearray], None],
    interrupts: _Interrupts,
) -> None:
    """An outcome for every task, and then what it put off, until nothing more comes."""
    caught_up_s = 0.0
    while (frame := read()) is not None:
        outcome = _perform(workshop, frame, interrupts, caught_up_s)
        # Not before the task: the signal may be faster than its frame. One that comes later still may hit the next
        # task; the daemon, which knows that it did not cancel that one, hands it over again.
        interrupts.cancelled = False
        write(encode_outcome(outcome))
        caught_up_s = _catch_up(workshop)


def _catch_up(workshop: Workshop) -> float:
    """What was put off until the outcome is on its way; what it took of the processor."""
    started_s = time.process_time()
    with contextlib.suppress(Exception):  # it is tried again, and told, by the task that needs it
        workshop.catch_up()
    return time.process_time() - started_s


def _perform(workshop: Workshop, frame: bytes, interrupts: _Interrupts, caught_up_s: float) -> Outcome:
    """`caught_up_s`: spent since the task before, for sessions on shares. A task of these tells what it took of the
    processor: a round is so short that whoever else runs would be most of it."""
    kind, began = "task", False
    try:
        task = decode_task(frame)
        kind = task.kind
        clock = time.process_time if kind == SpdzTask.kind else time.perf_counter
        started_s = clock()
        prepared = workshop.prepare(task)
        began = True
        facts = prepared.run(interrupts.check)
        seconds = clock() - started_s
        return Done(result=facts, seconds=seconds + caught_up_s if kind == SpdzTask.kind else seconds)
    except Exception as error:  # noqa: BLE001  whatever a task does, the worker goes on; the log has the trace
        failure = failure_of(error, kind, began=began)
        log_failure(kind, failure, error)
        return failure


def _workshop(setup: WorkerSetup) -> Workshop:
    executor: ExecutorName = "torch" if setup.executor == "torch" else "numpy"
    if executor == "torch":  # now, for what it takes must not count against the tasks' limit
        with contextlib.suppress(ImportError):  # then every task says so
            importlib.import_module("sordino_common.plan.torch_executor")
    return Workshop(
        # Half for tables: the other half is left for what a task makes of them.
        catalogue=FileCatalogue(setup.datasets, max_bytes=setup.memory_bytes // 2),
        programs=Programs(executor=executor, limits=plan_limits(setup.memory_bytes)),
        memory_bytes=setup.memory_bytes,
        models=setup.models,
    )


def _confine(memory_bytes: int) -> None:
    """A backstop behind the checks before a run: a data segment that can't outgrow the limit, no core dump (it would
    hold rows), and first in line when the system is out of memory."""
    limit = _data_bytes() + memory_bytes + memory_bytes // 4 + _SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # not allowed in some containers
        Path("/proc/self/oom_score_adj").write_text("500", "ascii")
    os.nice(_NICE)


def _data_bytes() -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


def _write(output: io.FileIO, payload: bytes | bytearray) -> None:
    try:
        parts = [memoryview(header(payload)), memoryview(payload)]
        while parts:  # both at once: two writes would wake the daemon twice
            written = os.writev(output.fileno(), parts)
            while parts and written >= len(parts[0]):
                written -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][written:]
    except BrokenPipeError:
        raise SystemExit(0) from None  # the daemon is gone; nobody is left to answer
