"""`sordino`: make a fleet, enrol its agents, train, look at what was trained.

stdout is for results (`--json`: one JSON object and nothing else), stderr for progress and errors: one line, and the
exit code of the error's class (`sordino_common.errors`); 130 for a run that was interrupted.

A module per group of commands; `commands` puts them together, `running` runs them, `output` prints.
"""

from sordino_server.cli.commands import app, main
from sordino_server.cli.running import run_cli

__all__ = ["app", "main", "run_cli"]
