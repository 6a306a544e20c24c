"""F_p's inner products and matrix products against Python's integers: edges, inner dimensions, batches, views."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sordino_common.errors import LocalError
from sordino_common.ring import fp
from sordino_common.ring.fp import P
from sordino_common.ring.fp_linear import DOT_BLOCK, MAX_INNER
from sordino_common.ring.limbs import Workspace

EDGES = [0, 1, P - 1, 1 << 63, P - (1 << 63), (1 << 64) - 1, 1 << 126, (1 << 105) - 1, (1 << 112) - 1]
INT_EDGES = np.array([0, 1, -1, 1 << 62, -(1 << 63), (1 << 63) - 1, (1 << 48) - 1, 1 << 21], dtype=np.int64)
INNERS = [0, 1, 2, 341, 511, 512, 513, 1025, 2047, 2048, 2049]


def integers(shape: tuple[int, ...], seed: int = 0, *, kind: str = "mixed") -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "lowest":
        return np.full(shape, -(1 << 63), dtype=np.int64)
    if kind == "ones":
        return np.full(shape, -1, dtype=np.int64)
    drawn = rng.integers(-(1 << 63), (1 << 63) - 1, shape, endpoint=True)
    return np.where(rng.random(shape) < 0.4, drawn, rng.choice(INT_EDGES, shape))


def elements(shape: tuple[int, ...], seed: int = 0, *, kind: str = "mixed") -> fp.Fp:
    rng, size = np.random.default_rng(seed), int(np.prod(shape))
    if kind != "mixed":
        return fp.from_ints([P - 1 if kind == "lowest" else (1 << 126) - 1] * size, shape)
    drawn = [int.from_bytes(rng.bytes(16), "little") % P for _ in range(size)]
    return fp.from_ints([EDGES[k % len(EDGES)] if rng.random() < 0.4 else x for k, x in enumerate(drawn)], shape)


def residues(a: np.ndarray) -> np.ndarray:
    """Python integers in the logical shape; int64 arrays as they are."""
    if a.dtype == np.int64:
        return a.astype(object)
    return np.array(fp.to_ints(a), dtype=object).reshape(a.shape[1:])


def same(a: fp.Fp, exact: np.ndarray) -> bool:
    return a.shape[1:] == exact.shape and fp.to_ints(a) == [int(value) % P for value in exact.ravel()]


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (residues(a)[..., :, :, None] * residues(b)[..., None, :, :]).sum(axis=-2)


def times_vector(t: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (residues(t) * residues(v)[..., None, :]).sum(axis=-1)


def inner_product(v: np.ndarray, w: np.ndarray) -> int:
    return int((residues(v) * residues(w)).sum()) % P


def coefficients(shape: tuple[int, ...], seed: int = 0, *, kind: str = "mixed") -> np.ndarray:
    """Numbers of 63 bits."""
    return integers(shape, seed, kind=kind) & np.int64((1 << 63) - 1)


def check_mat_vecs(jobs: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """(A, B, v): all of them in one call, as a check does it."""
    workspace = Workspace()
    flat = np.concatenate([v.reshape(-1) for _, _, v in jobs])
    table, made, start = fp.vectors(flat), [], 0
    for a, b, v in jobs:
        made.append((a, b, table[:, start : start + v.size].reshape(len(table), *v.shape, table.shape[-1])))
        start += v.size
    for _ in range(2):
        of_a, of_b = fp.mat_vecs(made, workspace=workspace)
        for got, which in ((of_a, 0), (of_b, 1)):
            expected = [times_vector(job[which], job[2]).reshape(-1) for job in jobs]
            assert same(got, np.concatenate(expected))


@pytest.mark.parametrize("kind", ["mixed", "lowest", "ones"])
@pytest.mark.parametrize("inner", INNERS)
def test_all_products_at_inner_dimensions(inner: int, kind: str) -> None:
    a, b = integers((2, inner), 1, kind=kind), integers((inner, 3), 2, kind=kind)
    x, y = elements((2, inner), 3, kind=kind), elements((inner, 3), 4, kind=kind)
    v, w = elements((inner,), 5, kind=kind), elements((inner,), 6, kind=kind)
    ring, exact = fp.matmul_exact(a, b)
    assert same(exact, product(a, b)) and np.array_equal(ring, np.matmul(a, b))
    assert same(fp.matmul_int64(a, y), product(a, y))
    assert same(fp.matmul_fp(x, b), product(x, b))
    assert same(fp.mat_vec(a, v), times_vector(a, v)) and same(fp.mat_vec_fp(x, v), times_vector(x, v))
    numbers = [v, w, a[0], b[:, 0]]
    for left in numbers:
        assert fp.dots(left, numbers) == [inner_product(left, right) for right in numbers]
    check_mat_vecs([(x, a, coefficients((inner,), 7, kind=kind)), (y.swapaxes(1, 2), b.T, coefficients((inner,), 8))])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.integers(0, 5),
    st.integers(0, 6),
    st.integers(0, 5),
    st.sampled_from([(), (2,), (0,), (2, 3)]),
    st.integers(0, 99),
)
def test_batches(rows: int, inner: int, columns: int, batch: tuple[int, ...], seed: int) -> None:
    a, x = integers((*batch, rows, inner), seed), elements((*batch, rows, inner), seed + 1)
    b, y = integers((*batch, inner, columns), seed + 2), elements((*batch, inner, columns), seed + 3)
    assert same(fp.matmul_int64(a, y), product(a, y)) and same(fp.matmul_fp(x, b), product(x, b))
    assert same(fp.matmul_exact(a, b)[1], product(a, b))
    shared = integers((inner, columns), seed + 4)
    assert same(fp.matmul_exact(a, shared)[1], product(a, shared))
    assert same(fp.matmul_fp(x, shared), product(x, shared))
    assert same(fp.matmul_int64(a, elements(shared.shape, 3)), product(a, elements(shared.shape, 3)))
    for v in (elements((inner,), seed + 5), elements((*batch, inner), seed + 6)):
        assert same(fp.mat_vec(a, v), times_vector(a, v)) and same(fp.mat_vec_fp(x, v), times_vector(x, v))
    one, own = coefficients((inner,), seed + 7), coefficients((*batch, inner), seed + 8)
    check_mat_vecs([(x, a, one), (y.swapaxes(-1, -2), b.swapaxes(-1, -2), own), (x, a, own)])


def test_views() -> None:
    """Operands of gates are often permuted or expanded views."""
    a, x = integers((6, 5), 1), elements((6, 5), 2)
    v, w, c = elements((6,), 3), elements((5,), 4), coefficients((6,), 5)
    views: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda t: t.swapaxes(-1, -2),
        lambda t: t[..., ::-1, ::-1].swapaxes(-1, -2),
        lambda t: np.broadcast_to(t[..., :1], (*t.shape[:-1], 5)).swapaxes(-1, -2),
    ]
    for view in views:
        assert same(fp.mat_vec(view(a), v), times_vector(view(a), v))
        assert same(fp.mat_vec_fp(view(x), v), times_vector(view(x), v))
        check_mat_vecs([(view(x), view(a), c)])
        assert same(fp.matmul_int64(view(a), x), product(view(a), x))
        assert same(fp.matmul_fp(view(x), a), product(view(x), a))
    assert same(fp.mat_vec(a, w[:, ::-1]), times_vector(a, w[:, ::-1]))
    assert fp.dots(w[:, ::-1], [w, a[0, ::-1]]) == [inner_product(w[:, ::-1], w), inner_product(w, a[0])]
    batch = np.broadcast_to(a, (3, 6, 5))
    assert same(fp.mat_vec(batch, w), times_vector(batch, w))


def test_many_rows_and_columns_cross_the_blocks() -> None:
    a, v = integers((700, 60), 7), elements((60,), 8)
    assert same(fp.mat_vec(a, v), times_vector(a, v))
    x, v = elements((40, 300), 10), elements((300,), 11)
    assert same(fp.mat_vec_fp(x, v), times_vector(x, v))


def test_many_matrices_cross_the_blocks() -> None:
    """Matrices that are split alone, by rows and by columns, and by batch; and many that are split together."""
    tall, wide = (40, 520), (3, 6000)
    jobs = [
        (elements(shape, k), integers(shape, k + 1), coefficients(shape[1:], k)) for k, shape in enumerate((tall, wide))
    ]
    batch = (9, 50, 40)
    jobs.append((elements(batch, 5), integers(batch, 6), coefficients((9, 40), 7)))
    jobs.append((elements(batch, 8), integers(batch, 9), coefficients((40,), 10)))
    jobs += [(elements((70, 30), k), integers((70, 30), k + 1), coefficients((30,), k)) for k in range(20, 32)]
    check_mat_vecs(jobs)
    many = elements((2 * DOT_BLOCK + 5,), 1)
    assert fp.dots(many, [many]) == [inner_product(many, many)]


def test_the_longest_inner_dimension() -> None:
    """Sums reach 2^53 - small there: every limb at its largest."""
    t = np.full((1, MAX_INNER), (1 << 63) - 1, dtype=np.int64)
    v = np.broadcast_to(fp.from_ints([P - 1], (1,)), (2, MAX_INNER))
    expected = [-MAX_INNER * ((1 << 63) - 1) % P]
    assert fp.to_ints(fp.mat_vec(t, v)) == expected
    assert fp.to_ints(fp.mat_vec_fp(v[:, None], v)) == [MAX_INNER] == fp.dots(v, [v])
    too_long = np.zeros((1, MAX_INNER + 1), dtype=np.int64)
    with pytest.raises(LocalError, match="inner dimension 131073 is over 131072; cut the product into parts"):
        fp.mat_vec(too_long, fp.zeros((MAX_INNER + 1,)))


def test_a_workspace_is_used_again() -> None:
    workspace = Workspace()
    for shape in ((3, 600, 4), (2, 5, 6), (3, 600, 4)):
        rows, inner, columns = shape
        a, b = integers((rows, inner), 1), integers((inner, columns), 2)
        kept = fp.matmul_exact(a, b, workspace=workspace)
        fp.matmul_exact(b.T, a.T, workspace=workspace)  # must not disturb what was returned
        assert same(kept[1], product(a, b)) and np.array_equal(kept[0], np.matmul(a, b))
    held = workspace.held_bytes
    fp.matmul_exact(integers((3, 600)), integers((600, 4)), workspace=workspace)
    assert workspace.held_bytes == held


def test_refusals() -> None:
    t, x = np.zeros((2, 3), dtype=np.int64), fp.zeros((2, 3))
    refusals: list[tuple[str, Callable[[], object]]] = [
        (
            r"fp\.dots: expected vectors of one length, got shapes \(2,\), \(3,\)",
            lambda: fp.dots(fp.zeros((2,)), [fp.zeros((3,))]),
        ),
        (r"fp\.dots: expected vectors of one length, got shapes \(2, 3\), \(2, 3\)", lambda: fp.dots(x, [t])),
        (r"fp\.dots: expected int64, got float64\[2, 3\]", lambda: fp.dots(t.astype(float), [t])),  # type: ignore[arg-type]
        (r"fp\.vectors: expected int64, got uint64", lambda: fp.vectors(x[0])),  # type: ignore[arg-type]
        (
            r"fp\.mat_vecs: a vector of shape \(2,\) does not fit matrices \(2, 3\), \(2, 3\)",
            lambda: fp.mat_vecs([(x, t, fp.vectors(t[:, 0]))]),
        ),
        (
            r"fp\.mat_vecs: a vector of shape \(3,\) does not fit matrices \(3, 2\), \(2, 3\)",
            lambda: fp.mat_vecs([(x.swapaxes(1, 2), t, fp.vectors(t[0]))]),
        ),
        (
            r"fp\.mat_vec: a vector of shape \(2,\) does not fit a matrix of shape \(2, 3\)",
            lambda: fp.mat_vec(t, fp.zeros((2,))),
        ),
        (r"fp\.mat_vec_fp: a vector of shape \(4, 3\) does not fit", lambda: fp.mat_vec_fp(x, fp.zeros((4, 3)))),
        (r"fp\.mat_vec: expected int64, got float64\[2, 3\]", lambda: fp.mat_vec(t.astype(float), fp.zeros((3,)))),
        (r"fp\.mat_vec: expected uint64 of shape", lambda: fp.mat_vec(t, t)),  # type: ignore[arg-type]
        (r"fp\.matmul_int64: shapes \(2, 3\) and \(2, 3\) do not fit", lambda: fp.matmul_int64(t, x)),
        (r"fp\.matmul_fp: shapes \(2, 3\) and \(2, 3\) do not fit", lambda: fp.matmul_fp(x, t)),
        (r"fp\.matmul_exact: expected int64 operands, got int64 and uint64", lambda: fp.matmul_exact(t, x[0].T)),  # type: ignore[arg-type]
        (
            r"fp\.matmul_exact: batch dimensions of \(2, 2, 3\) and \(3, 3, 1\) do not fit",
            lambda: fp.matmul_exact(np.zeros((2, 2, 3), dtype=np.int64), np.zeros((3, 3, 1), dtype=np.int64)),
        ),
    ]
    for text, act in refusals:
        with pytest.raises(LocalError, match=text):
            act()
