"""Who holds which rows: a dataset split over N agents, every row exactly once.

`iid`: a random permutation in N nearly equal parts. `dirichlet`: for every class c, proportions p_c ~ Dir(alpha, ...,
alpha) over the agents, and the rows of c are dealt out in these proportions (Hsu, Qi, Brown 2019, "Measuring the
Effects of Non-Identical Data Distribution", section 3, in the per-class form that most of the literature uses).
Small alpha: strong skew. Regression targets are binned by quantiles first. Every agent gets at least `min_rows`: who
has fewer takes rows from who has most, so that any alpha gives a fleet that can train.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sordino_common.errors import ConfigError

Rows = NDArray[np.int64]

REGRESSION_BINS = 10


def partition_iid(rows: int, *, agents: int, seed: int, min_rows: int = 1) -> list[Rows]:
    """`agents` sorted index arrays over range(rows), sizes differing by one at most. Raises `ConfigError`."""
    _check(rows, agents, min_rows)
    order = _generator(seed, "iid").permutation(rows)
    return [np.sort(part) for part in np.array_split(order, agents)]


def partition_dirichlet(
    targets: NDArray[np.generic], *, agents: int, alpha: float, seed: int, min_rows: int = 1
) -> list[Rows]:
    """`agents` sorted index arrays over the rows of `targets` [N], skewed by label. Raises `ConfigError`."""
    _check(len(targets), agents, min_rows)
    if not (np.isfinite(alpha) and alpha > 0.0):
        raise ConfigError(f"partition: alpha is {alpha}; a finite number above 0 is expected (1 mild, 0.1 strong)")
    rng = _generator(seed, "dirichlet")
    parts: list[list[int]] = [[] for _ in range(agents)]
    labels = class_labels(targets)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = _dirichlet(rng, alpha, agents)
        # Rounding the cumulated shares deals out every row once, whatever the shares are.
        edges = np.rint(np.cumsum(shares) * len(members)).astype(np.int64)
        edges[-1] = len(members)
        for part, piece in zip(parts, np.split(members, edges[:-1]), strict=True):
            part.extend(int(index) for index in piece)
    _repair(parts, min_rows, rng)
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts]


def class_labels(targets: NDArray[np.generic]) -> NDArray[np.int64]:
    """A class per row: integers and 0/1 stay what they are; other targets fall into quantile bins."""
    flat = np.asarray(targets).reshape(len(targets), -1)[:, 0] if len(targets) else np.zeros(0)
    if np.issubdtype(flat.dtype, np.integer) or flat.dtype == np.bool_:
        return flat.astype(np.int64)
    values = flat.astype(np.float64)
    if len(np.unique(values)) <= REGRESSION_BINS:
        return np.unique(values, return_inverse=True)[1].astype(np.int64)
    inner = np.quantile(values, np.linspace(0.0, 1.0, REGRESSION_BINS + 1)[1:-1])
    return np.searchsorted(inner, values, side="right").astype(np.int64)


def _dirichlet(rng: np.random.Generator, alpha: float, agents: int) -> NDArray[np.float64]:
    """One draw of Dir(alpha, ..., alpha). For tiny alpha all gammas may underflow to 0: then one agent gets all."""
    gammas = rng.standard_gamma(alpha, agents)
    total = gammas.sum()
    if total > 0.0:
        return np.asarray(gammas / total)
    return np.asarray(np.eye(agents)[rng.integers(agents)])


def _repair(parts: list[list[int]], min_rows: int, rng: np.random.Generator) -> None:
    """Move rows from the largest part to those below `min_rows`. Terminates: sum of parts >= agents * min_rows."""
    for part in parts:
        while len(part) < min_rows:
            largest = max(parts, key=len)  # the first of equals: deterministic
            part.append(largest.pop(int(rng.integers(len(largest)))))


def _check(rows: int, agents: int, min_rows: int) -> None:
    if agents < 1 or min_rows < 0:
        raise ConfigError(f"partition: {agents} agents with at least {min_rows} rows each; expected 1 agent or more")
    if rows < agents * min_rows:
        raise ConfigError(
            f"partition: {rows} rows for {agents} agents with at least {min_rows} each; "
            f"at most {rows // max(1, min_rows)} agents are possible"
        )


def _generator(seed: int, purpose: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *purpose.encode()])))
