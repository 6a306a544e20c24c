"""Against whom a job's noise holds, and what no epsilon of it covers: the one text of plans, summaries and reports."""

from __future__ import annotations

from typing import Final

NOT_COVERED: Final = (
    "held-out rows, over which exact sums are formed for the metrics, if a device's owner allows them",
    "how many rows each device has, who takes part, and when",
    "the choice of settings (ranges, clip norms, rounds) after looking at earlier runs on the same rows",
)


def adversary(*, helpers: int, local: bool) -> str:
    """To be read after "holds against". `local`: every device adds the whole noise itself; else each of `helpers` and
    the server does, inside a secure sum."""
    others = "the broker, the other devices, and whoever is later given the result"
    if local:
        return (
            f"the server, the helpers, {others}. Each device adds the whole noise before anything leaves it, so nobody "
            "else has to be trusted"
        )
    if helpers == 1:
        return (
            f"the server as long as the helper is honest, the helper, {others}. Helper and server each add the whole "
            "noise; if they work together, nothing is promised"
        )
    return (
        f"the server, even together with all but one of the {helpers} helpers, {others}. Every helper and the server "
        "add the whole noise, so one honest helper is enough; if the server and all helpers work together, nothing is "
        "promised"
    )
