"""Runs a typer application: errors become one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import typer

from sordino_common.errors import SordinoError
from sordino_server.cli.output import note

# Newer versions of typer bring their own copy of click, older ones use click itself: this is the right class in both.
_UsageError: type[Exception] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def _show_usage_error(error: Any) -> None:
    error.show()


def run_cli(application: typer.Typer, arguments: list[str], *, program: str) -> int:
    """Run a typer application; errors become one line on stderr and an exit code. Shared with `sordino-sim`."""
    try:
        code = application(args=arguments, prog_name=program, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except SordinoError as error:
        note(f"{program}: {' '.join(str(error).split())}")
        return error.exit_code
    except typer.Exit as end:
        return end.exit_code
    except _UsageError as error:
        _show_usage_error(error)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        note(f"{program}: interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001  # the last resort: our own bug, said as such
        if os.environ.get("SORDINO_TRACEBACK"):
            traceback.print_exc()
        hint = "" if os.environ.get("SORDINO_TRACEBACK") else "; SORDINO_TRACEBACK=1 shows where"
        note(f"{program}: a bug in sordino: {type(error).__name__}: {error}{hint}")
        return 1
