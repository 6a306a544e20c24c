"""`sordino privacy plan`: what a job's privacy is worth, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sordino_server.cli.output import JobArgument, JsonOption, SetOption, note, print_json, printing
from sordino_server.job import load_job

privacy_app = typer.Typer(help="What a job's privacy is worth, before anything runs.", no_args_is_help=True)


@privacy_app.command("plan")
def privacy_plan(
    job: JobArgument,
    overrides: SetOption = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write privacy.html and privacy.json there.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Epsilon of the job, or the noise that its target takes; what other noise would cost; against whom it holds."""
    from sordino_server.accounting.privacy_plan import plan_privacy
    from sordino_server.accounting.privacy_show import plan_json, render, write_plan

    plan = plan_privacy(load_job(job, overrides=overrides or ()))
    if report is not None:
        write_plan(plan, report)
        note(f"report: {report / 'privacy.html'}")
    if as_json:
        print_json(plan_json(plan))
        return
    with printing(120) as console:
        render(plan, console)
