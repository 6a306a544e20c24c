"""`sordino`: make a fleet, enrol its agents, train, look at what was trained.

stdout is for results (`--json`: one JSON object and nothing else), stderr for progress and errors: one line, and the
exit code of the error's class (`sordino_common.errors`); 130 for a run that was interrupted.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import time
import traceback
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from sordino_common.errors import ConfigError, SordinoError
from sordino_server.home import Home, create_home, read_request
from sordino_server.job import load_job
from sordino_server.progress import ProgressView, number, result_line, size
from sordino_server.rounds.effects import Scaling
from sordino_server.store import RunRow, RunStore, export

app = typer.Typer(
    help="Con sordino: a fleet learns together, and no device says what it knows.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
roster_app = typer.Typer(help="Who belongs to the fleet: the draft, and signing it.", no_args_is_help=True)
app.add_typer(roster_app, name="roster")
dealer_app = typer.Typer(
    help="The dealer of sessions on shares as a process on a host of its own: the server then sees no masks.",
    no_args_is_help=True,
)
app.add_typer(dealer_app, name="dealer")
plan_app = typer.Typer(help="What a job will cost, before anything runs.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")

# Newer versions of typer bring their own copy of click, older ones use click itself: this is the right class in both.
_UsageError: type[Exception] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")

FleetOption = Annotated[Path, typer.Option("--fleet", help="The fleet directory.", envvar="SORDINO_FLEET")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
HERE = Path()


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A new fleet directory.")],
    fleet: Annotated[str, typer.Option("--fleet", help="The fleet's name: lower-case letters, digits and -.")],
    broker: Annotated[str, typer.Option("--broker", help="HOST:PORT of the MQTT broker.")],
    server: Annotated[str, typer.Option("--server", help="The server's name in the fleet.")] = "server",
) -> None:
    """Make a fleet: operator key, server key, a roster draft with the server, fleet.yaml."""
    home = create_home(folder, fleet=fleet, server=server, broker=broker)
    operator = home.operator_public().hex()
    _say(
        f"fleet {fleet} in {folder}\n"
        f"operator key  {operator}\n"
        f"server        {server}  {home.server_key().fingerprint}\n\n"
        "On each device:\n"
        f"  sordino-agent init DIR --name NAME --fleet {fleet} --operator-key {operator} --broker {broker}\n"
        "Then here, for each enrolment.json it makes, comparing the fingerprints:\n"
        f"  sordino roster add enrolment.json --fleet {folder}\n"
        f"  sordino roster sign --fleet {folder}\n\n"
        f"{folder / 'operator.key'} decides who belongs to the fleet: once the roster is signed, keep it elsewhere."
    )


# --- roster --------------------------------------------------------------------------------------------------------


@roster_app.command("add")
def roster_add(
    requests: Annotated[list[Path], typer.Argument(help="enrolment.json files of `sordino-agent init`.")],
    roles: Annotated[str, typer.Option("--roles", help="Comma-separated; by default what the request says.")] = "",
    zone: Annotated[str | None, typer.Option("--zone", help="Where the device stands.")] = None,
    fleet: FleetOption = HERE,
) -> None:
    """Put devices into the draft. It counts once it is signed."""
    home = Home(fleet)
    for path in requests:
        wanted = [role.strip() for role in roles.split(",") if role.strip()]
        entry = home.add(read_request(path), roles=wanted, zone=zone)
        _say(f"{entry.name}  {entry.fingerprint}  {','.join(entry.roles)}  {entry.zone}")
    _note(f"the draft has changed; make it count with: sordino roster sign --fleet {fleet}")


@roster_app.command("remove")
def roster_remove(name: str, fleet: FleetOption = HERE) -> None:
    """Take a device out of the draft. It counts once it is signed."""
    Home(fleet).remove(name)
    _note(f"{name} is out of the draft; make it count with: sordino roster sign --fleet {fleet}")


@roster_app.command("list")
def roster_list(fleet: FleetOption = HERE, as_json: JsonOption = False) -> None:
    """The draft beside the signed roster."""
    home = Home(fleet)
    draft, signed = home.draft(), home.roster_book(wall_s=time.time).current
    in_force = {} if signed is None else {entry.name: entry for entry in signed.entries}
    rows: list[dict[str, Any]] = []
    for entry in draft.entries:
        other = in_force.pop(entry.name, None)
        same = other is not None and (
            (other.sign_key.hex(), other.box_key.hex(), tuple(other.roles), other.zone)
            == (entry.sign_key, entry.box_key, tuple(sorted(entry.roles)), entry.zone)
        )
        state = "signed" if same else "not signed yet" if other is None else "changed, not signed yet"
        rows.append(
            {
                "name": entry.name,
                "roles": sorted(entry.roles),
                "zone": entry.zone,
                "fingerprint": entry.fingerprint,
                "state": state,
            }
        )
    rows += [
        {"name": name, "roles": list(e.roles), "zone": e.zone, "fingerprint": "", "state": "removed, not signed yet"}
        for name, e in in_force.items()
    ]
    epoch = 0 if signed is None else signed.epoch
    if as_json:
        _print_json({"fleet": home.spec.fleet, "epoch": epoch, "entries": rows})
        return
    table = _table("name", "roles", "zone", "fingerprint", "state")
    for row in rows:
        table.add_row(row["name"], ",".join(row["roles"]), row["zone"], row["fingerprint"], row["state"])
    _print(table)
    until = "" if signed is None else f", valid until {_date(signed.expires_s)}"
    _say(f"fleet {home.spec.fleet}, signed epoch {epoch}{until}")


@roster_app.command("sign")
def roster_sign(fleet: FleetOption = HERE) -> None:
    """Sign the draft with operator.key under the next epoch."""
    roster = Home(fleet).sign(now_s=time.time())
    _say(f"epoch {roster.epoch} signed: {len(roster.entries)} parties, valid until {_date(roster.expires_s)}")


# --- the fleet -----------------------------------------------------------------------------------------------------


@app.command()
def agents(
    fleet: FleetOption = HERE,
    as_json: JsonOption = False,
    wait_s: Annotated[float, typer.Option("--wait", help="Seconds to wait for agents.")] = 3.0,
) -> None:
    """Who is online, and which data they offer."""
    from sordino_server.fleet import open_fleet, roll_call

    home = Home(fleet)
    with open_fleet(home, version=_version()) as connection:
        found, missing = roll_call(connection, wait_s=wait_s)
        entries = {entry.name: entry for entry in connection.roster.entries}
    rows: list[dict[str, Any]] = []
    for name in sorted(found.keys() | missing.keys()):
        described = found.get(name)
        rows.append(
            {
                "name": name,
                "online": described is not None,
                "zone": entries[name].zone if name in entries else "",
                "version": described.version if described else None,
                "executor": described.executor if described else None,
                "note": missing.get(name, ""),
                "datasets": [
                    {
                        "name": info.name,
                        "train_rows": info.train_rows,
                        "test_rows": info.test_rows,
                        "columns": [column.name for column in info.columns],
                        "tags": list(info.tags),
                    }
                    for info in (described.datasets if described else ())
                ],
            }
        )
    if as_json:
        _print_json({"fleet": home.spec.fleet, "agents": rows})
        return
    table = _table("agent", "state", "zone", "version", "datasets (train + test rows)")
    for row in rows:
        data = ", ".join(f"{d['name']} ({d['train_rows']} + {d['test_rows']})" for d in row["datasets"])
        state = "[green]online[/]" if row["online"] else f"[yellow]{row['note'] or 'offline'}[/]"
        table.add_row(row["name"], state, row["zone"], row["version"] or "", data)
    _print(table)
    _say(f"{sum(row['online'] for row in rows)} of {len(rows)} agents online")


@app.command()
def plans(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value, any number of times.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Trace the job's Plans and print their SHA-256: what a device's owner allows under `policy.plans`."""
    from sordino_server.model import make_model
    from sordino_server.plan_show import plans_of

    loaded = load_job(job, overrides=overrides or ())
    parameters, names, programs = plans_of(loaded, make_model(loaded))
    rows: dict[str, dict[str, Any]] = {
        what: {"sha256": sha256, "bytes": count} for what, (sha256, count) in programs.items()
    }
    if as_json:
        _print_json({"job": loaded.spec.job, "parameters": parameters, "plans": rows})
        return
    for what, row in rows.items():
        _say(f"{row['sha256']}  {what}  {size(row['bytes'])}")
    _say(f"{parameters} parameters in {names} tensors")


@plan_app.command("show")
def plan_show(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value, any number of times.")] = None,
    gates: Annotated[bool, typer.Option("--gates", help="Every gate, with its bound and its line.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Gates, rounds, bytes, bounds and memory of the job's Plans. Refuses, by line, what can't run as the job says."""
    from sordino_server.plan_show import describe, render

    report = describe(load_job(job, overrides=overrides or ()), gates=gates)
    if as_json:
        _print_json(report)
        return
    render(report, Console(highlight=False, width=None if sys.stdout.isatty() else 160), base=Path.cwd())


# --- dealer --------------------------------------------------------------------------------------------------------


@dealer_app.command("init")
def dealer_init(
    folder: Annotated[Path, typer.Argument(help="A new folder, on the dealer's host.")],
    name: Annotated[str, typer.Option("--name", help="The dealer's name in the fleet.")],
    fleet: Annotated[str, typer.Option("--fleet", help="The fleet's name.")],
    operator_key: Annotated[str, typer.Option("--operator-key", help="64 hex digits, as `sordino init` printed them.")],
    broker: Annotated[str, typer.Option("--broker", help="HOST:PORT of the MQTT broker.")],
    server: Annotated[str, typer.Option("--server", help="The server's name in the fleet.")] = "server",
) -> None:
    """Make a dealer: its keys, dealer.yaml, and the request to be enrolled."""
    from sordino_server.dealer.process import REQUEST_FILE, enrol_dealer

    key = enrol_dealer(folder, name=name, fleet=fleet, operator_key=operator_key, broker=broker, server=server)
    _say(
        f"dealer {name}  {key.fingerprint}\n\n"
        "At the server's, comparing the fingerprint:\n"
        f"  sordino roster add {folder / REQUEST_FILE} --roles dealer\n  sordino roster sign\n"
        f"Then here:\n  sordino dealer run {folder}\n"
        f"and in the job:\n  spdz: {{dealer: {name}}}"
    )


@dealer_app.command("run")
def dealer_run(folder: Annotated[Path, typer.Argument(help="The folder that `sordino dealer init` made.")]) -> None:
    """Deal preprocessing until stopped."""
    from sordino_server.dealer.process import run_dealer

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="level=%(levelname)s %(message)s")
    run_dealer(folder, version=_version())


# --- training ------------------------------------------------------------------------------------------------------


@app.command()
def train(
    job: Annotated[Path | None, typer.Argument(help="The job file; not needed with --resume.")] = None,
    fleet: FleetOption = HERE,
    as_json: JsonOption = False,
    resume: Annotated[str | None, typer.Option("--resume", help="Go on with this run from its checkpoint.")] = None,
    name: Annotated[
        str | None,
        typer.Option("--run", help="This run: begin it, go on with it, or show it if it is done."),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value, any number of times.")] = None,
    agents: Annotated[int | None, typer.Option("--agents", min=1, help="As --set train.agents=N.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="As --set train.seed=S.")] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write report.html and summary.json there.")] = None,
    baseline: Annotated[bool, typer.Option(help="Compare with plain PyTorch on the job's public data.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
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
    # The job is checked before torch is imported and the broker is called.
    loaded = None if job is None else load_job(job, overrides=changes)
    home = Home(fleet)
    from sordino_server.baseline import public_pool
    from sordino_server.fleet import interruptible, open_fleet
    from sordino_server.report import write_report
    from sordino_server.run import json_text, new_run_id, resumed_job, run_job
    from sordino_server.run_shares import owned_in_order

    with RunStore(home.folder, wall_s=time.time) as store:
        if name is not None and any(row.run == name for row in store.runs()):
            row = store.row(name)
            if row.status == "done":
                _say(json_text(row.summary or {}) if as_json else f"{name} is done: {result_line(row.summary or {})}")
                return
            _note(f"run {name} has begun before ({row.status}); going on with the job as it was recorded")
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
            ProgressView(quiet=quiet) as progress,
            open_fleet(home, version=_version()) as connection,
            interruptible(connection),
        ):
            result = run_job(
                loaded,
                run=run,
                conductor=connection.conductor,
                loop=connection.reactor,
                store=store,
                members=connection.members,
                observer=progress,
                resume=resume is not None,
                pooled=pooled,
                world=connection.world() if loaded.spec.on_shares else None,
                owned=lambda rows: None if pooled is None else owned_in_order(pooled, rows),
            )
        if report is not None:
            write_report(result, report)
            _note(f"report: {report / 'report.html'}")
    if as_json:
        _say(json_text(result.summary))
    else:
        _say(f"{run}: {result_line(result.summary)}")
        _say(f"the model: sordino export {run} --fleet {fleet} -o model.safetensors")


@app.command()
def runs(fleet: FleetOption = HERE, as_json: JsonOption = False) -> None:
    """All runs of this fleet, the oldest first."""
    with _store(fleet) as store:
        rows = store.runs()
        last = {row.run: store.records(row.run)[-1:] for row in rows}
    if as_json:
        _print_json({"runs": [_run_json(row, len(last[row.run]) and last[row.run][0].round) for row in rows]})
        return
    table = _table("run", "state", "rounds", "result", "started")
    table.columns[0].no_wrap = True  # it is there to be copied
    for row in rows:
        rounds = str(last[row.run][0].round) if last[row.run] else "0"
        metrics = ", ".join(f"{k} {number(v)}" for k, v in last[row.run][0].metrics.items()) if last[row.run] else ""
        table.add_row(row.run, _state(row), rounds, metrics, _date(row.created_s))
    _print(table)


@app.command()
def show(run: str, fleet: FleetOption = HERE, as_json: JsonOption = False) -> None:
    """One run: its rounds, who took part, how it ended."""
    with _store(fleet) as store:
        row, records = store.row(run), store.records(run)
    if as_json:
        _print_json(
            {**_run_json(row, records[-1].round if records else 0), "records": msgspec.to_builtins(list(records))}
        )
        return
    _say(f"{row.run}  {row.status}  started {_date(row.created_s)}, last change {_date(row.changed_s)}")
    _say(f"job {row.job_path}, mode {row.mode}")
    table = _table("round", "loss", "metrics", "agents", "up", "down", "seconds", "not answered")
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
    _print(table)
    if row.error:
        _say(f"ended by: {row.error}")
    if row.summary:
        _say(result_line(row.summary))
    if row.status in ("interrupted", "failed", "stopped"):
        _say(f"go on with: sordino train --resume {row.run} --fleet {fleet}")


@app.command("export")
def export_model(
    run: str,
    output: Annotated[Path, typer.Option("-o", "--output", help="A .safetensors file: a plain PyTorch state dict.")],
    fleet: FleetOption = HERE,
) -> None:
    """Write the run's last parameters as a state dict that `load_state_dict` takes."""
    with _store(fleet) as store:
        tensors = store.tensors(run)
        checkpoint = store.checkpoint(run)
    assert checkpoint is not None  # `tensors` has read it
    export(tensors, output, run=run, scaling=checkpoint.scaling)
    _say(f"{output}: {len(tensors)} tensors, {sum(tensor.size for tensor in tensors.values())} parameters")
    if checkpoint.scaling != Scaling():
        _say(
            "trained on (x - offset) / scale, gives (y - target_offset) / target_scale: the numbers are in the file's "
            "metadata under `scaling`"
        )


# --- small things --------------------------------------------------------------------------------------------------


def _store(folder: Path) -> RunStore:
    return RunStore(Home(folder).folder, wall_s=time.time)


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


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:  # for a script, a row is a line
        console.width = max(console.width, 240)
    console.print(table)


def _print_json(value: object) -> None:
    _say(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _version() -> str:
    return metadata.version("sordino")


def main() -> NoReturn:
    """The console script. Ends the process with the error's exit code."""
    raise SystemExit(run_cli(app, sys.argv[1:], program="sordino"))


def _show_usage_error(error: Any) -> None:
    error.show()


def run_cli(application: typer.Typer, arguments: list[str], *, program: str) -> int:
    """Run a typer application; errors become one line on stderr and an exit code. Shared with `sordino-sim`."""
    try:
        code = application(args=arguments, prog_name=program, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except SordinoError as error:
        _note(f"{program}: {' '.join(str(error).split())}")
        return error.exit_code
    except typer.Exit as end:
        return end.exit_code
    except _UsageError as error:
        _show_usage_error(error)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        _note(f"{program}: interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001  # the last resort: our own bug, said as such
        if os.environ.get("SORDINO_TRACEBACK"):
            traceback.print_exc()
        hint = "" if os.environ.get("SORDINO_TRACEBACK") else "; SORDINO_TRACEBACK=1 shows where"
        _note(f"{program}: a bug in sordino: {type(error).__name__}: {error}{hint}")
        return 1


if __name__ == "__main__":
    main()
