"""What a report says of differential privacy: a figure to see at a glance, and a table with everything behind it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, Final

from sordino_server.page import card, table, tile
from sordino_server.progress import number

_UNITS: Final = {"record": "one row added or removed", "device": "one device, with all its rows, added or removed"}


def privacy_tile(privacy: Mapping[str, Any]) -> str:
    """Epsilon, at which delta, for what."""
    note = f"at delta {privacy['delta']:g}, for one {privacy['unit']}; {privacy['accountant'].upper()} accountant"
    return tile("privacy: epsilon", number(privacy["epsilon"]), note)


def privacy_card(privacy: Mapping[str, Any]) -> str:
    """Unit, figures of all accountants, adversary, noise, and what is not covered."""
    rows = [("whose privacy", escape(_UNITS[privacy["unit"]])), *_figures(privacy)]
    second = privacy.get("device")
    if second is not None:
        rows += [("and", escape(_UNITS["device"])), ("against", escape(second["adversary"])), *_figures(second)]
    rows.append(("not covered", escape("; ".join(privacy["not_covered"]))))
    return card(
        "Differential privacy", table(("", ""), rows, header=False), escape(f"Holds against {privacy['adversary']}.")
    )


def _figures(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    asked = entry["target_epsilon"]
    target = "" if asked is None else f"; asked for: {asked:g}"
    others = {"PLD": entry["pld_epsilon"], "Rényi (RDP)": entry["rdp_epsilon"], "moments": entry["moments_epsilon"]}
    told = ", ".join(f"{name} {number(value)}" for name, value in others.items() if value is not None)
    rate = entry["sampling_rate"]
    sample = "" if rate is None else f"; each row is in a step with probability {rate:g} (Poisson)"
    clip = entry["clip_norm"]
    of = "the most that a row can add" if clip is None else f"the clip norm {clip:g}"
    noise = (
        f"{number(entry['noise_multiplier'])} times {of} from {entry['noise_from']} "
        f"(discrete Gaussian, variance {entry['sigma_squared']:.4g} in units of the grid, sensitivity² "
        f"{entry['sensitivity_squared']:.4g}){sample}"
    )
    return [
        ("epsilon", escape(f"{number(entry['epsilon'])} at delta {entry['delta']:g}{target}")),
        ("by accountant", escape(told)),
        ("noise", escape(noise)),
        ("noised releases", f"{entry['releases']}"),
    ]
