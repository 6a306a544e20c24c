"""What the worker computes for secure sums: vectors of integers, masked before they leave; a helper's share.

Fixed point: v -> round(v 2^f), ties to even, in float64 and then int64; |v 2^f| below 2^53, where that is exact to the
unit. The bound of the terms is checked on the integers (`aggregate.contributor.mask`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sordino_agent.aggregate.tasks import ShareFacts, ShareTask, SumFacts
from sordino_agent.costs import statistics_cost
from sordino_agent.errors import BadCommand
from sordino_agent.tasks import EvaluateFacts, TrainFacts
from sordino_common.aggregate.contributor import mask
from sordino_common.aggregate.shares import share_of
from sordino_common.aggregate.wide import LOSS_FRACTION_BITS, LOSS_LIMBS, ROWS_LIMBS, limbs
from sordino_common.errors import LimitExceeded
from sordino_common.messages import Array, SumGradient, SumMetrics, SumStatistics, SumTerms, SumUpdate
from sordino_common.plan.arrays import from_numpy, to_numpy
from sordino_common.privacy.discrete_gaussian import discrete_gaussian
from sordino_common.privacy.grid import clip_to_grid
from sordino_common.privacy.grid_bound import entry_bound as entry_bound_of_grid
from sordino_common.privacy.mechanism import Mechanism
from sordino_common.privacy.row_queries import entry_bound, length_of
from sordino_common.privacy.row_sums import answer
from sordino_common.ring.seed import Seed

Random = Callable[[int], bytes]
I64 = npt.NDArray[np.int64]
_EXACT: Final = float(1 << 53)


def masked_facts(
    vector: I64,
    terms: SumTerms,
    *,
    agent: str,
    mechanisms: tuple[Mechanism, ...] = (),
    random: Random = os.urandom,
) -> SumFacts:
    """`vector` (int64[length]) masked: what leaves the worker. `mechanisms`: what releasing it costs, by unit."""
    masked = mask(vector, terms, contributor=agent, random=random)
    seeds = tuple(seed.expose() for seed in masked.seeds)
    return SumFacts(masked=from_numpy(masked.words), seeds=seeds, mechanisms=mechanisms)


def update_vector(
    command: SumUpdate, facts: TrainFacts, *, random: Random = os.urandom
) -> tuple[I64, Mechanism | None]:
    """The integers that `SumUpdate` asks for, and their cost if every aggregator adds the terms' noise: one of them is
    honest, so that its σ² counts. Raises `BadCommand` or `LimitExceeded`."""
    update, terms = flat(facts.update), command.terms
    if command.clip is not None:
        vector, bound = clip_to_grid(
            update, clip_norm=command.clip.norm, grid_bits=command.clip.grid_bits, random=random
        )
        _require_length(vector, terms)
        if terms.noise is None:
            return vector, None
        mechanism = Mechanism(unit="device", sensitivity_squared=bound, sigma_squared=terms.noise.sigma_squared)
        return vector, mechanism
    if command.weight == "one":
        vector = fixed_point(update, float(1 << command.fraction_bits), "an entry of the update")
        _require_length(vector, terms)
        return vector, None
    if facts.rows > command.weight_unit:
        raise BadCommand(
            f"the update is of {facts.rows} rows, but weight_unit is {command.weight_unit}: describe again"
        )
    scale = facts.rows / command.weight_unit * (1 << command.fraction_bits)
    vector = fixed_point(update, scale, "an entry of the update")
    mean_loss = facts.loss_sum / facts.steps
    loss = fixed_point(
        np.array([mean_loss * facts.rows]), float(1 << LOSS_FRACTION_BITS), "the loss times the number of rows"
    )
    extras = [*limbs(facts.rows, ROWS_LIMBS), *limbs(int(loss[0]), LOSS_LIMBS)]
    vector = np.concatenate([vector, np.array(extras, dtype=np.int64)])
    _require_length(vector, terms)
    return vector, None


def fits(command: SumUpdate, facts: TrainFacts) -> bool:
    """Whether the update is finite and, where it is not clipped, within what the terms' words hold."""
    update = flat(facts.update)
    if not np.isfinite(update).all():
        return False
    if command.clip is not None:
        return True
    weight = facts.rows / command.weight_unit if command.weight == "rows" else 1.0
    largest = float(np.abs(update).max()) if update.size else 0.0
    return largest * weight * 2.0**command.fraction_bits + 1.0 < min(command.terms.bound, _EXACT)


def require_gradient(command: SumGradient, *, length: int, rows: int) -> None:
    """Raises `BadCommand` unless the terms hold a clipped sum of `length` entries over any of `rows` rows."""
    terms, most = command.terms, rows << command.grid_bits
    if terms.length != length:
        raise BadCommand(f"the Plan's gradients have {length} entries, the terms of the sum say {terms.length}")
    if terms.bound < most:
        raise BadCommand(
            f"a sum over {rows} rows on a grid of {command.grid_bits} bits can reach {most}, the terms of the sum say "
            f"{terms.bound}"
        )


def require_clip(command: SumUpdate) -> None:
    """Raise `BadCommand` unless every clipped update fits the terms: decided by the command alone, before the work.
    Afterwards a refusal would tell something of the rows, and for nothing."""
    assert command.clip is not None
    terms, entries = command.terms, sum(math.prod(array.shape) for array in command.params)
    if entries != terms.length:
        raise BadCommand(f"the contribution has {entries} entries, the terms of the sum say {terms.length}")
    needed = entry_bound_of_grid(command.clip.grid_bits)
    if terms.bound < needed:
        raise BadCommand(
            f"an update on a grid of {command.clip.grid_bits} bits can reach {needed}, the terms of the sum say "
            f"{terms.bound}"
        )


def nothing(command: SumUpdate) -> TrainFacts:
    """An update of zeros."""
    zeros = tuple(Array(array.dtype, array.shape, bytes(array.nbytes)) for array in command.params)
    return TrainFacts(rows=0, steps=1, update=zeros, loss_sum=0.0)


def metrics_vector(command: SumMetrics, facts: EvaluateFacts) -> I64:
    """Rows, then the fixed-point sum of every row output."""
    sums = fixed_point(np.array(facts.sums), float(1 << command.fraction_bits), "a sum over the held-out rows")
    vector = np.concatenate([np.array([facts.rows], dtype=np.int64), sums])
    _require_length(vector, command.terms)
    return vector


def require_statistics(command: SumStatistics, rows: int) -> None:
    """Raise `BadCommand` unless the answers of `rows` rows fit the terms: their length, and their size."""
    terms, queries = command.terms, command.queries
    if length_of(queries) != terms.length:
        raise BadCommand(f"the queries have {length_of(queries)} answers, the terms of the sum say {terms.length}")
    most = entry_bound(queries, rows)
    if most > terms.bound:
        raise BadCommand(
            f"an answer over {rows} rows can reach {most}, the terms of the sum allow {terms.bound}: describe again"
        )


def statistics_facts(
    command: SumStatistics, values: Mapping[str, npt.NDArray[Any]], *, agent: str, random: Random = os.urandom
) -> SumFacts:
    """The answers over the rows of `values` (columns by name), masked, with their price if there is noise."""
    vector = answer(command.columns, values, command.queries)
    mechanisms = () if command.terms.noise is None else (statistics_cost(command),)
    return masked_facts(vector, command.terms, agent=agent, mechanisms=mechanisms, random=random)


def share_facts(task: ShareTask, *, random: Random = os.urandom, check: Callable[[], None] | None = None) -> ShareFacts:
    """The share, with this helper's noise in it."""
    share = share_of(
        task.terms,
        helper=task.helper,
        members=task.members,
        seeds=[Seed(seed) for seed in task.seeds],
        draw=lambda sigma_squared, count: discrete_gaussian(sigma_squared, count, random),
        check=check,
    )
    return ShareFacts(share=from_numpy(share))


def flat(arrays: Sequence[Array]) -> npt.NDArray[np.float64]:
    """All elements, one array after the other, in C order."""
    parts = [to_numpy(array).reshape(-1).astype(np.float64) for array in arrays]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.float64)


def fixed_point(values: npt.NDArray[np.float64], scale: float, what: str) -> I64:
    """round(values · scale). Raises `LimitExceeded` if one is beyond 2^53."""
    scaled = np.rint(values * scale)
    if scaled.size and not float(np.abs(scaled).max()) < _EXACT:
        raise LimitExceeded(
            f"{what} is too large for fixed point with a scale of {scale:g}; fewer fraction bits would do"
        )
    return scaled.astype(np.int64)


def _require_length(vector: I64, terms: SumTerms) -> None:
    if vector.shape != (terms.length,):
        raise BadCommand(f"the contribution has {vector.size} entries, the terms of the sum say {terms.length}")
