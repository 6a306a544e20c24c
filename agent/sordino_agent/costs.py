"""What a command will cost in privacy, as far as that can be said before its work. Without NumPy: for the daemon.

The price that is charged afterwards comes from the code that sampled and clipped. For rows, this one is never below it:
it counts every entry of the parameters, also of those that are not trained.
"""

from __future__ import annotations

import math

from sordino_common.messages import Array, RecordTerms, SumGradient, SumStatistics, SumUpdate, Train
from sordino_common.privacy.grid_bound import grid_bound
from sordino_common.privacy.mechanism import FULL_SAMPLING, MAX_COUNT, Mechanism
from sordino_common.privacy.row_queries import sensitivity_squared
from sordino_common.privacy.rows import row_bound


def entries_of(params: tuple[Array, ...]) -> int:
    """How many numbers there are in all; at least one."""
    return max(1, sum(math.prod(array.shape) for array in params))


def private_steps(*, steps: int, epochs: float, threshold: int) -> int:
    """Local steps: `steps`, or if that is 0, max(1, round(epochs / q)): as many as meet each row `epochs` times on
    average; at most 2^40."""
    return steps or max(1, min(MAX_COUNT, round(epochs * FULL_SAMPLING / threshold)))


def expected_cost(command: Train | SumUpdate, terms: RecordTerms) -> Mechanism:
    """Local DP-SGD: each of its steps is a release."""
    steps = private_steps(steps=command.steps, epochs=command.epochs, threshold=terms.sampling_threshold)
    return Mechanism(
        unit="record",
        sensitivity_squared=row_bound(entries_of(command.params), terms.grid_bits),
        sigma_squared=terms.sigma_squared,
        sampling_threshold=terms.sampling_threshold,
        count=steps,
    )


def statistics_cost(command: SumStatistics) -> Mechanism:
    """Of the answers to all queries, as one release of every train row."""
    noise = command.terms.noise
    assert noise is not None
    return Mechanism(
        unit="record",
        sensitivity_squared=sensitivity_squared(command.queries),
        sigma_squared=noise.sigma_squared,
    )


def expected_costs(command: SumUpdate | SumGradient | SumStatistics) -> tuple[Mechanism, ...]:
    """Of a contribution to a sum, for each unit; none: it has no noise. Of the noise that every aggregator adds, that
    of one counts: one of them is honest, and helpers open a seed only under the terms that it was sealed under."""
    noise = command.terms.noise
    if isinstance(command, SumStatistics):
        return () if noise is None else (statistics_cost(command),)
    if isinstance(command, SumGradient):
        assert noise is not None  # the message is none without it
        step = Mechanism(
            unit="record",
            sensitivity_squared=row_bound(entries_of(command.params), command.grid_bits),
            sigma_squared=noise.sigma_squared,
            sampling_threshold=command.sampling_threshold,
        )
        return (step,)
    costs = []
    if command.privacy is not None:
        costs.append(expected_cost(command, command.privacy))
    if command.clip is not None and noise is not None:
        bound = grid_bound(command.terms.length, command.clip.grid_bits)
        costs.append(Mechanism(unit="device", sensitivity_squared=bound, sigma_squared=noise.sigma_squared))
    return tuple(costs)
