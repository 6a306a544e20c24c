"""The console script `sordino-sim`: needs what the server needs, and says so."""

from __future__ import annotations

from typing import NoReturn

from sordino_server.launch import launch


def sordino_sim() -> NoReturn:
    """`sordino-sim`."""
    launch("sordino_sim.cli", program="sordino-sim", extra="sim")
