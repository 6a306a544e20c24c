"""`sordino runs`, `show`, `export`: what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from sordino_server.cli.output import (
    HERE,
    DatabaseOption,
    FleetOption,
    JsonOption,
    RunArgument,
    date,
    open_store,
    print_json,
    print_table,
    say,
    table_of,
)
from sordino_server.progress import number, result_line, size
from sordino_server.rounds.effects import Scaling
from sordino_server.store import RunRow, export


def runs(fleet: FleetOption = HERE, as_json: JsonOption = False, database: DatabaseOption = None) -> None:
    """All runs of this fleet, the oldest first."""
    with open_store(fleet, database) as store:
        rows = store.runs()
        last = {row.run: store.records(row.run)[-1:] for row in rows}
    if as_json:
        print_json({"runs": [_run_json(row, len(last[row.run]) and last[row.run][0].round) for row in rows]})
        return
    table = table_of("run", "state", "rounds", "result", "started")
    table.columns[0].no_wrap = True  # it is there to be copied
    for row in rows:
        rounds = str(last[row.run][0].round) if last[row.run] else "0"
        metrics = ", ".join(f"{k} {number(v)}" for k, v in last[row.run][0].metrics.items()) if last[row.run] else ""
        table.add_row(row.run, _state(row), rounds, metrics, date(row.created_s))
    print_table(table)


def show(
    run: RunArgument, fleet: FleetOption = HERE, as_json: JsonOption = False, database: DatabaseOption = None
) -> None:
    """One run: its rounds, who took part, how it ended."""
    with open_store(fleet, database) as store:
        row, records = store.row(run), store.records(run)
    if as_json:
        print_json(
            {**_run_json(row, records[-1].round if records else 0), "records": msgspec.to_builtins(list(records))}
        )
        return
    say(f"{row.run}  {row.status}  started {date(row.created_s)}, last change {date(row.changed_s)}")
    say(f"job {row.job_path}, mode {row.mode}")
    table = table_of("round", "loss", "metrics", "agents", "up", "down", "seconds", "not answered")
    for record in records:
        missing = ", ".join(f"{n} ({s.note})" for n, s in record.shares.items() if s.outcome != "answered")
        table.add_row(
            str(record.round),
            "" if record.loss is None else number(record.loss),
            ", ".join(f"{name} {number(value)}" for name, value in record.metrics.items()),
            f"{len(record.shares) - record.dropouts}/{len(record.shares)}",
            size(record.bytes_up),
            size(record.bytes_down),
            f"{record.seconds:.2f}",
            missing,
        )
    print_table(table)
    if row.error:
        say(f"ended by: {row.error}")
    if row.summary:
        say(result_line(row.summary))
    if row.status in ("interrupted", "failed", "stopped"):
        say(f"go on with: sordino train --resume {row.run} --fleet {fleet}")


def export_model(
    run: RunArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="A .safetensors file: a plain PyTorch state dict.")],
    fleet: FleetOption = HERE,
    database: DatabaseOption = None,
) -> None:
    """Write the run's last parameters as a state dict that `load_state_dict` takes."""
    with open_store(fleet, database) as store:
        tensors = store.tensors(run)
        checkpoint = store.checkpoint(run)
    assert checkpoint is not None  # `tensors` has read it
    export(tensors, output, run=run, scaling=checkpoint.scaling)
    say(f"{output}: {len(tensors)} tensors, {sum(tensor.size for tensor in tensors.values())} parameters")
    if checkpoint.scaling != Scaling():
        say(
            "trained on (x - offset) / scale, gives (y - target_offset) / target_scale: the numbers are in the file's "
            "metadata under `scaling`"
        )


def _run_json(row: RunRow, rounds: int) -> dict[str, Any]:
    return {
        "run": row.run,
        "job": row.job,
        "mode": row.mode,
        "status": row.status,
        "rounds": rounds,
        "created_s": row.created_s,
        "changed_s": row.changed_s,
        "job_path": row.job_path,
        "error": row.error,
        "summary": row.summary,
    }


def _state(row: RunRow) -> str:
    colour = {"done": "green", "failed": "red", "interrupted": "yellow", "stopped": "yellow"}.get(row.status, "cyan")
    return f"[{colour}]{row.status}[/]"
