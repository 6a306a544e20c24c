"""Interleaved timing: variants take turns, so a noisy machine disturbs all of them alike; the best of many counts.

Each turn begins with a call that does not count: the variant before has left its own code and data in the caches."""

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
            function()
            calls, elapsed, start = 0, 0.0, time.perf_counter()
            while elapsed < slice_s:
                function()
                calls += 1
                elapsed = time.perf_counter() - start
            best[name] = min(best[name], elapsed / calls)
    return best
