"""F_p's inner products against Python's integers: edges, batches, shared vectors, views, blocks, lengths, refusals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_fp import from_ints, residues
from sordino_common.errors import LocalError
from sordino_common.ring import fp
from sordino_common.ring.fp import P
from sordino_common.ring.fp_dots import DOT_BLOCK, INNER, MAX_INNER
from sordino_common.ring.limbs import Workspace

EDGES = [0, 1, P - 1, 1 << 63, P - (1 << 63), (1 << 64) - 1, 1 << 126, (1 << 105) - 1, (1 << 112) - 1]
INT_EDGES = np.array([0, 1, -1, 1 << 62, -(1 << 63), (1 << 63) - 1, (1 << 48) - 1, 1 << 21], dtype=np.int64)


def integers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn = rng.integers(-(1 << 63), (1 << 63) - 1, shape, endpoint=True)
    return np.where(rng.random(shape) < 0.4, drawn, rng.choice(INT_EDGES, shape))


def elements(shape: tuple[int, ...], seed: int) -> fp.Fp:
    rng, size = np.random.default_rng(seed), int(np.prod(shape))
    drawn = [int.from_bytes(rng.bytes(16), "little") % P for _ in range(size)]
    return from_ints([EDGES[k % len(EDGES)] if rng.random() < 0.4 else x for k, x in enumerate(drawn)], shape)


def expected(left: np.ndarray, right: np.ndarray) -> list[int]:
    return [int(total) % P for total in (residues(left) * residues(right)).sum(axis=1)]


def check(
    left: list[np.ndarray], right: list[np.ndarray], pairs: list[tuple[int, int]], space: Workspace | None = None
) -> None:
    assert fp.dots(left, right, pairs, workspace=space) == [expected(left[i], right[j]) for i, j in pairs]


EVERY_PAIR = [(i, j) for i in range(3) for j in range(3)]


@pytest.mark.parametrize("count", [0, 1, 2, 341, 600])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_kind_by_every_kind(batch: int, count: int) -> None:
    """Several pairs share a vector; some are asked for twice, or not at all."""
    shape = (batch, count)
    left = [elements(shape, 1), integers(shape, 2), elements(shape, 3)]
    right = [integers(shape, 4), elements(shape, 5), integers(shape, 6)]
    check(left, right, [*EVERY_PAIR, (1, 0)])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.integers(0, 4),
    st.integers(0, 6),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=5),
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.integers(0, 99),
)
def test_any_batch_and_any_pairs(
    batch: int, count: int, pairs: list[tuple[int, int]], kinds: list[bool], seed: int
) -> None:
    made = [(elements if kind else integers)((batch, count), seed + k) for k, kind in enumerate(kinds)]
    check(made[:3], made[3:], pairs)


@pytest.mark.parametrize(
    ("batch", "count"),
    [(1, DOT_BLOCK), (1, DOT_BLOCK + 1), (3, DOT_BLOCK // 3), (3, DOT_BLOCK // 3 + 1), (7, 2 * (DOT_BLOCK // 7) + 1)],
)
def test_blocks_are_crossed(batch: int, count: int) -> None:
    shape = (batch, count)
    check([elements(shape, 1)], [integers(shape, 2)], [(0, 0)])


def test_more_rows_than_a_block_has_entries() -> None:
    shape = (DOT_BLOCK + 1, 2)
    check([integers(shape, 1)], [integers(shape, 2)], [(0, 0)])


def test_nothing_to_multiply() -> None:
    some = integers((2, 3), 1)
    assert fp.dots([], [], []) == []
    assert fp.dots([], [some], []) == fp.dots([some], [], []) == []
    assert fp.dots([some[:0]], [some[:0]], [(0, 0), (0, 0)]) == [[], []]
    assert fp.dots([some[:, :0]], [some[:, :0]], [(0, 0)]) == [[0, 0]]


def test_edges() -> None:
    """Every edge times every edge, alone: a row each."""
    x, y = np.meshgrid(np.arange(len(EDGES)), np.arange(len(EDGES)))
    a, b = (from_ints([EDGES[k] for k in each.ravel()], (each.size, 1)) for each in (x, y))
    check([a], [b], [(0, 0)])
    x, y = np.meshgrid(INT_EDGES, INT_EDGES)
    check([x.reshape(-1, 1)], [y.reshape(-1, 1)], [(0, 0)])
    many = np.resize(INT_EDGES, (a.shape[1], 1))
    check([a, many], [many], [(0, 0), (1, 0)])


def test_views() -> None:
    """Parts of larger arrays, reversed, transposed, expanded, strided."""
    a, x = integers((6, 5), 1), elements((6, 5), 2)
    views: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda t: t.swapaxes(-1, -2),
        lambda t: t[..., ::-1, ::-1],
        lambda t: t[..., 1:4, 1:3],
        lambda t: t[..., ::2],
        lambda t: np.broadcast_to(t[..., :1], (*t.shape[:-1], 5)),
        lambda t: np.broadcast_to(t[..., :1, :], (*t.shape[:-2], 4, 5)),
    ]
    for view in views:
        both = [view(a), view(x)]
        check(both, both, [(0, 0), (0, 1), (1, 0), (1, 1)])


@pytest.mark.parametrize("count", [1 << 17, INNER, INNER + 1])
def test_long_vectors_of_the_largest_limbs(count: int) -> None:
    """At 2^21 entries float64 sums come next to 2^53; longer vectors are added up in parts."""
    largest, top = from_ints([P - 1], (1, 1)), P - (1 << 16)  # limbs of 2^16 - 1, but for the first or the last
    x, y = (np.broadcast_to(each, (2, 1, count)) for each in (largest, from_ints([top], (1, 1))))
    v = np.broadcast_to(np.int64((1 << 63) - 1), (1, count))
    w = np.broadcast_to(np.int64(-1), (1, count))
    found = fp.dots([x, v], [y, w], [(0, 0), (0, 1), (1, 0), (1, 1)])
    products = [-top, 1, ((1 << 63) - 1) * top, 1 - (1 << 63)]
    assert found == [[count * each % P] for each in products]


def test_a_workspace_is_used_again() -> None:
    space = Workspace()
    for batch, count in ((2, 600), (1, 5), (2, 600), (3, 700)):
        left = [integers((batch, count), 1), elements((batch, count), 2)]
        right = [elements((batch, count), 3), integers((batch, count), 4)]
        check(left, right, [(0, 0), (1, 0), (0, 1)], space)
        held = space.held_bytes
        check(right, right, [(0, 0), (1, 0)], space)
        assert space.held_bytes == held


def test_refusals() -> None:
    t, x = np.zeros((2, 3), dtype=np.int64), np.zeros((2, 2, 3), dtype=np.uint64)
    long = np.broadcast_to(np.int64(0), (1, MAX_INNER + 1))
    refusals: list[tuple[str, Callable[[], object]]] = [
        (
            r"fp\.dots: expected batches of vectors of one shape, got \(2, 3\), \(2, 2\)",
            lambda: fp.dots([x], [t[:, :2]], [(0, 0)]),
        ),
        (
            r"fp\.dots: expected batches of vectors of one shape, got \(3,\), \(3,\)",
            lambda: fp.dots([t[0]], [t[0]], []),
        ),
        (r"fp\.dots: expected int64, got float64\[2, 3\]", lambda: fp.dots([t.astype(float)], [t], [])),  # type: ignore[list-item]
        (r"fp\.dots: expected uint64 of shape \(2, \.\.\.\), got uint64\[3, 2\]", lambda: fp.dots([x[0].T], [t], [])),
        (
            r"fp\.dots: vectors of 134217729 entries, 134217728 at most; cut them into parts",
            lambda: fp.dots([long], [long], [(0, 0)]),
        ),
    ]
    for text, act in refusals:
        with pytest.raises(LocalError, match=text):
            act()
    with pytest.raises(IndexError):
        fp.dots([t], [t], [(1, 0)])
    with pytest.raises(IndexError):
        fp.dots([t], [t], [(0, 1)])
