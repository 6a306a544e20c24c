"""Three owners of rows, two helpers, their roster, the terms of a noised sum over them, and who leads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from helpers_agent import SERVER, Bench, bench
from helpers_channel import device, entry, roster
from helpers_sums import noise_of, rounded_gaussian, sum_terms
from sordino_agent.policy import Policy
from sordino_common import messages as m
from sordino_common.aggregate.leader import LeaderSum

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


def lead(
    command: m.SumUpdate | m.SumMetrics | m.SumGradient | m.SumStatistics,
    *,
    owners: Mapping[str, Bench],
    helpers: Mapping[str, Bench],
    draw: Callable[[int, int], np.ndarray] = rounded_gaussian(0),
) -> tuple[np.ndarray, LeaderSum]:
    """The sum that everybody's agent contributes to, and who led it."""
    leader = LeaderSum(command.terms, asked=owners)
    for name, made in owners.items():
        contribution = made.ask(command)
        assert isinstance(contribution, m.Contribution), contribution
        for to, box in leader.contribute(name, contribution).items():
            checked = helpers[to].ask(m.SumSeeds(terms=command.terms, seeds=(m.SealedSeed(name=name, box=box),)))
            assert isinstance(checked, m.SumSeedsChecked), checked
            leader.checked(to, checked)
    cut = leader.cut()
    for name, made in helpers.items():
        share = made.ask(cut)
        assert isinstance(share, m.SumShare), share
        leader.share(name, share)
    return leader.result(draw), leader
