"""Z_2^64 against Python's integers, at the edges; expansion against RFC 8439; sharing as laws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sordino_common.errors import LocalError
from sordino_common.ring.fixed import decode_fixed, encode_fixed
from sordino_common.ring.limbs import Workspace, split_wrapping
from sordino_common.ring.matmul import COSTS, Costs, choose_backend, costs_here, matmul, matmul_calls, measure_costs
from sordino_common.ring.prg import Seed, expand_ring, label
from sordino_common.ring.sharing import correction, reconstruct

NO_GEMM = Costs(
    direct=1.0, far=1.0, turn=4.0, dots=0.5, dots_join=1.0, dots_fixed=10.0, gemm=9.0, split=99.0, join=1.0, fixed=1.0
)
EDGES = [0, 1, -1, 2, -2, 1 << 21, -(1 << 21), (1 << 21) - 1, 1 << 43, (1 << 62), (1 << 63) - 1, -(1 << 63)]


def oracle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b with Python integers, reduced to signed 64 bits."""
    exact = a.astype(object) @ b.astype(object) if a.shape[1] else np.zeros((a.shape[0], b.shape[1]), dtype=object)
    return ((exact + (1 << 63)) % (1 << 64) - (1 << 63)).astype(np.int64)


@pytest.mark.parametrize("backend", ["direct", "dots", "outer", "limbs", None])
@pytest.mark.parametrize("inner", [0, 1, 2, 511, 512, 513, 1025])
@pytest.mark.parametrize("values", ["edges", "uniform", "lowest", "ones"])
def test_matmul_is_exact(backend: str, inner: int, values: str) -> None:
    rng = np.random.default_rng(inner)
    shape_a, shape_b = (3, inner), (inner, 4)
    make = {
        "edges": lambda shape: rng.choice(np.array(EDGES, dtype=np.int64), shape),
        "uniform": lambda shape: rng.integers(-(1 << 63), (1 << 63) - 1, shape, endpoint=True),
        "lowest": lambda shape: np.full(shape, -(1 << 63), dtype=np.int64),
        "ones": lambda shape: np.full(shape, -1, dtype=np.int64),
    }[values]
    a, b = make(shape_a), make(shape_b)
    assert np.array_equal(matmul(a, b, backend=backend), oracle(a, b))  # type: ignore[arg-type]


def test_the_worst_case_for_float64_accumulation() -> None:
    # every low limb at its largest size and of one sign: the diagonal sums reach 3 * 512 * 2^42 < 2^53
    half = 1 << 21
    worst = np.int64(-half - (half << 22))
    a, b = np.full((1, 512), worst), np.full((512, 1), worst)
    assert np.array_equal(matmul(a, b, backend="limbs"), oracle(a, b))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=30))
def test_limbs_join_to_what_was_split(values: list[int]) -> None:
    x = np.array(values, dtype=np.int64)
    limbs = (np.empty(x.shape), np.empty(x.shape), np.empty(x.shape))
    split_wrapping(x, limbs, np.empty_like(x), np.empty_like(x))
    x0, x1, x2 = (limb.astype(np.int64) for limb in limbs)
    assert np.array_equal(x0 + (x1 << np.int64(22)) + (x2 << np.int64(44)), x)
    assert np.all(np.abs(x0) <= 1 << 21) and np.all(np.abs(x1) <= 1 << 21) and np.all(np.abs(x2) <= 1 << 19)


def test_batched_products_and_refusals() -> None:
    rng = np.random.default_rng(1)
    a = rng.integers(-(1 << 63), 1 << 62, (2, 1, 5, 6))
    b = rng.integers(-(1 << 63), 1 << 62, (3, 6, 2))
    assert np.array_equal(matmul(a, b, backend="limbs"), np.matmul(a, b))
    with pytest.raises(LocalError, match=r"shapes \(2, 3\) and \(2, 3\) do not fit"):
        matmul(np.zeros((2, 3), dtype=np.int64), np.zeros((2, 3), dtype=np.int64))
    with pytest.raises(LocalError, match="expected int64 operands, got float64"):
        matmul(np.zeros((2, 2)), np.zeros((2, 2)))  # type: ignore[arg-type]


def test_results_go_where_they_are_wanted() -> None:
    rng = np.random.default_rng(2)
    workspace = Workspace()
    for rows, inner, columns in ((3, 700, 4), (1, 1, 1), (0, 5, 2), (3, 0, 4), (3, 700, 4)):
        a = rng.integers(-(1 << 63), 1 << 62, (rows, inner))
        b = rng.integers(-(1 << 63), 1 << 62, (columns, inner)).T  # a view
        for backend in ("direct", "dots", "limbs"):
            out = np.full((rows, columns), 7)
            assert matmul(a, b, backend=backend, out=out, workspace=workspace) is out  # type: ignore[arg-type]
            assert np.array_equal(out, oracle(a, b))
    held = workspace.held_bytes
    matmul(a, b, backend="limbs", workspace=workspace)
    assert workspace.held_bytes == held > 0
    with pytest.raises(LocalError, match=r"`out` must be C-contiguous int64\[3, 4\], got int64\[4, 3\]"):
        matmul(a, b, out=np.zeros((4, 3), dtype=np.int64))
    with pytest.raises(LocalError, match=r"batch dimensions of \(2, 1, 1\) and \(3, 1, 1\) do not fit"):
        matmul(np.zeros((2, 1, 1), dtype=np.int64), np.zeros((3, 1, 1), dtype=np.int64))


def test_the_choice_follows_the_costs() -> None:
    assert costs_here() in COSTS.values()
    x86 = COSTS["x86_64"]
    assert choose_backend(32, 1, 64, costs=x86) == "outer"
    assert choose_backend(32, 4, 2, costs=x86) == "direct"
    assert choose_backend(16, 784, 16, costs=x86) == "dots"
    assert choose_backend(128, 784, 128, costs=x86) == "limbs"
    assert choose_backend(2, 3, 2, costs=x86) == "direct"
    # a batch is one product as far as calls go
    assert choose_backend(2, 64, 2, batch=64, costs=x86, b_turned=True) == "dots"
    assert choose_backend(512, 512, 512, costs=NO_GEMM) == "dots"


def test_the_choice_counts_what_has_to_be_transposed() -> None:
    x86 = COSTS["x86_64"]
    assert choose_backend(1, 512, 512, costs=x86) == "direct"
    assert choose_backend(1, 512, 512, costs=x86, b_turned=True) == "dots"
    assert choose_backend(4, 512, 512, costs=x86) == "dots"  # each row of A has its part of it
    assert choose_backend(100, 10, 20, costs=NO_GEMM) == "dots"
    assert choose_backend(100, 10, 20, costs=NO_GEMM, a_turned=True) == "dots"
    assert choose_backend(100, 10, 6, costs=NO_GEMM, a_turned=True) == "direct"  # the copy of A is for six columns only
    assert choose_backend(512, 512, 1, costs=x86, a_turned=True, b_turned=True) == "dots"  # as A lies
    assert choose_backend(25, 18_432, 8, costs=x86, a_turned=True) == "dots"  # both would be walked down their columns


@pytest.mark.parametrize(("inner", "columns", "chosen"), [(64, 64, "direct"), (128, 64, "dots"), (128, 65, "direct")])
def test_the_choice_knows_what_collides_in_a_cache(inner: int, columns: int, chosen: str) -> None:
    """64 lines that are 512 bytes apart stay; of more each pass over B meets none, and `dots` has one pass only."""
    assert choose_backend(8, inner, columns, costs=replace(NO_GEMM, far=3.0)) == chosen


def test_costs_are_measured_with_a_clock_that_is_given() -> None:
    ticks = iter(range(1_000_000))
    costs = measure_costs(lambda: next(ticks) * 1e-6)  # every run takes 1,000 ns by this clock
    assert costs.fixed == pytest.approx(1000.0)
    assert costs.direct == pytest.approx(1000.0 / (32 * 64 * 32))
    assert costs.split == costs.join == 0.0
    assert costs.dots == pytest.approx(0.0, abs=1e-9)


def test_expansion_is_deterministic_and_bound_to_its_info() -> None:
    seed = Seed(bytes(range(32)))
    a = expand_ring(seed, label("s", 1, b"x"), (1000,))
    assert np.array_equal(a, expand_ring(seed, label("s", 1, b"x"), (1000,)))
    assert not np.array_equal(a, expand_ring(seed, label("s", 2, b"x"), (1000,)))
    assert np.array_equal(a[:10], expand_ring(seed, label("s", 1, b"x"), (10,)))
    big = expand_ring(seed, b"", (100_000,))  # crosses the chunk of 2^18 bytes
    assert np.array_equal(big[:32_768], expand_ring(seed, b"", (32_768,)))
    assert expand_ring(seed, b"", (0, 3)).shape == (0, 3)
    assert len(np.unique(big)) == big.size  # a collision has chance 3e-10


def test_labels_of_parts_are_joined_labels() -> None:
    assert label("a", 7, b"c", -1) == label("a", 7) + label(b"c", -1)


@pytest.mark.parametrize("backend", ["direct", "dots", "limbs", None])
@pytest.mark.parametrize("turned", [False, True])
def test_calls_multiply_what_the_operands_hold_then(backend: str, turned: bool) -> None:
    """Again and again, and whichever way the operands lie in memory; what copies them may lose it in between."""
    rng = np.random.default_rng(3)
    a, b = (np.empty((3, 5), dtype=np.int64).T, np.empty((4, 3), dtype=np.int64).T) if turned else (
        np.empty((5, 3), dtype=np.int64), np.empty((3, 4), dtype=np.int64)
    )  # fmt: skip
    out, memory = np.empty((5, 4), dtype=np.int64), np.empty((2, 15), dtype=np.int64)

    def room(number: int, shape: tuple[int, ...]) -> np.ndarray:
        return memory[number, : shape[0] * shape[1]].reshape(shape)

    calls = matmul_calls(a, b, out, backend=backend, room=room)  # type: ignore[arg-type]
    for _ in range(3):
        for array in (a, b):
            array[...] = rng.integers(-(1 << 63), (1 << 63) - 1, array.shape, endpoint=True)
        memory[...] = -1
        for call in calls:
            call()
        assert np.array_equal(out, oracle(a, b))


@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize("lie", ["rows", "columns", "every other", "backwards"])
@pytest.mark.parametrize("backend", ["direct", "dots"])
def test_only_dots_copies_and_only_what_does_not_lie_as_it_needs_it(backend: str, lie: str, columns: int) -> None:
    rng = np.random.default_rng(4)
    make = {
        "rows": lambda shape: rng.integers(-(1 << 63), 1 << 62, shape),
        "columns": lambda shape: rng.integers(-(1 << 63), 1 << 62, shape[::-1]).T,
        "every other": lambda shape: rng.integers(-(1 << 63), 1 << 62, (2 * shape[0], 2 * shape[1]))[::2, ::2],
        "backwards": lambda shape: rng.integers(-(1 << 63), 1 << 62, shape)[::-1, ::-1],
    }[lie]
    a, b, out = make((3, 70)), make((70, columns)), np.empty((3, columns), dtype=np.int64)
    calls = matmul_calls(a, b, out, backend=backend)  # type: ignore[arg-type]
    copies_a = columns > 1 and lie != "rows"
    copies_b = lie != "columns" and (lie != "rows" or columns > 1)  # a single column is a row
    assert len(calls) == 1 + (copies_a + copies_b if backend == "dots" else 0)
    for call in calls:
        call()
    assert np.array_equal(out, oracle(a, b))


def test_scratch_memory_is_of_its_slot_and_only_as_much_as_was_needed() -> None:
    space = Workspace()
    small = space.floats("a", (2, 3))
    assert space.floats("a", (2, 3)) is small and space.integers("b", (5,)).dtype == np.int64
    large = space.floats("a", (10, 10))
    assert space.held_bytes == 840
    again = space.floats("a", (2, 3))  # of the slot as it is now
    assert again is not small and np.shares_memory(again, large) and not np.shares_memory(again, small)
    for size in range(1, 400):  # many shapes: views are dropped, memory is not
        assert space.integers("b", (size,)).shape == (size,)
    assert space.held_bytes == 800 + 8 * 399
    assert len(space._integers) + len(space._floats) <= 256


def test_labels_do_not_collide() -> None:
    labels = [
        label("ab", "c"),
        label("a", "bc"),
        label("abc"),
        label(b"abc"),
        label("ab", b"c"),
        label(1),
        label("\x01"),
        label(1, 1),
        label(257),
    ]
    assert len(set(labels)) == len(labels)


def test_a_seed_shows_and_compares_nothing() -> None:
    seed = Seed(b"\x07" * 32)
    assert "7" not in repr(seed).replace("32", "")
    for act in (lambda: seed == seed, lambda: bool(seed), lambda: hash(seed)):
        with pytest.raises(TypeError):
            act()
    with pytest.raises(LocalError, match="expected 32 bytes, got 31"):
        Seed(bytes(31))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(1, 5), st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=8))
def test_shares_sum_to_the_secret(parties: int, values: list[int]) -> None:
    x = np.array(values, dtype=np.int64)
    seeds = [Seed(bytes([party]) * 32) for party in range(parties - 1)]
    shares = [expand_ring(seed, b"t", x.shape) for seed in seeds] + [correction(x, seeds, b"t")]
    assert np.array_equal(reconstruct(shares), x)


def test_a_correction_is_uniform() -> None:
    """Chi-square over the top byte of 2^16 corrections of a constant; false alarm 1e-6 (255 degrees: 386)."""
    x = np.full(1 << 16, 42, dtype=np.int64)
    top = correction(x, [Seed(b"\x05" * 32)], b"u").view(np.uint64) >> np.uint64(56)
    counts = np.bincount(top.astype(np.int64), minlength=256)
    assert float(((counts - 256.0) ** 2 / 256.0).sum()) < 386.0


def test_fixed_point() -> None:
    values = np.array([0.0, 1.0, -1.0, 2.0**-15, 3 * 2.0**-15, 1e6, -123.456])
    encoded = encode_fixed(values)
    assert encoded.tolist()[:5] == [0, 1 << 14, -(1 << 14), 0, 2]  # ties to even
    assert np.all(np.abs(decode_fixed(encoded) - values) <= 2.0**-15)
    for bad in (np.nan, np.inf, 2.0**48, -(2.0**48)):
        with pytest.raises(LocalError, match="not finite or not below"):
            encode_fixed(np.array([bad]))
    with pytest.raises(LocalError, match=r"0\.\.40, got 41"):
        encode_fixed(values, 41)
