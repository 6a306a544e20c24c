"""The console script `sordino`: a bare install is the agent and lacks what the server needs.

This module imports the standard library only, so that missing packages end in a line that says what to install.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Final, NoReturn

# The dealer's products by NumPy are small: OpenBLAS's threads would wait for one another, on cores that others need.
# To be said before NumPy is imported; whoever says otherwise in the environment is heard. torch keeps its threads.
ONE_THREAD: Final = {"OPENBLAS_NUM_THREADS": "1"}
_NEEDED: Final = (
    "dp_accounting",
    "torch",
    "safetensors",
    "typer",
    "rich",
    "prometheus_client",
)  # the extra `server` of pyproject.toml


def launch(module: str, *, program: str, extra: str) -> NoReturn:
    """Run `main` of `module`, or end with exit code 2 (`ConfigError`'s) if the packages of `extra` are not there."""
    for name, threads in ONE_THREAD.items():
        os.environ.setdefault(name, threads)
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        remedy = f"pip install 'sordino[{extra}]'"
        sys.stderr.write(f"{program}: {', '.join(missing)} not installed, only sordino-agent runs here; do: {remedy}\n")
        raise SystemExit(2)
    import_module(module).main()
    raise SystemExit(0)


def sordino() -> NoReturn:
    """`sordino`."""
    launch("sordino_server.cli", program="sordino", extra="server")
