"""Inputs for one step of a traced job: its first parameters, zeros for the optimizer's state, random rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sordino_common.plan.plan import Plan
from sordino_server.model import Traced


def step_inputs(plan: Plan, traced: Traced) -> list[NDArray[np.generic]]:
    """In the order of `plan.inputs`; the last two are x and y. Targets are 0 or 1, which suits every loss."""
    rng = np.random.default_rng(0)
    params = iter(traced.params)
    inputs: list[NDArray[np.generic]] = []
    for entry in plan.inputs:
        if entry.role == "param":
            inputs.append(next(params))
        elif entry.role == "state":
            inputs.append(np.zeros(entry.spec.shape, dtype=entry.spec.dtype))
        elif entry.role == "x":
            inputs.append(rng.standard_normal(entry.spec.shape).astype(np.float32))
        else:
            inputs.append((rng.random(entry.spec.shape) < 0.5).astype(entry.spec.dtype))
    return inputs
