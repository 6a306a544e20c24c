"""One run from job to summary: model, Plans, rounds, checkpoints, baseline. For `sordino train` and the simulator.

`run_job` needs a conductor that is attached to an open endpoint, the loop that drives both, and a store. It knows
nothing of brokers or sockets, so the simulator runs the very same function on a virtual clock.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec

from sordino_common.clock import Loop
from sordino_common.errors import ConfigError, LocalError, SordinoError
from sordino_server.baseline import Baseline, Owned, Pooled, run_baseline
from sordino_server.checkpoint_files import Tensors
from sordino_server.conductor import Conductor, Interrupted
from sordino_server.dashboard.publisher import Publisher
from sordino_server.job import Job, job_from_json, job_to_json
from sordino_server.model import Traced, make_model, model_digest, trace_job
from sordino_server.rounds.effects import Checkpoint, Effect, Result
from sordino_server.rounds.events import Note, Observer, RoundRecord, RunDone, RunStarted, both, silent
from sordino_server.rounds.fedavg import federated_averaging
from sordino_server.rounds.fedavg_secure import secure_averaging
from sordino_server.rounds.roll import DataMismatch
from sordino_server.rounds.spdz import World
from sordino_server.run_private import PrivateRun, private_run
from sordino_server.run_shares import SharedRun, owned_by, shared_run
from sordino_server.run_statistics import StatisticsRun, statistics_run
from sordino_server.store import RunStore


class RunnableLoop(Loop, Protocol):
    """`VirtualLoop` and `Reactor`."""

    def run_until(self, done: Callable[[], bool], *, deadline_s: float) -> bool: ...
    def breathe(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """`summary` is what `--json` prints; the rest is for the report."""

    run: str
    job: Job
    summary: Mapping[str, Any]
    records: tuple[RoundRecord, ...]
    baseline: Baseline | None
    tensors: Tensors


Rounds = Callable[[Checkpoint | None], Generator[Effect, Result, Checkpoint]]


def _averaging(job: Job, run: str, traced: Traced, resumed: Checkpoint | None) -> Generator[Effect, Result, Checkpoint]:
    return federated_averaging(job.spec, run=run, programs=traced.programs, params=traced.params, resumed=resumed)


def _secure_averaging(
    job: Job, run: str, traced: Traced, world: World, resumed: Checkpoint | None
) -> Generator[Effect, Result, Checkpoint]:
    return secure_averaging(
        job.spec, run=run, programs=traced.programs, params=traced.params, world=world, resumed=resumed
    )


def new_run_id(job: Job, *, wall_s: float, token: str) -> str:
    """`<job>-<UTC date and time>-<token>`: a valid `RunId`; `token` keeps two of one second apart."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(wall_s))
    return f"{job.spec.job[:50]}-{stamp}-{token}"


def resumed_job(store: RunStore, run: str) -> Job:
    """The job as the run recorded it. `ConfigError` if its model file is gone or not the same any more."""
    row = store.row(run)
    job = job_from_json(row.job_json, Path(row.job_path))
    if not job.model_file.is_file():
        raise ConfigError(f"run {run}: its model file {job.model_file} is gone")
    if model_digest(job) != row.model_sha256:
        raise ConfigError(
            f"run {run}: {job.model_file} has changed since the run began; resumed, it would not give the same result. "
            "Restore the file, or start a new run."
        )
    return job


def run_job(
    job: Job,
    *,
    run: str,
    conductor: Conductor,
    loop: RunnableLoop,
    store: RunStore,
    members: Sequence[str],
    observer: Observer = silent,
    resume: bool = False,
    pooled: Pooled | None = None,
    stopwatch: Callable[[], float] = time.perf_counter,
    world: World | None = None,
    owned: Callable[[Sequence[tuple[str, int]]], Owned | None] = lambda rows: None,
    publish: bool = False,
) -> RunResult:
    """Train the job to its end (from the last checkpoint of `run`, if `resume`) and compare with plain PyTorch.

    `members`: the data agents of the roster, for the record. `pooled`: the rows for the baseline; without them there is
    none. `world`: for jobs on shares and secure sums. `owned`: each owner's rows, for the baseline on shares.
    `stopwatch`: real time, whatever the loop's. `publish`: keep the run's live file for who watches from outside.
    Raises the named errors; the run's record says how it ended."""
    if re.match(r"^[a-z0-9][a-z0-9-]{0,79}\Z", run) is None:
        raise ConfigError(f"run id {run!r}: expected lower-case letters, digits and hyphens, at most 80")
    model = make_model(job)
    shares: SharedRun | None = None
    statistics: StatisticsRun | None = None
    private: PrivateRun | None = None
    rounds: Rounds
    if job.spec.on_shares:
        if world is None:
            raise LocalError("run_job: a job on shares needs a world")
        shares = shared = shared_run(job, model, world)
        names, security = shared.names, f"secret shares, {job.spec.shares.security} security"
        rounds = partial(shared.rounds, run)
    elif job.spec.mode == "statistics":
        statistics = statistics_run(job, model, world, begun=store.begun(run) if resume else 0)
        names, security = statistics.names, statistics.security
        rounds = partial(statistics.rounds, run)
    elif job.spec.privacy is not None:
        private = private_run(job, model, world, begun=store.begun(run) if resume else 0)
        names, security = private.names, private.security
        rounds = partial(private.rounds, run)
    elif job.spec.secure is not None:
        if world is None:
            raise LocalError("run_job: secure sums need a world")
        traced = trace_job(job, model)
        names, security = traced.names, f"secure aggregation, sums over {job.spec.secure.minimum} devices or more"
        rounds = partial(_secure_averaging, job, run, traced, world)
    else:
        traced = trace_job(job, model)
        names, security = traced.names, "plain"
        rounds = partial(_averaging, job, run, traced)
    checkpoint: Checkpoint | None = None
    if not resume:
        store.create(
            run,
            job=job.spec.job,
            mode=job.spec.mode,
            job_path=str(job.path.resolve()),
            job_json=job_to_json(job),
            model_sha256=model_digest(job),
            names=names,
        )
    with store.hold(run):
        if resume:
            checkpoint = store.checkpoint(run)
            store.finish(run, "running")
        before_s = store.elapsed_s(run)
        began_s = stopwatch()
        publisher = None
        if publish:
            publisher = Publisher(
                store.folder,
                run,
                dataset=job.spec.data.dataset,
                conductor=conductor,
                loop=loop,
                privacy=lambda: _privacy_now(private, statistics),
            )
            observer = both(observer, publisher)
        observer(
            RunStarted(
                run=run,
                job=job.spec.job,
                mode=job.spec.mode,
                security=security,
                rounds=job.spec.train.rounds,
                first_round=1 if checkpoint is None else checkpoint.record.round + 1,
                members=tuple(sorted(members)),
            )
        )
        warning = shares.loud() if shares is not None else None
        if warning is not None:
            observer(warning)
        conductor.observer = observer

        def begin(releases: int) -> None:
            store.begin(run, releases)
            if publisher is not None:
                publisher.spend()

        def over(status: str, error: str) -> None:
            _end_badly(store, run, status, error, observer)
            if publisher is not None:
                publisher.close(status, error)

        conductor.start(
            rounds(checkpoint),
            run=run,
            save=lambda state: store.save(run, state, elapsed_s=before_s + stopwatch() - began_s),
            begin=begin,
            next_sum=lambda: store.next_sum(run),
        )
        try:
            loop.run_until(lambda: conductor.done, deadline_s=math.inf)
            final: Checkpoint = conductor.result()
        except DataMismatch as mismatch:  # seen on the devices, mended in the job file
            wrong = job.error(mismatch.key, str(mismatch))
            over("failed", _one_line(wrong))
            raise wrong from mismatch
        except BaseException as error:
            stopped = isinstance(error, Interrupted | KeyboardInterrupt)
            over("interrupted" if stopped else "failed", _one_line(error))
            raise
        seconds = before_s + stopwatch() - began_s
        records = store.records(run)
        baseline = None
        if publisher is not None:
            publisher.compare()
        if shares is not None and final.shared is not None:
            theirs = owned(final.shared.rows) if shares.comparable else None
            if theirs is not None and owned_by(theirs, final.shared.rows):
                observer(Note(text="the same training by plain PyTorch, for comparison"))
                baseline = shares.baseline(theirs, final.shared, stopwatch, loop.breathe)
        elif pooled is not None and statistics is not None:
            baseline = statistics.baseline(pooled, stopwatch)
        elif pooled is not None:
            observer(Note(text="the same training by plain PyTorch, for comparison"))
            agents = len({name for record in records for name in record.shares})
            baseline = run_baseline(
                job, pooled, agents=agents, rounds=final.record.round, stopwatch=stopwatch, breathe=loop.breathe
            )
        summary = summarise(job, run, records, final, seconds=seconds, baseline=baseline)
        if job.spec.secure is not None:
            summary |= {"security": "secure-aggregation", "helpers": job.spec.secure.helpers,
                        "minimum_cohort": job.spec.secure.minimum}  # fmt: skip
        if shares is not None:
            summary |= shares.summary(final, baseline)
        if statistics is not None:
            summary |= statistics.summary(final)
        if private is not None:
            summary |= private.summary(rounds=len(records))
        store.finish(run, "done", summary=summary)
        if publisher is not None:
            publisher.close("done")
    observer(RunDone(summary=summary))
    tensors = store.tensors(run) if final.params else {}
    return RunResult(run=run, job=job, summary=summary, records=records, baseline=baseline, tensors=tensors)


def _privacy_now(private: PrivateRun | None, statistics: StatisticsRun | None) -> Mapping[str, Any] | None:
    """What was spent by the releases that have begun."""
    if statistics is not None:
        return statistics.spent()
    return None if private is None else private.spent()


def _end_badly(store: RunStore, run: str, status: str, error: str, observer: Observer) -> None:
    """Record how the run ended. If the records can't be written (which may be what ended it), that is told, and the
    error itself is not lost; the run then counts as stopped."""
    try:
        store.finish(run, status, error=error)
    except SordinoError as unwritten:
        observer(Note(text=f"how the run ended could not be recorded: {unwritten}", level="warning"))


def summarise(
    job: Job,
    run: str,
    records: Sequence[RoundRecord],
    final: Checkpoint,
    *,
    seconds: float,
    baseline: Baseline | None,
) -> dict[str, Any]:
    """The JSON summary. `null`: this mode has no such thing. `steps`: optimizer steps of all agents together whose
    updates were averaged; `dropouts`: how often an agent was asked and gave no usable answer; `seconds`: real time."""
    evaluated = [record for record in records if record.metrics]
    return {
        "job": job.spec.job,
        "run": run,
        "mode": job.spec.mode,
        "security": "plain",
        "agents": len({name for record in records for name, s in record.shares.items() if s.outcome == "answered"}),
        "compute_agents": None,
        "rounds": len(records),
        "steps": final.steps,
        "metrics": dict(evaluated[-1].metrics) if evaluated else {},
        "baseline": None
        if baseline is None
        else {**baseline.metrics, "seconds": baseline.seconds, "epochs": baseline.epochs},
        "seconds": seconds,
        "overhead_vs_torch": None if baseline is None else seconds / baseline.seconds,
        "bytes_up": sum(record.bytes_up for record in records),
        "bytes_down": sum(record.bytes_down for record in records),
        "dropouts": sum(record.dropouts for record in records),
        "privacy": None,
        "test_rows": evaluated[-1].test_rows if evaluated else 0,
        "seed": job.spec.train.seed,
        "train_loss": records[-1].loss if records else None,
        "round_seconds": [record.seconds for record in records],
    }


def json_text(value: Mapping[str, Any]) -> str:
    """One JSON object on one line; infinities and NaN, which JSON lacks, never get here (msgspec writes null)."""
    return msgspec.json.encode(value).decode()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, SordinoError) else f"{type(error).__name__}: {text}"
