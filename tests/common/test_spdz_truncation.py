"""Truncation is unbiased and off by at most one unit in the last place; nothing wraps. n = 2, 3, 4."""

from __future__ import annotations

import math

import numpy as np
import pytest

from helpers_spdz import Builder, Committee, F, fixed, toy_spec

ELEMENTS = 25_000
STEPS = 40  # 10^6 draws


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_million_products(n: int) -> None:
    """For z = x·x and t = F: the result is floor(z / 2^t) or that plus one, and the mean error is 0 within 4 standard
    errors: it is rounded up with chance p, the fraction, so its variance is p (1 - p). False alarm 6·10^-5; the seed
    is fixed, so it alarms always or never."""
    b = Builder()
    x = b.input("x", "x", (1, ELEMENTS), 8.0)
    circuit = b.circuit(square=("value", b.gate([("mul", x, x, 1)], shape=(1, ELEMENTS))))
    spec = toy_spec(n, security="passive", circuit=circuit, steps=STEPS, owners=(("ada", 1),))
    rng = np.random.default_rng(11)
    rows = {"ada": {"x": fixed(rng.uniform(-7.9, 7.9, (1, ELEMENTS)))}}
    committee = Committee(spec, rows, {}, seed=n)
    committee.run()
    z = (rows["ada"]["x"] * rows["ada"]["x"]).reshape(-1)
    low, fraction = z >> F, (z & (2**F - 1)) / 2**F
    total = 0.0
    for step in range(STEPS):
        found = committee.outputs(step)["square"].reshape(-1)
        over = found - low
        assert ((over == 0) | (over == 1)).all()
        assert (over[fraction == 0] == 0).all()  # what needs no rounding is exact
        total += float((over - fraction).sum())
    variance = float((fraction * (1 - fraction)).sum()) * STEPS
    assert abs(total) < 4 * math.sqrt(variance)
