"""Our PCG64 against NumPy's: the order of rows, and so every trained model, hangs on its bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sordino_agent import pcg64
from sordino_agent.pcg64 import Pcg64

# Around the words of 32 bits that a seed is cut into, the four of the pool, and the 256 of a digest.
EDGES = [0, 1, *(2**bits + more for bits in (32, 64, 96, 128, 160, 224, 256) for more in (-1, 0, 1))]
MOST = 3 * pcg64._BLOCK + 5


@given(
    seed=st.one_of(st.sampled_from(EDGES), st.integers(0, 2**256 - 1), st.integers(0, 2**63 - 1)),
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=4),
)
@example(seed=2**256 - 1, counts=[1, 0, 63, 64, 65, 1])
def test_the_draws_are_numpys_whatever_is_drawn_at_once(seed: int, counts: list[int]) -> None:
    ours, theirs = Pcg64(seed), np.random.PCG64(seed)
    for count in counts:
        drawn = ours.random_raw(count)
        assert drawn.dtype == np.uint64
        assert drawn.tolist() == theirs.random_raw(count).tolist()


@pytest.mark.parametrize("seed", EDGES)
def test_every_seed_of_an_edge_gives_numpys_draws(seed: int) -> None:
    assert Pcg64(seed).random_raw(40).tolist() == np.random.PCG64(seed).random_raw(40).tolist()


@pytest.mark.parametrize("count", [pcg64._BLOCK - 1, pcg64._BLOCK, pcg64._BLOCK + 1, 2 * pcg64._BLOCK, MOST])
def test_blocks_follow_one_another_without_a_seam(count: int) -> None:
    ours, theirs = Pcg64(count), np.random.PCG64(count)
    for _ in range(2):
        assert np.array_equal(ours.random_raw(count), theirs.random_raw(count))


def test_the_draws_are_the_recorded_ones() -> None:
    """Whatever becomes of NumPy's: a device in the field goes on from these."""
    assert Pcg64(3).random_raw(3).tolist() == RECORDED


def test_another_seed_is_another_stream() -> None:
    """Also where seeds differ in a word beyond the pool alone."""
    streams = {tuple(Pcg64(seed).random_raw(2).tolist()) for seed in (0, 1, 2**32, 2**128, 2**160, 2**255)}
    assert len(streams) == 6


RECORDED = [1579948266424812280, 4368382809143759861, 14780904992460893238]
