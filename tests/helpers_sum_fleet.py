"""Three owners of rows, two helpers, the roster that lists them, and the terms of a noised sum over them."""

from __future__ import annotations

from helpers_agent import SERVER, Bench, bench
from helpers_channel import device, entry, roster
from helpers_sums import noise_of, sum_terms
from sordino_agent.policy import Policy
from sordino_common import messages as m

OWNERS = ("pi-0", "pi-1", "pi-2")
HELPERS = ("helper-0", "helper-1")
ROWS = 30
ROSTER = roster(
    entries=[
        entry(SERVER, roles=("server",)),
        *(entry(name, roles=("data",)) for name in OWNERS),
        *(entry(name, roles=("helper",), zone=f"zone-{k}") for k, name in enumerate(HELPERS)),
    ]
)


def terms(**changes: object) -> m.SumTerms:
    fields: dict[str, object] = {
        "length": 4,
        "bits": 64,
        "bound": ROWS << 12,
        "minimum": 3,
        "most": 5,
        "helpers": HELPERS,
        "noise": noise_of(1 << 26),
    }
    return sum_terms(**{**fields, **changes})


def helper(name: str) -> Bench:
    made = bench(policy=Policy(jobs=("help",), min_cohort=3), name=name, identity=device(name))
    made.core.on_roster(ROSTER)
    return made
