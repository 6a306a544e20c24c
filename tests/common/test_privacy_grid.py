"""Clipping to the grid: the bound holds whatever comes in, and what is inside the ball is kept without bias."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from helpers_privacy import SIGMAS, seeded
from sordino_common.errors import LocalError
from sordino_common.privacy import grid
from sordino_common.privacy.grid import clip_to_grid, norm_squared
from sordino_common.privacy.grid_bound import grid_bound

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "privacy.json").read_text())
ANY = st.floats(allow_nan=True, allow_infinity=True, width=64)
WILD = st.one_of(
    ANY,
    st.sampled_from([0.0, -0.0, 5e-324, -5e-324, 2.2e-308, 1e-160, 1e160, 1.7e308, -1.7e308, math.inf, math.nan]),
    st.floats(-2.0, 2.0),
)


@given(
    arrays.arrays(np.float64, arrays.array_shapes(min_dims=1, max_dims=2, min_side=1, max_side=40), elements=WILD),
    st.floats(1e-30, 1e30),
    st.integers(1, 28),
    st.integers(0, 1 << 30),
)
@settings(max_examples=600, deadline=None)
def test_nothing_passes_the_bound(values: np.ndarray, clip_norm: float, grid_bits: int, seed: int) -> None:
    released, bound = clip_to_grid(values, clip_norm=clip_norm, grid_bits=grid_bits, random=seeded(seed))
    assert released.shape == values.shape
    assert released.dtype == np.int64
    assert bound == grid_bound(values.shape[-1], grid_bits)
    for row in np.atleast_2d(released):
        assert sum(int(entry) ** 2 for entry in row) <= bound


@given(arrays.arrays(np.float64, (17,), elements=st.floats(-1.0, 1.0)), st.integers(4, 24))
@settings(deadline=None)
def test_inside_the_ball_each_entry_moves_less_than_one_step(values: np.ndarray, grid_bits: int) -> None:
    released, _ = clip_to_grid(values, clip_norm=5.0, grid_bits=grid_bits, random=seeded(1))
    step = 5.0 / (1 << grid_bits)
    assert np.abs(released * step - values).max() < step * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 30.0])
def test_clipping_keeps_the_direction(scale: float) -> None:
    values = np.random.default_rng(1).normal(size=50)
    values *= scale / np.linalg.norm(values)
    released, _ = clip_to_grid(values, clip_norm=1.0, grid_bits=24, random=seeded(1))
    expected = values * min(1.0, 1.0 / scale)
    assert np.abs(released / (1 << 24) - expected).max() < 1e-6


def test_rounding_is_unbiased() -> None:
    # 40,000 roundings of the same 8 numbers: each mean within 5.4 standard deviations of the number.
    values = np.array([0.3, -0.3, 0.001, -0.999, 1.5, -2.25, 0.0, 1.0]) / 16
    rows = np.tile(values, (40_000, 1))
    released, _ = clip_to_grid(rows, clip_norm=1.0, grid_bits=4, random=seeded("unbiased"))
    for at, value in enumerate(values * 16):
        spread = math.sqrt(max(1e-12, (value - math.floor(value)) * (1 - value + math.floor(value))))
        assert abs(released[:, at].mean() - value) <= SIGMAS * spread / math.sqrt(40_000) + 1e-12


def test_rounding_on_the_sphere_is_nearly_unbiased() -> None:
    # Here the condition bites most: the bias stays below β = 0.011 of a step, plus 5.4 standard deviations.
    values = np.random.default_rng(3).normal(size=64)
    values /= np.linalg.norm(values)
    released, _ = clip_to_grid(np.tile(values, (20_000, 1)), clip_norm=1.0, grid_bits=8, random=seeded("sphere"))
    assert np.abs(released.mean(axis=0) - values * 256).max() < 0.011 + SIGMAS * 0.5 / math.sqrt(20_000)


def test_rounding_always_down_is_caught_by_that() -> None:
    values = np.random.default_rng(3).normal(size=64)
    values /= np.linalg.norm(values)
    assert np.abs(np.floor(values * 256) - values * 256).max() > 0.011 + SIGMAS * 0.5 / math.sqrt(20_000)


def test_when_every_rounding_is_too_long_it_goes_toward_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def up(_: object, count: int) -> np.ndarray:
        calls.append(count)
        return np.zeros(count, dtype=np.uint64)

    monkeypatch.setattr(grid.Words, "take", up)
    values = np.full(10_000, 0.01 * 0.999)
    released, bound = clip_to_grid(values, clip_norm=1.0, grid_bits=8, random=seeded(1))
    assert len(calls) == 4
    assert (released == 2).all()  # 2.557 a piece; up would be 3, of squared norm 90,000
    assert 3 * 3 * 10_000 > bound >= 2 * 2 * 10_000


def test_the_bound_is_close_to_the_balls() -> None:
    for length, grid_bits in ((1, 1), (500, 16), (1_000_000, 16), (1 << 32, 28)):
        bound = grid_bound(length, grid_bits)
        radius, root = 1 << grid_bits, math.sqrt(length)
        likely = radius**2 + length / 4 + 3 * (radius + root / 2)
        assert min(likely, (radius + root) ** 2) <= bound <= min(likely, (radius + root) ** 2) * 1.01 + 8
    assert grid_bound(10_000, 16) / (1 << 32) < 1.0001  # what rounding costs: 0.005 % of the noise's variance


def test_a_row_that_is_not_finite_is_zero_and_the_others_are_kept() -> None:
    values = np.array([[1.0, math.nan], [3.0, 4.0], [math.inf, 0.0], [-math.inf, 1.0]], dtype=np.float32)
    released, _ = clip_to_grid(values, clip_norm=10.0, grid_bits=10, random=seeded(1))
    assert released[[0, 2, 3]].any() == np.False_
    assert np.abs(released[1] - np.array([307.2, 409.6])).max() < 1


def test_golden_vector() -> None:
    (case,) = VECTORS["clip_to_grid"]
    key = bytes.fromhex(case["key"])
    released, bound = clip_to_grid(
        np.array(case["values"]), clip_norm=case["clip_norm"], grid_bits=case["grid_bits"], random=lambda _: key
    )
    assert (released.tolist(), bound) == (case["grid"], case["bound"])


def test_norm_squared_of_large_entries() -> None:
    assert norm_squared(np.array([1 << 62, -(1 << 62), 3])) == (1 << 125) + 9
    assert norm_squared(np.array([-(1 << 63)])) == 1 << 126
    assert norm_squared(np.array([], dtype=np.int64)) == 0


@pytest.mark.parametrize(
    ("values", "clip_norm", "grid_bits", "text"),
    [
        (np.zeros((2, 2, 2)), 1.0, 8, r"float32 or float64 \[d\] or \[n, d\], got float64\[2, 2, 2\]"),
        (np.zeros(3, dtype=np.int64), 1.0, 8, "got int64"),
        (np.zeros(3), 0.0, 8, r"clip_norm lies in \[1e-30, 1e30\], got 0.0"),
        (np.zeros(3), math.nan, 8, "got nan"),
        (np.zeros(3), 1.0, 29, "1 to 28 grid_bits, got 3 and 29"),
        (np.zeros(0), 1.0, 8, "1 to 2\\^32 entries"),
    ],
)
def test_refusals(values: np.ndarray, clip_norm: float, grid_bits: int, text: str) -> None:
    with pytest.raises(LocalError, match=text):
        clip_to_grid(values, clip_norm=clip_norm, grid_bits=grid_bits)
