"""A fault schedule drawn from a seed: `sordino-sim run JOB --chaos 7`. What it finds can be played again.

`harmless` faults only delay (broker restarts, cuts, wrong clocks, floods, a killed server): whatever a seed draws, the
run must end at the parameters of an undisturbed one. The others take agents and helpers away for a while, in mid-word.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

from sordino_sim.faults import Action, Fault, FaultFile, TransportName

HARMLESS: Final[tuple[Action, ...]] = ("broker-restart", "server-kill", "cut", "clock", "flood")
_HARMFUL: Final[tuple[Action, ...]] = ("die", "die", "die", "leave", "slow")
_ONLY_MEMORY: Final[tuple[Action, ...]] = ("cut",)  # only there is the network simulated
_HOUR_S: Final = 3600.0


def draw_faults(
    seed: int,
    *,
    agents: Sequence[str],
    helpers: Sequence[str] = (),
    rounds: int,
    span_s: float = 1.0,
    harmless: bool = False,
    transport: TransportName = "memory",
) -> FaultFile:
    """One to four faults a round, each within `span_s` of its beginning; who was taken away comes back within
    2 `span_s`. A value of its arguments."""
    rng = random.Random(f"sordino-chaos|{seed}")
    actions: list[Action] = [
        action
        for action in (*HARMLESS, *(() if harmless else _HARMFUL))
        if transport == "memory" or action not in _ONLY_MEMORY
    ]
    faults: list[Fault] = []
    for round_ in range(1, rounds + 1):
        for _ in range(rng.randint(1, 4)):
            do = rng.choice(actions)
            after_s = rng.uniform(0.0, span_s)
            name = rng.choice((*agents, *helpers) if do in ("die", "leave") else tuple(agents))
            match do:
                case "broker-restart":
                    faults.append(Fault(do=do, round=round_, after_s=after_s, down_s=rng.uniform(0.0, 2.0 * span_s)))
                case "server-kill":
                    faults.append(Fault(do=do, round=round_, after_s=after_s))
                case "cut":
                    faults.append(Fault(do=do, round=round_, after_s=after_s, agents=(name,), for_s=span_s))
                case "clock":
                    by_s = rng.uniform(-48.0, 48.0) * _HOUR_S
                    faults.append(Fault(do=do, round=round_, after_s=after_s, agents=(name,), by_s=by_s))
                case "flood":
                    faults.append(
                        Fault(do=do, round=round_, after_s=after_s, agents=(name,), per_s=200.0, for_s=span_s)
                    )
                case "slow":
                    factor = rng.choice((0.5, 5.0, 50.0))
                    faults.append(Fault(do=do, round=round_, after_s=after_s, agents=(name,), factor=factor))
                case _:  # die, leave
                    noticed_s = rng.choice((0.0, 0.0, span_s, 45.0))
                    faults.append(Fault(do=do, round=round_, after_s=after_s, agents=(name,), noticed_s=noticed_s))
                    back_s = after_s + rng.uniform(0.0, 2.0 * span_s)
                    faults.append(Fault(do="return", round=round_, after_s=back_s, agents=(name,)))
    return FaultFile(faults=tuple(faults), seed=seed)
