"""`sordino plans`, `sordino plan show`: a job's Plans, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sordino_server.cli.output import JobArgument, JsonOption, SetOption, print_json, printing, say
from sordino_server.job import load_job
from sordino_server.progress import size

plan_app = typer.Typer(help="What a job will cost, before anything runs.", no_args_is_help=True)


def plans(
    job: JobArgument,
    overrides: SetOption = None,
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
        print_json({"job": loaded.spec.job, "parameters": parameters, "plans": rows})
        return
    for what, row in rows.items():
        say(f"{row['sha256']}  {what}  {size(row['bytes'])}")
    say(f"{parameters} parameters in {names} tensors")


@plan_app.command("show")
def plan_show(
    job: JobArgument,
    overrides: SetOption = None,
    gates: Annotated[bool, typer.Option("--gates", help="Every gate, with its bound and its line.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Gates, rounds, bytes, bounds and memory of the job's Plans. Refuses, by line, what can't run as the job says."""
    from sordino_server.plan_show import describe, render

    report = describe(load_job(job, overrides=overrides or ()), gates=gates)
    if as_json:
        print_json(report)
        return
    with printing(160) as console:
        render(report, console, base=Path.cwd())
