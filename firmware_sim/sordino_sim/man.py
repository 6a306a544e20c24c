"""The manual page sordino-sim(1)."""

from __future__ import annotations

from sordino_common.manual import groff
from sordino_server.cli.manual import tree_of
from sordino_server.cli.output import installed_version
from sordino_server.cli.words import SIM_EXAMPLES, SIM_SUMMARY
from sordino_sim.cli import app


def pages() -> dict[str, str]:
    """By file name."""
    return {
        "sordino-sim.1": groff.program_page(
            tree_of(app, "sordino-sim", summary=SIM_SUMMARY),
            version=installed_version(),
            examples=[example for shown in SIM_EXAMPLES.values() for example in shown],
            files=(),
            environment=(),
            see_also=("sordino(1)", "sordino-agent(1)"),
        )
    }
