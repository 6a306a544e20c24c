"""The weighted mean of updates: params + Σ_i rows_i · update_i / Σ_i rows_i.

Summed in float64 in ascending order of the agents' names, then rounded to the parameters' dtype once: the result is
the same to the bit in whatever order the updates came. McMahan et al. 2017, "Communication-Efficient Learning of Deep
Networks from Decentralized Data", Algorithm 1 (there in terms of params, here of differences: the same mean).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sordino_common.errors import LocalError, RemoteError
from sordino_common.messages import Array, Trained
from sordino_common.plan.arrays import to_numpy
from sordino_server.rounds.effects import Params

# What no honest device says. Within these, sums over a fleet of liars stay finite and fit 64 bits.
MOST_ROWS: Final = 1 << 40
MOST_STEPS: Final = 1 << 31
LARGEST: Final = 1e100


def check_update(
    reply: Trained, params: Params, *, norm_limit: float | None = None, row_limit: int | None = None
) -> None:
    """Raise `RemoteError` unless the update has the parameters' dtypes and shapes, is finite, and is within limits."""
    if reply.rows < 1 or reply.steps < 1:
        raise RemoteError(f"an update from {reply.rows} rows in {reply.steps} steps")
    if reply.rows > MOST_ROWS or reply.steps > MOST_STEPS:
        raise RemoteError(f"claims {reply.rows} rows in {reply.steps} steps, at most {MOST_ROWS} in {MOST_STEPS}")
    if row_limit is not None and reply.rows > row_limit:
        raise RemoteError(f"claims {reply.rows} rows; limits.rows_per_agent is {row_limit}")
    if not math.isfinite(reply.loss_sum):
        raise RemoteError("its loss is not finite: the training diverged there")
    if abs(reply.loss_sum) > LARGEST or not 0.0 <= reply.seconds <= LARGEST:
        raise RemoteError(f"claims a loss of {reply.loss_sum:.4g} and {reply.seconds:.4g} seconds")
    if len(reply.update) != len(params):
        raise RemoteError(f"{len(reply.update)} tensors in the update, expected {len(params)}")
    square = 0.0
    for k, (array, param) in enumerate(zip(reply.update, params, strict=True)):
        _check_spec(k, array, param)
        values = to_numpy(array)
        if not np.isfinite(values).all():
            raise RemoteError(f"tensor {k} of the update has values that are not finite")
        with np.errstate(over="ignore"):
            moved = param + values
        if not np.isfinite(moved).all() or float(np.abs(values).max(initial=0)) > LARGEST:
            raise RemoteError(f"tensor {k} of the update takes parameters out of the range of {array.dtype}")
        if norm_limit is not None:
            square += float(np.square(values, dtype=np.float64).sum())
    if norm_limit is not None and math.sqrt(square) > norm_limit:
        raise RemoteError(f"the update's L2 norm {math.sqrt(square):.4g} is above limits.update_norm {norm_limit:.4g}")


def averaged(params: Params, replies: Mapping[str, Trained]) -> Params:
    """New parameters; see the module's head. The updates must have passed `check_update`."""
    total = sum(reply.rows for reply in replies.values())
    if total < 1:
        raise LocalError("averaged: no rows")
    result = []
    for k, param in enumerate(params):
        mean = np.zeros(param.shape, np.float64)
        term = np.empty(param.shape, np.float64)
        for name in sorted(replies):
            np.multiply(to_numpy(replies[name].update[k]), float(replies[name].rows), out=term, dtype=np.float64)
            mean += term
        mean /= float(total)
        # asarray: what NumPy computes from arrays without dimensions are scalars.
        result.append(np.asarray(param.astype(np.float64) + mean, dtype=param.dtype, order="C"))
    return tuple(result)


def _check_spec(k: int, array: Array, param: NDArray[np.generic]) -> None:
    if array.dtype != param.dtype.name or array.shape != param.shape:
        raise RemoteError(
            f"tensor {k} of the update is {array.dtype}{list(array.shape)}, "
            f"expected {param.dtype.name}{list(param.shape)}"
        )
