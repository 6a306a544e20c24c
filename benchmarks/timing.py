"""Interleaved timing: variants take turns, so a noisy machine disturbs all of them alike; the best of many counts.

A third more of each turn comes first and does not count: the variant before has left its own code and data in caches
and predictors, and the first calls pay for that."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def best_seconds(
    variants: Mapping[str, Callable[[], object]], *, rounds: int = 7, slice_s: float = 0.05
) -> dict[str, float]:
    """Seconds per call of each variant: the fastest of `rounds` slices of `slice_s`, taken in turns."""
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(rounds):
        for name, function in variants.items():
            _seconds(function, slice_s / 3)
            best[name] = min(best[name], _seconds(function, slice_s))
    return best


def _seconds(function: Callable[[], object], slice_s: float) -> float:
    calls, elapsed, start = 0, 0.0, time.perf_counter()
    while elapsed < slice_s:
        function()
        calls += 1
        elapsed = time.perf_counter() - start
    return elapsed / calls
