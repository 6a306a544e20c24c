"""The worker process: the same answers as inline, and that nothing a task does hurts the daemon."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from helpers_agent import OPEN_POLICY, TRAIN_PLAN, Arrived, Outbox, data_ref, make_core, small_table, train_command
from helpers_private import APPLY_PLAN, GRADIENT_PLAN, TERMS, private_command
from sordino_agent.data.catalogue import FileCatalogue
from sordino_agent.datasets import DatasetSpec
from sordino_agent.pipe import FrameReader, WorkerSetup, header
from sordino_agent.policy import Limits
from sordino_agent.process import ProcessExecutor
from sordino_agent.spdz.tasks import SpdzEvent, SpdzTask
from sordino_agent.tasks import (
    DatasetList,
    DescribeTask,
    Done,
    Failure,
    Outcome,
    PlanTask,
    TrainFacts,
    TrainTask,
    encode_task,
)
from sordino_agent.workshop import Programs, Workshop, plan_limits
from sordino_common import messages as m
from sordino_common.clock import Timer
from sordino_common.errors import CodecError
from sordino_common.plan.arrays import to_numpy
from sordino_common.transport.reactor import Reactor

MEMORY = 64 << 20
FOREVER = 1 << 30  # local steps: hours


@pytest.fixture
def datasets(tmp_path: Path) -> tuple[DatasetSpec, ...]:
    table = small_table()
    np.savez(tmp_path / "toy.npz", **table.columns)
    return (DatasetSpec(name="toy", path=str(tmp_path / "toy.npz"), test_rows=10),)


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    with Reactor() as loop:
        yield loop


Maker = Callable[..., ProcessExecutor]


@pytest.fixture
def make(reactor: Reactor, datasets: tuple[DatasetSpec, ...]) -> Iterator[Maker]:
    made: list[ProcessExecutor] = []

    def build(
        *, limit_s: float = 60.0, idle_s: float = 60.0, memory_bytes: int = MEMORY, executor: str = "numpy"
    ) -> ProcessExecutor:
        setup = WorkerSetup(datasets=datasets, executor=executor, memory_bytes=memory_bytes)
        made.append(ProcessExecutor(reactor, setup=setup, limit_s=limit_s, answer_bytes=1 << 20, idle_s=idle_s))
        return made[-1]

    yield build
    for executor in made:
        executor.close()


def train_task(**changes: object) -> TrainTask:
    return TrainTask(command=train_command(**changes), plan=TRAIN_PLAN, agent="pi-01", min_rows=2)


def wait(reactor: Reactor, outcomes: list[Outcome], count: int = 1) -> None:
    assert reactor.run_until(lambda: len(outcomes) >= count, deadline_s=reactor.now_s() + 60.0)


def failure(outcome: Outcome) -> Failure:
    assert isinstance(outcome, Failure), outcome
    return outcome


def test_the_same_bytes_as_inline(reactor: Reactor, make: Maker, datasets: tuple[DatasetSpec, ...]) -> None:
    executor = make()
    outcomes: list[Outcome] = []
    for task in (DescribeTask(), PlanTask(plan=TRAIN_PLAN), train_task()):
        executor.submit(task, outcomes.append)
    assert outcomes == []
    wait(reactor, outcomes, 3)
    described, _, trained = outcomes
    assert isinstance(described, Done)
    assert isinstance(described.result, DatasetList)
    assert described.result.datasets[0].train_rows == 30
    shop = Workshop(
        catalogue=FileCatalogue(datasets, max_bytes=MEMORY),
        programs=Programs(executor="numpy", limits=plan_limits(MEMORY)),
        memory_bytes=MEMORY,
    )
    assert isinstance(trained, Done)
    assert isinstance(trained.result, TrainFacts)
    assert trained.result == shop.prepare(train_task()).run(None)
    assert 0 < trained.seconds < 60


@pytest.mark.parametrize("kind", ["csv", "npz"])
def test_plain_training_loads_no_module_of_other_work(tmp_path: Path, kind: str) -> None:
    """A worker that trains in the clear holds no cryptography, noise or random generators, no archives unless its rows
    are in one, and nothing of what libraries load for nothing."""
    table = small_table()
    if kind == "csv":
        rows = zip(*table.columns.values(), strict=True)
        (tmp_path / "toy.csv").write_text("\n".join(",".join(map(str, row)) for row in [table.columns, *rows]))
    else:
        np.savez_compressed(tmp_path / "toy.npz", **table.columns)
    code = """
import sys
from sordino_agent import start_worker
start_worker.main()  # until its input ends, which it has
from pathlib import Path
from sordino_agent.data.catalogue import FileCatalogue
from sordino_agent.datasets import DatasetSpec
from sordino_agent.tasks import decode_task
from sordino_agent.workshop import Programs, Workshop, plan_limits
from sordino_common.lazy import is_loaded
bytes_ = 64 << 20
catalogue = FileCatalogue((DatasetSpec(name="toy", path=sys.argv[1], test_fraction=0.2),), max_bytes=bytes_)
workshop = Workshop(
    catalogue=catalogue, programs=Programs(executor="numpy", limits=plan_limits(bytes_)), memory_bytes=bytes_
)
workshop.prepare(decode_task(Path(sys.argv[2]).read_bytes())).run(None)
others = (
    "cryptography", "sordino_agent.aggregate.work", "sordino_agent.private_", "sordino_agent.spdz.bench",
    "sordino_common.aggregate", "sordino_common.privacy.discrete_gaussian", "sordino_common.ring",
    "numpy.random", "random", "secrets", "ssl", "_bz2", "_ctypes", "_lzma", *start_worker._UNUSED,
)
if sys.argv[1].endswith("csv"):
    others += ("zipfile", "zlib", "shutil")
sys.exit(", ".join(name for name in sys.modules if name.startswith(others) and is_loaded(name)) or 0)
"""
    task = tmp_path / "task"
    task.write_bytes(encode_task(TrainTask(command=train_command(), plan=TRAIN_PLAN, agent="pi-01", min_rows=1)))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / f"toy.{kind}"), str(task)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_what_had_begun_is_told_from_what_had_not(reactor: Reactor, make: Maker) -> None:
    """The daemon charges work that began, whatever came of it."""
    executor = make()
    outcomes: list[Outcome] = []
    apart = TrainTask(
        command=private_command(batch_rows=4), plan=GRADIENT_PLAN, agent="a", min_rows=2, apply=APPLY_PLAN
    )
    executor.submit(apart, outcomes.append)  # refused before anything is drawn
    wait(reactor, outcomes)
    cancel = executor.submit(train_task(steps=FOREVER), outcomes.append)
    waiting = executor.submit(train_task(), outcomes.append)
    waiting()
    wait(reactor, outcomes, 2)
    cancel()
    wait(reactor, outcomes, 3)
    executor.submit(train_task(steps=FOREVER), outcomes.append)
    reactor.run_until(lambda: False, deadline_s=reactor.now_s() + 0.1)
    executor.close()
    wait(reactor, outcomes, 4)
    assert [failure(one).began for one in outcomes] == [False, False, True, True]


def test_private_training_in_the_worker_is_priced_and_never_twice_the_same(reactor: Reactor, make: Maker) -> None:
    """The worker's randomness is the system's: the same task gives other samples and other noise."""
    executor = make()
    outcomes: list[Outcome] = []
    task = TrainTask(command=private_command(), plan=GRADIENT_PLAN, agent="pi-01", min_rows=2, apply=APPLY_PLAN)
    for _ in range(2):
        executor.submit(task, outcomes.append)
    wait(reactor, outcomes, 2)
    found = []
    for outcome in outcomes:
        assert isinstance(outcome, Done), outcome
        assert isinstance(outcome.result, TrainFacts)
        found.append(outcome.result)
    assert found[0].update != found[1].update
    assert found[0].mechanism == found[1].mechanism
    assert found[0].mechanism is not None
    assert (found[0].mechanism.count, found[0].mechanism.sigma_squared) == (5, TERMS.sigma_squared)


def test_torch_in_the_worker_gives_the_same_update(reactor: Reactor, make: Maker) -> None:
    pytest.importorskip("torch")
    outcomes: list[Outcome] = []
    for executor in ("numpy", "torch"):
        make(executor=executor).submit(train_task(), outcomes.append)
        wait(reactor, outcomes, len(outcomes) + 1)
    for one, two in zip(*(done.result.update for done in outcomes), strict=True):  # type: ignore[union-attr]
        np.testing.assert_allclose(to_numpy(one), to_numpy(two), rtol=1e-5, atol=1e-6)


def test_a_task_over_its_time_is_killed_and_the_next_one_runs(reactor: Reactor, make: Maker) -> None:
    executor = make(limit_s=0.3)
    outcomes: list[Outcome] = []
    executor.submit(train_task(steps=FOREVER), outcomes.append)
    executor.submit(train_task(), outcomes.append)
    wait(reactor, outcomes)
    assert (failure(outcomes[0]).code, "plan_seconds" in failure(outcomes[0]).reason) == ("limit", True)
    wait(reactor, outcomes, 2)
    assert isinstance(outcomes[1], Done)


def test_a_killed_worker_costs_its_task_only(reactor: Reactor, make: Maker) -> None:
    executor = make()
    outcomes: list[Outcome] = []
    executor.submit(DescribeTask(), outcomes.append)
    wait(reactor, outcomes)
    first = executor.worker_pid
    assert first is not None
    executor.submit(train_task(steps=FOREVER), outcomes.append)
    executor.submit(train_task(), outcomes.append)
    os.kill(first, signal.SIGKILL)  # as the kernel does when memory is short
    wait(reactor, outcomes, 3)
    assert failure(outcomes[1]).code == "worker"
    assert "SIGKILL" in failure(outcomes[1]).reason
    assert isinstance(outcomes[2], Done)
    assert executor.worker_pid != first


def test_cancel_of_a_running_and_of_a_waiting_task(reactor: Reactor, make: Maker) -> None:
    executor = make()
    outcomes: list[Outcome] = []
    executor.submit(DescribeTask(), outcomes.append)
    wait(reactor, outcomes)
    pid = executor.worker_pid
    order: list[str] = []

    def note(name: str) -> Callable[[Outcome], None]:
        def on_done(outcome: Outcome) -> None:
            order.append(name)
            outcomes.append(outcome)

        return on_done

    cancel_running = executor.submit(train_task(steps=FOREVER), note("running"))
    cancel_waiting = executor.submit(train_task(), note("waiting"))
    executor.submit(train_task(round=2), outcomes.append)
    cancel_waiting()
    cancel_waiting()
    assert order == []
    cancel_running()  # the signal may well overtake the command
    cancel_running()
    wait(reactor, outcomes, 4)
    assert order == ["waiting", "running"]
    assert [failure(one).code for one in outcomes[1:3]] == ["cancelled", "cancelled"]
    assert isinstance(outcomes[3], Done)
    assert executor.worker_pid == pid  # it stopped by itself, with its tables


def test_a_worker_that_does_not_stop_is_killed(reactor: Reactor, make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sordino_agent.process.GRACE_S", 0.05)
    executor = make()
    outcomes: list[Outcome] = []
    executor.submit(DescribeTask(), outcomes.append)
    wait(reactor, outcomes)
    pid = executor.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    executor.submit(train_task(), outcomes.append)()
    wait(reactor, outcomes, 2)
    assert failure(outcomes[1]).code == "cancelled"
    assert executor.worker_pid is None


def test_memory_is_refused_before_the_run(reactor: Reactor, make: Maker) -> None:
    executor = make(memory_bytes=1 << 18)
    outcomes: list[Outcome] = []
    executor.submit(train_task(), outcomes.append)
    wait(reactor, outcomes)
    assert failure(outcomes[0]).code in ("plan", "limit")
    executor.submit(DescribeTask(), outcomes.append)
    wait(reactor, outcomes, 2)
    assert isinstance(outcomes[1], Done)


def test_an_idle_worker_ends_and_comes_back(reactor: Reactor, make: Maker) -> None:
    executor = make(idle_s=0.0)
    outcomes: list[Outcome] = []
    executor.submit(DescribeTask(), outcomes.append)
    wait(reactor, outcomes)
    pid = executor.worker_pid
    assert reactor.run_until(lambda: executor.worker_pid is None, deadline_s=reactor.now_s() + 30.0)
    assert pid is not None
    assert not Path(f"/proc/{pid}").exists()  # reaped too
    executor.submit(DescribeTask(), outcomes.append)
    wait(reactor, outcomes, 2)
    assert isinstance(outcomes[1], Done)


def test_an_idle_worker_that_does_not_end_is_killed(
    reactor: Reactor, make: Maker, monkeypatch: pytest.MonkeyPatch, datasets: tuple[DatasetSpec, ...]
) -> None:
    monkeypatch.setattr("sordino_agent.process.GRACE_S", 0.05)
    executor, outcomes = make(), list[Outcome]()
    executor.submit(DescribeTask(), outcomes.append)
    wait(reactor, outcomes)
    stopped = executor.worker_pid
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    executor.replace_setup(WorkerSetup(datasets=datasets, executor="numpy", memory_bytes=MEMORY))
    assert reactor.run_until(lambda: executor.worker_pid is None, deadline_s=reactor.now_s() + 60)


def test_slow_is_not_overdue_and_a_worker_that_survives_its_kill_is(
    reactor: Reactor, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, outcomes = make(limit_s=0.2), list[Outcome]()
    monkeypatch.setattr("sordino_agent.process._Worker.kill", lambda _: None)  # as in an uninterruptible wait
    executor.submit(train_task(steps=1 << 30), outcomes.append)
    assert executor.overdue() is None
    monkeypatch.setattr("sordino_agent.process.LATE_S", 0.0)
    assert reactor.run_until(lambda: executor.overdue() is not None, deadline_s=reactor.now_s() + 60)
    assert re.match(r"`train` was to end 0 s ago, and process \d+ is still there", executor.overdue() or "")
    monkeypatch.undo()
    executor.close()
    assert executor.overdue() is None


def test_one_timer_does_for_many_tasks_and_each_has_its_whole_time(
    reactor: Reactor, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_s, asked = 0.5, list[float]()
    executor, outcomes = make(limit_s=limit_s), list[Outcome]()
    executor.submit(DescribeTask(), outcomes.append)
    wait(reactor, outcomes)  # the worker is ready
    call_at = reactor.call_at

    def count(when_s: float, callback: Callable[[], None]) -> Timer:
        asked.append(when_s)
        return call_at(when_s, callback)

    monkeypatch.setattr(reactor, "call_at", count)
    release, began_s = executor.hold(), reactor.now_s()
    while reactor.now_s() < began_s + 1.5 * limit_s:  # in the middle of what a timer per task would take
        executor.submit(DescribeTask(), outcomes.append)
        wait(reactor, outcomes, len(outcomes) + 1)
    assert len(asked) <= 4 < len(outcomes)
    submitted_s = reactor.now_s()
    executor.submit(train_task(steps=FOREVER), outcomes.append)
    wait(reactor, outcomes, len(outcomes) + 1)
    assert reactor.now_s() >= submitted_s + limit_s
    assert failure(outcomes[-1]).code == "limit"
    release()


def test_a_worker_that_is_held_stays(reactor: Reactor, make: Maker, datasets: tuple[DatasetSpec, ...]) -> None:
    """What a session leaves in it would be lost: neither idleness nor another set-up ends it, until it is let go."""
    executor = make(idle_s=0.0)
    outcomes: list[Outcome] = []
    release = executor.hold()
    executor.submit(DescribeTask(), outcomes.append)
    wait(reactor, outcomes)
    pid = executor.worker_pid
    executor.replace_setup(WorkerSetup(datasets=datasets, executor="numpy", memory_bytes=MEMORY))
    reactor.run_until(lambda: False, deadline_s=reactor.now_s() + 0.2)
    assert executor.worker_pid == pid
    release()
    release()  # once is enough
    assert reactor.run_until(lambda: executor.worker_pid is None, deadline_s=reactor.now_s() + 30.0)


def test_a_session_whose_worker_is_killed_says_so(reactor: Reactor, make: Maker) -> None:
    executor = make()
    outcomes: list[Outcome] = []
    executor.submit(DescribeTask(), outcomes.append)
    wait(reactor, outcomes)
    assert executor.worker_pid is not None
    os.kill(executor.worker_pid, signal.SIGKILL)
    reactor.run_until(lambda: executor.worker_pid is None, deadline_s=reactor.now_s() + 30.0)
    executor.submit(SpdzTask(session=bytes(16), setup=None, events=()), outcomes.append)
    wait(reactor, outcomes, 2)
    lost = failure(outcomes[1])
    assert lost.code == "unknown-session"
    assert "the process that computes has lost the session's shares" in lost.reason


def test_a_large_task_passes_the_pipe_whole(reactor: Reactor, make: Maker) -> None:
    """More than the pipe holds, in several writes."""
    executor = make()
    outcomes: list[Outcome] = []
    event = SpdzEvent(what="correction", data=os.urandom(5 << 20))
    executor.submit(SpdzTask(session=bytes(16), setup=None, events=(event,)), outcomes.append)
    wait(reactor, outcomes)
    assert failure(outcomes[0]).code == "unknown-session"  # it was read to its end


def test_a_task_for_a_worker_that_is_ending_waits_for_the_next(reactor: Reactor, make: Maker) -> None:
    executor = make(idle_s=0.0)
    outcomes: list[Outcome] = []

    def again(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if len(outcomes) == 1:
            reactor.call_at(reactor.now_s() + 0.001, lambda: executor.submit(DescribeTask(), outcomes.append) and None)

    executor.submit(DescribeTask(), again)
    wait(reactor, outcomes, 2)
    assert all(isinstance(one, Done) for one in outcomes)


def test_a_late_signal_does_not_cancel_the_next_task(reactor: Reactor, make: Maker) -> None:
    executor = make()
    outcomes: list[Outcome] = []
    executor.submit(DescribeTask(), outcomes.append)
    wait(reactor, outcomes)
    assert executor.worker_pid is not None
    os.kill(executor.worker_pid, signal.SIGUSR1)
    executor.submit(train_task(), outcomes.append)
    wait(reactor, outcomes, 2)
    assert isinstance(outcomes[1], Done)


def test_close_cancels_and_leaves_no_process(reactor: Reactor, make: Maker) -> None:
    executor = make()
    outcomes: list[Outcome] = []
    executor.submit(DescribeTask(), outcomes.append)
    wait(reactor, outcomes)
    pid = executor.worker_pid
    executor.submit(train_task(steps=FOREVER), outcomes.append)
    executor.submit(train_task(), outcomes.append)
    executor.close()
    executor.close()
    wait(reactor, outcomes, 3)
    assert [failure(one).code for one in outcomes[1:]] == ["cancelled", "cancelled"]
    assert not Path(f"/proc/{pid}").exists()


def test_an_executor_that_cannot_start_says_so(reactor: Reactor, make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    outcomes: list[Outcome] = []
    make().submit(DescribeTask(), outcomes.append)
    wait(reactor, outcomes)
    assert failure(outcomes[0]).code == "worker"


def test_a_worker_whose_daemon_is_gone_ends(tmp_path: Path, datasets: tuple[DatasetSpec, ...]) -> None:
    """A daemon that is killed takes its worker with it, even one in the middle of a long task."""
    script = f"""
import os, signal
from sordino_agent.datasets import DatasetSpec
from sordino_agent.pipe import WorkerSetup
from sordino_agent.process import ProcessExecutor
from sordino_common.transport.reactor import Reactor
from test_agent_process import train_task
from sordino_agent.tasks import DescribeTask
reactor = Reactor()
dataset = DatasetSpec(name='toy', path={datasets[0].path!r}, test_rows=10)
setup = WorkerSetup(datasets=(dataset,), executor='numpy', memory_bytes={MEMORY})
executor = ProcessExecutor(reactor, setup=setup, limit_s=60, answer_bytes=1 << 20)
done = []
executor.submit(DescribeTask(), done.append)
executor.submit(train_task(steps=1 << 30), done.append)
reactor.run_until(lambda: done, deadline_s=reactor.now_s() + 60)
reactor.run_once(0.1)
print(executor.worker_pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    here = str(Path(__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{here!r}, {str(Path(here).parent)!r}]\n{script}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    pid = int(result.stdout)
    with Reactor() as loop:

        def tick() -> None:
            loop.call_at(loop.now_s() + 0.02, tick)

        tick()
        assert loop.run_until(lambda: not _runs(pid), deadline_s=loop.now_s() + 10.0)


def _runs(pid: int) -> bool:
    """Whether the process is there and no zombie (nobody may be left to reap it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_core_over_a_worker(reactor: Reactor, make: Maker) -> None:
    """A Plan that runs too long is stopped and reported, and the daemon goes on."""
    limits = Limits(memory_bytes=MEMORY, plan_seconds=0.5)
    core = make_core(reactor, make(limit_s=limits.plan_seconds), policy=OPEN_POLICY, limits=limits)
    outbox = Outbox()
    core.attach(outbox)
    core.start()

    def ask(message: m.Message) -> m.Message:
        count = len(outbox.sent)
        core.on_message(Arrived(sender="server", message=message, correlation=bytes(16)))  # type: ignore[arg-type]
        assert reactor.run_until(lambda: len(outbox.sent) > count, deadline_s=reactor.now_s() + 60.0)
        return outbox.sent[-1][1]

    assert isinstance(ask(m.PlanPut(plan=TRAIN_PLAN)), m.PlanReady)
    long = ask(train_command(steps=FOREVER))
    assert isinstance(long, m.Refused)
    assert long.code == "limit"
    assert isinstance(ask(m.Health()), m.HealthReport)
    assert isinstance(ask(train_command(round=2)), m.Trained)
    assert isinstance(ask(m.Describe()), m.Described)
    refused = ask(train_command(data=data_ref(dataset="other")))
    assert isinstance(refused, m.Refused)
    assert refused.code == "unknown-data"


# --- frames ------------------------------------------------------------------------------------------------------


def test_frames_in_any_pieces() -> None:
    frames = [b"", b"one", bytes(1000)]
    stream = b"".join(header(frame) + frame for frame in frames)
    for piece in (1, 3, 9, 5000):
        reader = FrameReader(max_bytes=1000)
        found = [frame for at in range(0, len(stream), piece) for frame in reader.feed(stream[at : at + piece])]
        assert found == frames
    with pytest.raises(CodecError, match="1001 bytes"):
        list(FrameReader(max_bytes=1000).feed(header(bytes(1001))))


def test_a_whole_frame_is_taken_as_one_in_pieces_is() -> None:
    reader = FrameReader(max_bytes=1000)
    for frame in (b"", b"one", bytes(1000)):
        whole = header(frame) + frame
        assert list(reader.feed(whole)) == [frame]
        assert list(reader.feed(whole[:-1])) + list(reader.feed(whole[-1:] + whole)) == [frame, frame]
    with pytest.raises(CodecError, match="1001 bytes"):
        list(reader.feed(header(bytes(1001)) + bytes(1001)))
