"""F_p against Python's integers, entry by entry: laws, edges, shapes, views, refusals, golden values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_fp import from_ints, to_ints
from sordino_common.errors import LocalError
from sordino_common.ring import fp
from sordino_common.ring.fp import P
from sordino_common.ring.fp_core import canonical, fold_rows, new
from sordino_common.ring.fp_elementwise import BLOCK
from sordino_common.ring.prg import Seed, expand_ring

EDGES = [0, 1, P - 1, P - 2, 1 << 63, P - (1 << 63), (1 << 64) - 1, 1 << 64, P - (1 << 64), 1 << 126, (1 << 32) - 1]
EDGES += [((1 << 32) - 1) << shift & P for shift in (32, 64, 96)]
INT_EDGES = [0, 1, -1, 2, 1 << 31, -(1 << 31), (1 << 32) - 1, 1 << 32, -(1 << 32), 1 << 62, (1 << 63) - 1, -(1 << 63)]

ELEMENT = st.one_of(st.sampled_from(EDGES), st.integers(0, P - 1))
INT64 = st.one_of(st.sampled_from(INT_EDGES), st.integers(-(1 << 63), (1 << 63) - 1))
LAWS = settings(deadline=None, derandomize=True, max_examples=80)


def field(values: list[int]) -> fp.Fp:
    return from_ints(values, (len(values),))


def ints(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def every_pair(left: list[int], right: list[int]) -> tuple[list[int], list[int]]:
    return [a for a in left for _ in right], [b for _ in left for b in right]


def is_exactly(a: fp.Fp, expected: list[int]) -> None:
    """Canonical, and equal to `expected` mod p."""
    assert to_ints(a) == [value % P for value in expected]


@LAWS
@given(st.lists(st.tuples(ELEMENT, ELEMENT, ELEMENT), max_size=6), ELEMENT, ELEMENT)
def test_field_axioms(rows: list[tuple[int, int, int]], alpha: int, beta: int) -> None:
    a, b, c = (field([row[k] for row in rows]) for k in range(3))
    zero = field([0] * len(rows))
    same = np.array_equal
    assert same(fp.add(a, b), fp.add(b, a))
    assert same(fp.add(fp.add(a, b), c), fp.add(a, fp.add(b, c)))
    assert same(fp.add(a, zero), a) and same(fp.sub(a, a), zero)
    assert same(fp.sub(a, b), fp.add(a, fp.sub(zero, b)))
    assert same(fp.scale_fp(alpha, fp.add(a, b)), fp.add(fp.scale_fp(alpha, a), fp.scale_fp(alpha, b)))
    assert same(fp.scale_fp(alpha, fp.scale_fp(beta, a)), fp.scale_fp(alpha * beta % P, a))
    assert same(fp.add(fp.scale_fp(alpha, a), fp.scale_fp(beta, a)), fp.scale_fp((alpha + beta) % P, a))
    assert same(fp.scale_fp(1, a), a) and same(fp.scale_fp(0, a), zero)
    inverse = pow(alpha, P - 2, P)
    assert same(fp.scale_fp(inverse, fp.scale_fp(alpha, a)), a if alpha else zero)


@LAWS
@given(st.lists(st.tuples(ELEMENT, INT64, st.integers(0, (1 << 64) - 1)), max_size=6), ELEMENT)
def test_products_by_integers(rows: list[tuple[int, int, int]], alpha: int) -> None:
    a, v = field([row[0] for row in rows]), ints([row[1] for row in rows])
    u = np.array([row[2] for row in rows], dtype=np.uint64)
    is_exactly(fp.mul_int64(a, v), [x * y for x, y, _ in rows])
    is_exactly(fp.mul_exact(v, u.view(np.int64)), [x * (y - (y >> 63 << 64)) for _, x, y in rows])
    is_exactly(fp.scale(alpha, v), [alpha * y for _, y, _ in rows])
    is_exactly(fp.scale_fp(alpha, a), [alpha * x for x, _, _ in rows])


def test_every_pair_of_edges() -> None:
    x, y = every_pair(EDGES, EDGES)
    a, b = field(x), field(y)
    is_exactly(fp.add(a, b), [p + q for p, q in zip(x, y, strict=True)])
    is_exactly(fp.sub(a, b), [p - q for p, q in zip(x, y, strict=True)])
    x, y = every_pair(EDGES, INT_EDGES)
    is_exactly(fp.mul_int64(field(x), ints(y)), [p * q for p, q in zip(x, y, strict=True)])
    x, y = every_pair(INT_EDGES, INT_EDGES)
    is_exactly(fp.mul_exact(ints(x), ints(y)), [p * q for p, q in zip(x, y, strict=True)])
    for alpha in EDGES:
        is_exactly(fp.scale(alpha, ints(INT_EDGES)), [alpha * value for value in INT_EDGES])
        is_exactly(fp.scale_fp(alpha, field(EDGES)), [alpha * value for value in EDGES])


@pytest.mark.parametrize("size", [0, 1, 2047, 2048, 2049, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7])
def test_sizes_around_the_blocks(size: int) -> None:
    rng = np.random.default_rng(size)
    v = rng.integers(-(1 << 63), (1 << 63) - 1, size, endpoint=True)
    a = fp.expand_fp(Seed(bytes(32)), b"blocks", (size,))
    x, y = to_ints(a), v.tolist()
    is_exactly(fp.mul_int64(a, v), [p * q for p, q in zip(x, y, strict=True)])
    is_exactly(fp.scale(P - 12345, v), [(P - 12345) * q for q in y])
    is_exactly(fp.mul_exact(v, v[::-1]), [p * q for p, q in zip(y, y[::-1], strict=True)])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3, 4)])
def test_shapes(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    v = np.asarray(rng.integers(-9, 9, shape))
    values = v.ravel().tolist()
    a = from_ints(values, shape)
    for result in (fp.add(a, a), fp.scale(2, v), fp.scale_fp(2, a), fp.mul_int64(a, np.full_like(v, 2))):
        assert result.shape == (2, *shape)
        is_exactly(result, [2 * value for value in values])
    is_exactly(fp.sub(a, from_ints([value + 1 for value in values], shape)), [-1] * len(values))
    assert fp.mul_exact(v, v).shape == (2, *shape)
    is_exactly(fp.mul_exact(v, v), [value * value for value in values])


def test_views_of_the_logical_shape() -> None:
    """Operands that are permuted, expanded, reversed or strided, as views of wires are."""
    rng = np.random.default_rng(2)
    a = from_ints([int.from_bytes(rng.bytes(15)) for _ in range(24)], (4, 6))
    v = rng.integers(-(1 << 63), 1 << 62, (4, 6))
    both: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda x: x.swapaxes(-1, -2),
        lambda x: np.broadcast_to(x[..., :1, :], (*x.shape[:-2], 5, 6)),
        lambda x: x[..., ::-1, ::2],
    ]
    for view in both:
        seen, seen_v = view(a), view(v)
        x, y = to_ints(seen), seen_v.ravel().tolist()
        is_exactly(fp.mul_int64(seen, seen_v), [p * q for p, q in zip(x, y, strict=True)])
        is_exactly(fp.add(seen, seen), [2 * p for p in x])
        is_exactly(fp.sub(seen, from_ints(y, seen_v.shape)), [p - q for p, q in zip(x, y, strict=True)])
        is_exactly(fp.scale(77, seen_v), [77 * q for q in y])


@LAWS
@given(st.sampled_from([(16, 8), (21, 5), (21, 7), (22, 6), (32, 4)]), st.data())
def test_rows_of_limb_sums_fold(grid: tuple[int, int], data: st.DataObject) -> None:
    bits, count = grid
    bound = (1 << 62) - 1
    rows = [data.draw(st.one_of(st.integers(-bound, bound), st.integers(-3, 3))) for _ in range(count)]
    folded = fold_rows(np.array(rows, dtype=np.int64).reshape(count, 1), bits, new((1,)))
    is_exactly(folded, [sum(row << bits * j for j, row in enumerate(rows))])


def test_what_is_hardly_canonical_is_mended() -> None:
    values = [-(1 << 63), -1, 0, P - 1, P, P + 1, 1 << 127, (1 << 127) + (1 << 64), 5]
    low = np.array([value % (1 << 64) for value in values], dtype=np.uint64)
    high = np.array([value % (1 << 128) >> 64 for value in values], dtype=np.uint64)
    canonical(low, high)
    is_exactly(np.stack((low, high)), values)


def test_expansion() -> None:
    seed = Seed(bytes(range(32)))
    a = fp.expand_fp(seed, b"x", (3, 5))
    assert np.array_equal(a, fp.expand_fp(seed, b"x", (3, 5)))
    assert not np.array_equal(a, fp.expand_fp(seed, b"y", (3, 5)))
    words = expand_ring(seed, b"x", (2, 3, 5)).view(np.uint64)  # planar: low words first, then high words less a bit
    assert np.array_equal(a[0], words[0]) and np.array_equal(a[1], words[1] & np.uint64((1 << 63) - 1))
    assert fp.expand_fp(seed, b"x", (0, 3)).shape == (2, 0, 3)
    big = fp.expand_fp(seed, b"z", (1 << 16,))
    assert big[1].max() < 1 << 63 and len(np.unique(big[0])) == 1 << 16
    top = np.bincount((big[1] >> np.uint64(55)).astype(np.int64), minlength=256)
    assert float(((top - 256.0) ** 2 / 256.0).sum()) < 386.0  # chi-square, 255 degrees; false alarm 1e-6


def test_golden_values() -> None:
    """Words' order, sign convention, layout of the stream; `make_fp.py` made them without this code."""
    golden = json.loads((Path(__file__).parent.parent / "vectors" / "fp.json").read_text())
    seed = Seed(bytes.fromhex(golden["seed"]))
    a = fp.expand_fp(seed, b"fp golden", (4,))
    assert [f"{value:032x}" for value in to_ints(a)] == golden["expanded"]
    v = ints(golden["integers"])
    assert [f"{value:032x}" for value in to_ints(fp.mul_int64(a, v))] == golden["times_integers"]
    ((square_norm,),) = fp.dots([a[:, None]], [a[:, None]], [(0, 0)])
    assert f"{square_norm:032x}" == golden["square_norm"]
    assert a.astype("<u8").tobytes().hex() == golden["bytes"]
    many, more = (fp.expand_fp(seed, info, (1, 10_000)) for info in (b"many", b"more"))
    ((inner_product,),) = fp.dots([many], [more], [(0, 0)])
    assert f"{inner_product:032x}" == golden["inner_product"]
    multiples = fp.scale_fp(int(golden["expanded"][0], 16), many)
    assert hashlib.sha256(multiples.astype("<u8").tobytes()).hexdigest() == golden["sha256_of_multiples"]


def test_refusals() -> None:
    a, v = np.zeros((2, 3), dtype=np.uint64), np.zeros(3, dtype=np.int64)
    refusals: list[tuple[str, Callable[[], object]]] = [
        (
            r"fp\.add: expected uint64 of shape \(2, \.\.\.\), got uint64\[3, 2\]",
            lambda: fp.add(np.zeros((3, 2), np.uint64), a),
        ),
        (r"fp\.sub: expected uint64 of shape \(2, \.\.\.\), got int64\[2, 3\]", lambda: fp.sub(a.view(np.int64), a)),  # type: ignore[arg-type]
        (r"fp\.add: shapes \(3,\) and \(2,\) differ", lambda: fp.add(a, a[:, :2])),
        (r"fp\.mul_int64: expected int64, got uint64\[3\]", lambda: fp.mul_int64(a, v.view(np.uint64))),  # type: ignore[arg-type]
        (r"fp\.mul_int64: shapes \(3,\) and \(1,\) differ", lambda: fp.mul_int64(a, v[:1])),
        (r"fp\.mul_exact: shapes \(3,\) and \(2,\) differ", lambda: fp.mul_exact(v, v[:2])),
        (r"fp\.scale: the scalar is not in 0\.\.p-1", lambda: fp.scale(P, v)),
        (r"fp\.scale_fp: the scalar is not in 0\.\.p-1", lambda: fp.scale_fp(-1, a)),
        (r"fp\.scale: expected int64, got int32\[3\]", lambda: fp.scale(1, v.astype(np.int32))),  # type: ignore[arg-type]
    ]
    for text, act in refusals:
        with pytest.raises(LocalError, match=text):
            act()
