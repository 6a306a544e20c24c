"""`sordino train`: a job on the fleet."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from sordino_common.daemon.collector import old_set_aside
from sordino_common.daemon.logs import resolve, set_up_logging
from sordino_common.daemon.notify import Notifier
from sordino_common.errors import ConfigError
from sordino_server.cli.output import (
    HERE,
    DatabaseOption,
    FleetOption,
    JsonOption,
    LogFormat,
    LogFormatOption,
    SetOption,
    installed_version,
    note,
    open_store,
    say,
)
from sordino_server.event_log import EventLog
from sordino_server.home import Home
from sordino_server.job import load_job
from sordino_server.progress import ProgressView, result_line
from sordino_server.rounds.events import both


def train(
    job: Annotated[Path | None, typer.Argument(help="The job file; not needed with --resume.")] = None,
    fleet: FleetOption = HERE,
    as_json: JsonOption = False,
    resume: Annotated[str | None, typer.Option("--resume", help="Go on with this run from its checkpoint.")] = None,
    name: Annotated[
        str | None,
        typer.Option("--run", help="This run: begin it, go on with it, or show it if it is done."),
    ] = None,
    overrides: SetOption = None,
    agents: Annotated[int | None, typer.Option("--agents", min=1, help="As --set train.agents=N.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="As --set train.seed=S.")] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write report.html and summary.json there.")] = None,
    baseline: Annotated[bool, typer.Option(help="Compare with plain PyTorch on the job's public data.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
    log_format: LogFormatOption = LogFormat.auto,
    database: DatabaseOption = None,
) -> None:
    """Train a job on the fleet."""
    changes = list(overrides or ())
    changes += [] if agents is None else [f"train.agents={agents}"]
    changes += [] if seed is None else [f"train.seed={seed}"]
    if resume is None and job is None:
        raise ConfigError("name a job file, or a run with --resume")
    if resume is not None and changes:
        raise ConfigError("--resume goes on with the job as it was recorded: --set, --agents and --seed "
                          "would make it another one")  # fmt: skip
    if resume is not None and name is not None:
        raise ConfigError("--resume and --run both name a run: give one")
    notifier = Notifier.from_environment(os.environ)
    # The job is checked before torch is imported and the broker is called.
    loaded = None if job is None else load_job(job, overrides=changes)
    home = Home(fleet)
    from sordino_server.baseline import public_pool
    from sordino_server.fleet import interruptible, open_fleet
    from sordino_server.report import write_report
    from sordino_server.run import json_text, new_run_id, resumed_job, run_job
    from sordino_server.run_shares import owned_in_order
    from sordino_server.serving import served

    with open_store(fleet, database) as store:
        if name is not None and any(row.run == name for row in store.runs()):
            row = store.row(name)
            if row.status == "done":
                notifier.ready()  # as a service it has nothing left to do, and did not fail
                say(json_text(row.summary or {}) if as_json else f"{name} is done: {result_line(row.summary or {})}")
                return
            note(f"run {name} has begun before ({row.status}); going on with the job as it was recorded")
            resume = name
        if resume is not None:
            spec = resumed_job(store, resume)
            if loaded is not None and loaded.spec.job != spec.spec.job:
                raise ConfigError(f"run {resume} is of job {spec.spec.job}, not of {loaded.spec.job}")
            loaded = spec
        assert loaded is not None
        run = resume or name or new_run_id(loaded, wall_s=time.time(), token=secrets.token_hex(2))
        pooled = public_pool(loaded) if baseline else None
        with (
            _observer(log_format, quiet=quiet) as observer,
            open_fleet(home, version=installed_version()) as connection,
            interruptible(connection),
            served(notifier, connection.reactor, home.folder) as service,
            old_set_aside(),
        ):
            result = run_job(
                loaded,
                run=run,
                conductor=connection.conductor,
                loop=connection.reactor,
                store=store,
                members=connection.members,
                observer=both(observer, service),
                resume=resume is not None,
                pooled=pooled,
                world=connection.world() if loaded.spec.needs_world else None,
                owned=lambda rows: None if pooled is None else owned_in_order(pooled, rows),
                publish=True,
            )
        if report is not None:
            write_report(result, report)
            note(f"report: {report / 'report.html'}")
    if as_json:
        say(json_text(result.summary))
    else:
        say(f"{run}: {result_line(result.summary)}")
        if result.tensors:  # else it is with the agents, or stays shared
            say(f"the model: sordino export {run} --fleet {fleet} -o model.safetensors")


def _observer(log_format: LogFormat, *, quiet: bool) -> ProgressView | EventLog:
    """Lines for people; records with fields for the journal and for machines."""
    form = resolve(log_format.value, sys.stderr)
    if form == "text":
        return ProgressView(quiet=quiet)
    set_up_logging("sordino", form=form, level=logging.WARNING if quiet else logging.INFO)
    return EventLog()
