"""F_p's products of matrices by vectors against Python's integers: edges, batches, views, blocks, lengths, refusals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_fp import residues, same, to_ints
from sordino_common.errors import LocalError
from sordino_common.ring import fp
from sordino_common.ring.fp import P
from sordino_common.ring.fp_mat_vecs import INNER, MATRIX_BLOCK
from sordino_common.ring.limbs import Workspace

LARGEST = (1 << 63) - 1
INT_EDGES = np.array([0, 1, -1, 1 << 62, -(1 << 63), LARGEST, (1 << 32) - 1, 1 << 32, -(1 << 32)], dtype=np.int64)


def integers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn = rng.integers(-(1 << 63), LARGEST, shape, endpoint=True)
    return np.where(rng.random(shape) < 0.4, drawn, rng.choice(INT_EDGES, shape))


def coefficients(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Numbers of 63 bits."""
    return integers(shape, seed) & np.int64(LARGEST)


def product(a: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (residues(a) * residues(v)[..., None, :]).sum(axis=-1)


def run(jobs: list[tuple[np.ndarray, np.ndarray]], space: Workspace | None = None) -> fp.Fp:
    """(A, v): all of them in one call, as a check does it."""
    table, made, start = fp.vectors(np.concatenate([v.reshape(-1) for _, v in jobs])), [], 0
    for a, v in jobs:
        made.append((a, table[:, start : start + v.size].reshape(1, *v.shape, table.shape[-1])))
        start += v.size
    return fp.mat_vecs(made, workspace=space)


def check(jobs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    space = Workspace()
    for _ in range(2):
        assert same(run(jobs, space), np.concatenate([product(a, v).reshape(-1) for a, v in jobs]))


@pytest.mark.parametrize("inner", [0, 1, 2, 341, INNER - 1, INNER, INNER + 1, 2 * INNER + 3])
def test_inner_dimensions(inner: int) -> None:
    """Beside another matrix, whose product must not be touched when a wide one is multiplied in parts."""
    small = integers((3, 2), 1), coefficients((2,), 2)
    check([small, (integers((2, inner), 3), coefficients((inner,), 4)), small])
    check([small, (integers((inner, 2), 3).T, coefficients((inner,), 4)), small])


def test_every_limb_at_its_largest() -> None:
    v = np.full(INNER + 1, LARGEST)
    for value in (-(1 << 63), -1, LARGEST, -(1 << 32), (1 << 32) - 1):
        a = np.full((2, INNER + 1), value)
        assert to_ints(run([(a, v), (a[:, 1:], v[1:])])) == [
            count * value * LARGEST % P for count in (INNER + 1, INNER + 1, INNER, INNER)
        ]


def test_every_pair_of_edges() -> None:
    v = np.array([0, 1, 255, 256, (1 << 62) - 1, LARGEST])
    check([(np.repeat(INT_EDGES, len(v)).reshape(-1, 1, 1), np.tile(v, len(INT_EDGES)).reshape(-1, 1))])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.integers(0, 5),
    st.integers(0, 6),
    st.sampled_from([(), (2,), (0,), (2, 3)]),
    st.integers(0, 99),
)
def test_batches(rows: int, inner: int, batch: tuple[int, ...], seed: int) -> None:
    a, b = integers((*batch, rows, inner), seed), integers((*batch, inner, rows), seed + 1)
    one, own = coefficients((inner,), seed + 2), coefficients((*batch, inner), seed + 3)
    check([(a, one), (b.swapaxes(-1, -2), own), (a, own)])


def test_views() -> None:
    """Operands of gates are often permuted or expanded views."""
    a, v = integers((6, 5), 1), coefficients((6,), 2)
    views: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda t: t.swapaxes(-1, -2),
        lambda t: t[..., ::-1, ::-1].swapaxes(-1, -2),
        lambda t: np.broadcast_to(t[..., :1], (*t.shape[:-1], 5)).swapaxes(-1, -2),
    ]
    for view in views:
        check([(view(a), v)])
    assert same(fp.mat_vecs([(a.T, fp.vectors(v[::-1]))]), product(a.T, v[::-1]))
    table = fp.vectors(v)
    batch = integers((3, 5, 6), 3)
    shared = fp.mat_vecs([(batch, np.broadcast_to(table[:, np.newaxis], (1, 3, 6, table.shape[-1])))])
    assert same(shared, product(batch, v).reshape(-1))


def test_many_matrices_cross_the_blocks() -> None:
    """Matrices that are cast alone, by rows, by columns and by batch; and many that are cast together."""
    tall, wide = (MATRIX_BLOCK // 100, 130), (11, INNER)
    jobs = [(integers(shape, k), coefficients(shape[1:], k)) for k, shape in enumerate((tall, wide))]
    batch = (9, 50, MATRIX_BLOCK // 300)
    jobs.append((integers(batch, 6), coefficients((9, batch[2]), 7)))
    jobs.append((integers(batch, 9), coefficients(batch[2:], 10)))
    jobs += [(integers((70, 30), k), coefficients((30,), k)) for k in range(20, 40)]
    check(jobs)


def test_no_jobs() -> None:
    assert fp.mat_vecs([]).shape == (2, 0)
    assert fp.vectors(np.zeros(0, dtype=np.int64)).shape[:2] == (1, 0)


def test_a_workspace_is_used_again() -> None:
    space = Workspace()
    jobs = [(integers((3, 600), 1), coefficients((600,), 2))]
    kept = run(jobs, space)
    held = space.held_bytes
    run([(-jobs[0][0], jobs[0][1])], space)  # must not disturb what was returned
    assert same(kept, product(*jobs[0]))
    assert space.held_bytes == held


def test_refusals() -> None:
    t = np.zeros((2, 3), dtype=np.int64)
    refusals: list[tuple[str, Callable[[], object]]] = [
        (r"fp\.vectors: expected int64, got uint64\[3\]", lambda: fp.vectors(t[0].view(np.uint64))),  # type: ignore[arg-type]
        (
            r"fp\.vectors: expected numbers from 0 to 2\^63 - 1, got a negative one",
            lambda: fp.vectors(np.array([1, -1])),
        ),
        (
            r"fp\.mat_vecs: expected int64, got float64\[2, 3\]",
            lambda: fp.mat_vecs([(t.astype(float), fp.vectors(t[0]))]),
        ),  # type: ignore[list-item]
        (
            r"fp\.mat_vecs: a vector of shape \(2,\) does not fit a matrix \(2, 3\)",
            lambda: fp.mat_vecs([(t, fp.vectors(t[:, 0]))]),
        ),
        (
            r"fp\.mat_vecs: a vector of shape \(4, 3\) does not fit a matrix \(2, 2, 3\)",
            lambda: fp.mat_vecs([(np.stack((t, t)), fp.vectors(np.zeros(12, dtype=np.int64)).reshape(1, 4, 3, -1))]),
        ),
        (
            r"fp\.mat_vecs: a vector of shape \(3,\) does not fit a matrix \(3,\)",
            lambda: fp.mat_vecs([(t[0], fp.vectors(t[0]))]),
        ),
    ]
    for text, act in refusals:
        with pytest.raises(LocalError, match=text):
            act()
