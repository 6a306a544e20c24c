"""The manual page sordino(1)."""

from __future__ import annotations

from sordino_common.manual import groff
from sordino_server.cli.commands import app
from sordino_server.cli.manual import tree_of
from sordino_server.cli.output import installed_version
from sordino_server.cli.words import ENVIRONMENT, EXAMPLES, FILES, SUMMARY


def pages() -> dict[str, str]:
    """By file name."""
    return {
        "sordino.1": groff.program_page(
            tree_of(app, "sordino", summary=SUMMARY),
            version=installed_version(),
            examples=[example for shown in EXAMPLES.values() for example in shown],
            files=FILES,
            environment=ENVIRONMENT,
            see_also=("sordino-agent(1)", "sordino-sim(1)"),
        )
    }
