"""The table of `sordino`'s commands. A new group is a module beside this one and a line here."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from sordino_server.cli.broker import broker_config
from sordino_server.cli.completion import completion_command
from sordino_server.cli.dealer import dealer_app
from sordino_server.cli.doctor import doctor
from sordino_server.cli.enrol import enroll_token
from sordino_server.cli.fleet import agents, init
from sordino_server.cli.manual import tree_of
from sordino_server.cli.plans import plan_app, plans
from sordino_server.cli.privacy import privacy_app
from sordino_server.cli.roster import roster_app
from sordino_server.cli.running import run_cli
from sordino_server.cli.runs import export_model, runs, show
from sordino_server.cli.support import support_bundle
from sordino_server.cli.top import top
from sordino_server.cli.train import train
from sordino_server.cli.version import add_version
from sordino_server.cli.web import web
from sordino_server.cli.words import EXAMPLES, SUMMARY, explain

app = typer.Typer(
    help="Con sordino: a fleet learns together, and no device says what it knows.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(init)
app.command("broker-config")(broker_config)
app.command("enroll-token")(enroll_token)
app.command()(agents)
app.command()(plans)
app.command()(train)
app.command()(runs)
app.command()(show)
app.command("export")(export_model)
app.command()(doctor)
app.command()(top)
app.command()(web)
app.command("support-bundle")(support_bundle)
app.add_typer(roster_app, name="roster")
app.add_typer(dealer_app, name="dealer")
app.add_typer(plan_app, name="plan")
app.add_typer(privacy_app, name="privacy")
app.command("completion")(completion_command(lambda: tree_of(app, "sordino", summary=SUMMARY)))
explain(app, EXAMPLES)
add_version(app, "sordino")


def main() -> NoReturn:
    """The console script. Ends the process with the error's exit code."""
    raise SystemExit(run_cli(app, sys.argv[1:], program="sordino"))
