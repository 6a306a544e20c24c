"""The clipped sum of a step of DP-SGD: exact integers, whatever a Plan or a row tries; the sample is Poisson."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from helpers_canary import RandomBytes, sampler_faults
from sordino_agent import private_sum
from sordino_agent.errors import BadCommand
from sordino_agent.private_sum import RowSum, batches_of, expected_batches, poisson_sample
from sordino_common.errors import LocalError
from sordino_common.plan.gradients import OuterRows, RowGradients, WholeRows
from sordino_common.privacy.mechanism import FULL_SAMPLING
from sordino_common.privacy.rows import row_bound

GRID = 12
F32 = NDArray[np.float32]


def gradients(rows: int = 4, *, outer: bool = True, whole: bool = True, rider: bool = False) -> RowGradients:
    """Up to three parameters: w [3, 2] as outer products, v [3] its bias that rides on them, b [5] whole."""
    blocks: list[OuterRows | WholeRows] = []
    place = 0
    if outer:
        blocks.append(OuterRows(name="w", shape=(3, 2), left=0, right=1))
        place = 2
    if rider:
        blocks.append(WholeRows(name="v", shape=(3,), output=0, rides=0))
    if whole:
        blocks.append(WholeRows(name="b", shape=(5,), output=place))
        place += 1
    return RowGradients(rows=rows, blocks=tuple(blocks), loss=place)


def outs_of(rows: Sequence[F32], plan: RowGradients) -> list[NDArray[Any]]:
    """Outputs of a run for B rows, each given as a flat vector of its factors and entries."""
    table = np.array(rows, dtype=np.float32)
    widths = [3, 2] * any(isinstance(block, OuterRows) for block in plan.blocks)
    widths += [5] * any(isinstance(block, WholeRows) and block.rides is None for block in plan.blocks)
    return [*np.split(table, np.cumsum(widths)[:-1], axis=1), np.zeros(len(table), np.float32)]


def width(plan: RowGradients) -> int:
    return sum(5 if isinstance(block, OuterRows) or block.rides is None else 0 for block in plan.blocks)


def add(total: RowSum, outs: Sequence[NDArray[Any]], counted: NDArray[np.bool_]) -> None:
    with np.errstate(all="ignore"):  # rows that overflow or are NaN are no errors
        total.add(outs, counted)


def summed(rows: Sequence[F32], plan: RowGradients, *, clip_norm: float = 1.0, grid_bits: int = GRID) -> list[int]:
    """The sum over `rows`, fed in batches of `plan.rows`, the last one filled up."""
    total = RowSum(plan, clip_norm=clip_norm, grid_bits=grid_bits, most_rows=1 << 22)
    for part, counted in batches_of(np.arange(len(rows)), plan.rows, len(rows)):
        add(total, outs_of([rows[at] for at in part], plan), counted)
    return [int(entry) for entry in total.take()]


def square(row: NDArray[np.float64]) -> float:
    """|row|² as floats give it: alone, so that a place in a batch that mattered would show."""
    return float(np.vecdot(row, row))


def oracle(rows: Sequence[F32], plan: RowGradients, *, clip_norm: float = 1.0, grid_bits: int = GRID) -> list[int]:
    """The same with Python's integers: rows quantised one by one, bound checked exactly, sum, shift."""
    bits = min(20, (53 - (plan.rows - 1).bit_length()) // 2)
    shift = 2 * bits - grid_bits
    sums = [0] * sum(math.prod(block.shape) for block in plan.blocks)
    riders = sum(isinstance(block, WholeRows) and block.rides is not None for block in plan.blocks)
    for row in rows:
        parts = [part[0].astype(np.float64) for part in outs_of([row], plan)[:-1]]
        squares = []
        for block in plan.blocks:
            if isinstance(block, OuterRows):
                squares.append(square(parts[0]) * (square(parts[1]) + riders))
            elif block.rides is None:
                squares.append(square(parts[block.output]))
        norm_squared = sum(squares)
        if not math.isfinite(norm_squared):
            continue
        squared_scale = (1.0 - 2.0**-21) ** 2 * 4.0**bits / math.sqrt(max(norm_squared, clip_norm * clip_norm))
        scale, whole = math.sqrt(squared_scale), squared_scale * 2.0 ** (grid_bits - 2 * bits)
        entries: list[int] = []
        squared = 0
        for block in plan.blocks:
            a = [math.trunc(v * scale) for v in parts[0].tolist()]
            if isinstance(block, OuterRows):
                c = [math.trunc(v * scale) for v in parts[1].tolist()]
                more = [x * y for x in a for y in c]
            elif block.rides is not None:
                more = [x * math.trunc(scale) for x in a]
            else:
                more = [math.trunc(v * whole) << shift for v in parts[block.output].tolist()]
            entries += more
            squared += sum(v * v for v in more)
        assert squared <= 1 << (2 * grid_bits + 2 * shift)  # never dropped for its norm
        sums = [have + more for have, more in zip(sums, entries, strict=True)]
    return [entry >> shift for entry in sums]


SHAPES = [
    gradients(),
    gradients(outer=False),
    gradients(whole=False),
    gradients(rows=1),
    gradients(rider=True),
    gradients(whole=False, rider=True),
]
ordinary = st.floats(-3.0, 3.0, width=32)
anything = st.floats(width=32, allow_nan=True, allow_infinity=True)


def some_rows(plan: RowGradients, elements: st.SearchStrategy[float], most: int = 9) -> st.SearchStrategy[list[F32]]:
    return st.lists(hnp.arrays(np.float32, width(plan), elements=elements), max_size=most)


# --- exactness -----------------------------------------------------------------------------------------------------


@given(st.data(), st.sampled_from(SHAPES), st.sampled_from([0.25, 1.0, 7.5]), st.sampled_from([8, 12, 16, 20]))
@settings(max_examples=150, deadline=None)
def test_the_sum_is_the_integers_sum(data: st.DataObject, plan: RowGradients, clip_norm: float, grid_bits: int) -> None:
    rows = data.draw(some_rows(plan, st.one_of(ordinary, anything)))
    assert summed(rows, plan, clip_norm=clip_norm, grid_bits=grid_bits) == oracle(
        rows, plan, clip_norm=clip_norm, grid_bits=grid_bits
    )


@pytest.mark.parametrize("rows", [1, 5])
def test_any_number_of_layers_is_summed_to_the_last_integer(rows: int) -> None:
    """Three matrices, two with their biases, and a vector, out of order, by Python's integers."""
    plan = RowGradients(
        rows=rows,
        blocks=(
            OuterRows(name="w1", shape=(3, 2), left=0, right=1),
            WholeRows(name="b1", shape=(3,), output=0, rides=0),
            WholeRows(name="v", shape=(4,), output=2),
            OuterRows(name="w2", shape=(1, 3), left=3, right=4),
            OuterRows(name="w3", shape=(2, 5), left=5, right=6),
            WholeRows(name="b3", shape=(2,), output=5, rides=5),
        ),
        loss=7,
    )
    draw = np.random.default_rng(rows)
    widths = (3, 2, 4, 1, 3, 2, 5)
    total = RowSum(plan, clip_norm=2.0, grid_bits=GRID, most_rows=10)
    expected = [0] * total.length
    for step in range(2):  # another batch finds the ones of the biases as they were
        outs = [(draw.normal(size=(rows, width)) * 10.0 ** (step - 1)).astype(np.float32) for width in widths]
        add(total, [*outs, np.zeros(rows)], np.ones(rows, np.bool_))
        for b in range(rows):
            a1, c1, v, a2, c2, a3, c3 = (out[b].astype(np.float64) for out in outs)
            n = square(a1) * square(np.append(c1, 1.0)) + square(a2) * square(c2)
            n = n + square(a3) * square(np.append(c3, 1.0)) + float(np.einsum("i,i->", v, v))
            y = (1.0 - 2.0**-21) ** 2 * 4.0**20 / math.sqrt(max(n, 4.0))
            ints = [[math.trunc(x * math.sqrt(y)) for x in part.tolist()] for part in (a1, c1, a2, c2, a3, c3)]
            whole = [math.trunc(x * (y * 2.0 ** (GRID - 40))) << (40 - GRID) for x in v.tolist()]
            (l1, r1, l2, r2, l3, r3), u = ints, math.trunc(math.sqrt(y))
            matrices = [[x * z for x in left for z in right] for left, right in ((l1, r1), (l2, r2), (l3, r3))]
            row = [*matrices[0], *(x * u for x in l1), *whole, *matrices[1], *matrices[2], *(x * u for x in l3)]
            assert sum(x * x for x in row) <= 16**20
            expected = [have + more for have, more in zip(expected, row, strict=True)]
    assert total.take().tolist() == [entry >> (40 - GRID) for entry in expected]


@pytest.mark.parametrize("few", [True, False])
def test_a_large_sum_is_ordered_as_a_small_one_is(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not few:
        monkeypatch.setattr(private_sum, "_FEW_ENTRIES", 0)
    plan = gradients(rider=True)
    rows = [np.arange(1, 11, dtype=np.float32) / (20 + at) for at in range(7)]
    total = RowSum(plan, clip_norm=1.0, grid_bits=GRID, most_rows=1 << 22)
    assert (total._order is not None) == few
    assert summed(rows, plan) == oracle(rows, plan)


@pytest.mark.parametrize("rows", [64, 1000, 8192])
def test_large_batches_are_exact_too(rows: int) -> None:
    """Every row at the bound, all of one sign: the largest sums that there can be."""
    plan = gradients(rows=rows)
    row = np.array([3e5, 0, 0, 2e5, 0, 0, 0, 0, 0, 0], dtype=np.float32)
    many = [row] * (2 * rows + 3)
    got = summed(many, plan, grid_bits=16)
    (one, *rest) = oracle([row], gradients(rows=rows), grid_bits=16)
    assert abs(got[0] - len(many) * one) <= len(many)  # one shift instead of many
    assert got[0] >= len(many) * (one - 1)
    assert not any(got[1:]) and not any(rest)


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("entries", [1, 2, 7, 63, 256, 1001])
def test_what_a_row_adds_does_not_depend_on_its_place_or_on_others(entries: int, outer: bool) -> None:
    """Bit for bit: the sum over a batch is the sum of the rows one by one, in any order."""
    rng = np.random.default_rng(entries)
    whole = WholeRows(name="b", shape=(entries,), output=0)
    pair = OuterRows(name="w", shape=(entries, entries), left=0, right=0)
    plan = RowGradients(rows=16, blocks=(pair if outer else whole,), loss=1)
    rows = (rng.normal(size=(16, entries)) * rng.lognormal(size=(16, 1))).astype(np.float32)
    total = RowSum(plan, clip_norm=1.0, grid_bits=20, most_rows=1 << 22)

    def sum_of(some: NDArray[np.float32]) -> NDArray[np.int64]:
        filled = len(some)
        padded = np.concatenate([some, np.zeros((16 - filled, entries), np.float32)])
        total.clear()
        add(total, [padded, np.zeros(16)], np.arange(16) < filled)
        total._settle()
        return total._total.copy()  # before the one shift to the grid, which rounds

    together = sum_of(rows)
    assert np.array_equal(together, np.sum([sum_of(row[None, :]) for row in rows], axis=0))
    for start in range(1, 5):
        assert np.array_equal(together, sum_of(rows[:start]) + sum_of(rows[start:][::-1]))


def test_accuracy_is_that_of_the_grid() -> None:
    plan = gradients(rows=8)
    rng = np.random.default_rng(3)
    rows = [rng.normal(size=10).astype(np.float32) for _ in range(50)]
    clip_norm = 1.5
    true = np.zeros(11)
    for row in rows:
        w, b = np.outer(row[:3], row[3:5]).ravel().astype(np.float64), row[5:].astype(np.float64)
        g = np.concatenate([w, b])
        true += g * min(1.0, clip_norm / float(np.linalg.norm(g)))
    got = np.array(summed(rows, plan, clip_norm=clip_norm, grid_bits=16)) * clip_norm / 2**16
    assert np.abs(got - true).max() < 50 * clip_norm / 2**15


# --- what a row or a Plan may try ----------------------------------------------------------------------------------

BIG = 3.0e38
HOSTILE = {
    "huge": [BIG] * 10,
    "huge outer, nothing else": [BIG] * 5 + [0.0] * 5,
    "one huge coordinate": [0.0] * 9 + [BIG],
    "tiny": [1e-45] * 10,
    "tiny times huge": [1e-45] * 3 + [BIG] * 2 + [0.0] * 5,
    "huge times nothing": [BIG] * 3 + [0.0] * 2 + [0.5] * 5,
    "exactly at the bound": [0.0] * 9 + [1.0],
    "at the bound in the outer product": [1.0, 0, 0, 1.0, 0] + [0.0] * 5,
    "just above": [0.0] * 9 + [float(np.nextafter(np.float32(1), np.float32(2)))],
    "zero": [0.0] * 10,
}
NOTHING = {"nan": math.nan, "inf": math.inf, "minus inf": -math.inf}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_row_weighs_more_than_the_bound(name: str) -> None:
    plan = gradients()
    row = np.array(HOSTILE[name], dtype=np.float32)
    vector = summed([row], plan)
    assert vector == oracle([row], plan)
    assert sum(entry * entry for entry in vector) <= row_bound(11, GRID)
    if ("bound" in name or "huge" in name) and "tiny" not in name:
        assert sum(entry * entry for entry in vector) > 0.99 * 4**GRID  # clipped, not dropped


@given(st.data(), st.sampled_from(SHAPES), st.sampled_from([1e-30, 0.25, 1.0, 1e30]), st.sampled_from([1, 12, 20]))
@settings(max_examples=150, deadline=None)
def test_no_row_of_integers_is_longer_than_the_bound(
    data: st.DataObject, plan: RowGradients, clip_norm: float, grid_bits: int
) -> None:
    """What is bounded is computed from floats; here from the integers themselves, exactly, whatever the rows hold."""
    rows = data.draw(some_rows(plan, st.one_of(ordinary, anything, st.just(BIG), st.just(1e-45))).filter(bool))
    rows = (rows * plan.rows)[: plan.rows]
    total = RowSum(plan, clip_norm=clip_norm, grid_bits=grid_bits, most_rows=1 << 22)
    add(total, outs_of(rows, plan), np.ones(plan.rows, dtype=np.bool_))
    pairs, others = ([[int(entry) for entry in row] for row in part] for part in total.integers())
    for factors, whole in zip(pairs, others, strict=True):
        left, right = sum(a * a for a in factors[:3]), sum(c * c for c in factors[3:])
        assert left * right + (sum(v * v for v in whole) << (2 * total._shift)) <= 1 << (4 * total._bits)


def test_a_scale_that_is_too_large_drops_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were factors a millionth larger than they may be, rows at the bound would be dropped, not counted."""
    rows = [np.array(HOSTILE[name], dtype=np.float32) for name in ("huge", "huge outer, nothing else", "just above")]
    inside = np.full(10, 0.01, dtype=np.float32)
    monkeypatch.setattr(private_sum, "_SHRINK", 1.0 + 2.0**-20)
    for plan in (gradients(rows=1), gradients(rows=4, rider=True)):
        for row in rows:
            assert summed([row], plan) == [0] * len(summed([], plan))
            assert summed([row, inside], plan) == summed([inside], plan)
        assert any(summed([inside], plan))


@pytest.mark.parametrize("value", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("at", [0, 4, 9])
def test_a_row_that_is_not_finite_counts_as_zero_and_spoils_no_other(at: int, value: float) -> None:
    plan = gradients()
    good = [np.full(10, 0.25, dtype=np.float32), np.full(10, -0.5, dtype=np.float32)]
    bad = np.full(10, 0.25, dtype=np.float32)
    bad[at] = value
    assert summed([good[0], bad, good[1]], plan) == summed(good, plan)
    assert summed([bad], plan) == [0] * 11


def test_padding_rows_do_not_count() -> None:
    plan = gradients(rows=4)
    total = RowSum(plan, clip_norm=1.0, grid_bits=GRID, most_rows=1 << 22)
    row = np.full(10, 0.25, dtype=np.float32)
    noise = np.full(10, math.nan, dtype=np.float32)
    add(total, outs_of([row, noise, noise, noise], plan), np.arange(4) < 1)
    assert [int(entry) for entry in total.take()] == summed([row], plan)


@given(st.data(), st.sampled_from(SHAPES))
@settings(max_examples=60, deadline=None)
def test_rows_that_wait_for_others_give_what_they_give_alone(data: st.DataObject, plan: RowGradients) -> None:
    """Batches with any rows left out, some hostile: the integers of each row by itself, added."""
    total = RowSum(plan, clip_norm=1.0, grid_bits=GRID, most_rows=1 << 22)
    assert all(part._whole.strides[0] % 64 == 0 for part in (total._pairs,) if part._whole.size)
    alone = RowSum(plan, clip_norm=1.0, grid_bits=GRID, most_rows=1 << 22)
    expected = np.zeros(total.length, dtype=np.int64)
    for _ in range(data.draw(st.integers(1, 5))):
        rows = data.draw(hnp.arrays(np.float32, (plan.rows, width(plan)), elements=st.one_of(ordinary, anything)))
        counted = data.draw(hnp.arrays(np.bool_, plan.rows))
        add(total, outs_of(list(rows), plan), counted)
        for row in rows[counted]:
            alone.clear()
            add(alone, outs_of([row] * plan.rows, plan), np.arange(plan.rows) == plan.rows - 1)
            with np.errstate(all="ignore"):
                alone._settle()
            expected += alone._total
    with np.errstate(all="ignore"):
        total._settle()
    assert np.array_equal(total._total, expected)


def test_an_empty_sample_is_the_zero_vector_and_take_begins_anew() -> None:
    total = RowSum(gradients(), clip_norm=1.0, grid_bits=GRID, most_rows=1 << 22)
    assert not total.take().any()
    assert total.take().dtype == np.int64
    add(total, outs_of([np.ones(10, np.float32)] * 4, gradients()), np.ones(4, np.bool_))
    assert total.take().any()
    assert not total.take().any()


# --- sensitivity ---------------------------------------------------------------------------------------------------


@given(st.data(), st.sampled_from(SHAPES), st.sampled_from([4, 12, 20]))
@settings(max_examples=200, deadline=None)
def test_one_row_changes_the_sum_by_at_most_the_sensitivity(
    data: st.DataObject, plan: RowGradients, grid_bits: int
) -> None:
    """D and D' = D without one row, the same coins for all others: ||f(D) - f(D')||² <= Δ², as integers."""
    rows = data.draw(some_rows(plan, st.one_of(ordinary, anything)).filter(bool))
    gone = data.draw(st.integers(0, len(rows) - 1))
    with_it = summed(rows, plan, grid_bits=grid_bits)
    without = summed([*rows[:gone], *rows[gone + 1 :]], plan, grid_bits=grid_bits)
    bound = RowSum(plan, clip_norm=1.0, grid_bits=grid_bits, most_rows=1 << 22).sensitivity_squared
    assert bound == row_bound(len(with_it), grid_bits)
    assert sum((a - b) ** 2 for a, b in zip(with_it, without, strict=True)) <= bound


@pytest.mark.parametrize(("length", "grid_bits"), [(1, 1), (7, 3), (1000, 16), (10**6, 20), ((1 << 32) - 5, 20)])
def test_the_bound_is_the_square_of_radius_plus_rounding(length: int, grid_bits: int) -> None:
    bound = row_bound(length, grid_bits)
    # bound - 4^g - P is the least integer >= 2^(g+1) √P
    cross = bound - 4**grid_bits - length
    assert cross**2 >= (2 << grid_bits) ** 2 * length > (cross - 1) ** 2


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "clip_norm", "grid_bits", "words"),
    [
        (gradients(), 1.0, 21, "grid_bits from 1 to 20"),
        (gradients(), 1.0, 0, "grid_bits from 1 to 20"),
        (gradients(), 0.0, 16, "clip_norm from 1e-30"),
        (gradients(), math.inf, 16, "clip_norm from 1e-30"),
        (gradients(), math.nan, 16, "clip_norm from 1e-30"),
        (gradients(rows=1 << 34), 1.0, 20, "can't be added exactly"),
        (
            RowGradients(rows=4, blocks=(WholeRows(name="w", shape=(1 << 29,), output=0),), loss=1),
            *(1.0, 16, "at most 2^28 entries"),
        ),
        (
            RowGradients(rows=4, blocks=(OuterRows(name="w", shape=(0, 3), left=0, right=1),), loss=2),
            *(1.0, 16, "without entries"),
        ),
    ],
)
def test_what_cant_be_exact_is_refused(plan: RowGradients, clip_norm: float, grid_bits: int, words: str) -> None:
    with pytest.raises(BadCommand, match=words.replace("^", r"\^")):
        RowSum(plan, clip_norm=clip_norm, grid_bits=grid_bits, most_rows=1 << 22)


@pytest.mark.parametrize("most_rows", [1, 1 << 22, (1 << 22) + 1, 1 << 30, 1 << 40])
def test_any_split_is_summed_exactly_however_many_rows_it_has(most_rows: int) -> None:
    """Finer factors where there is room; a refusal by the size of a sample would tell of the sample."""
    plan = gradients()
    total = RowSum(plan, clip_norm=1.0, grid_bits=GRID, most_rows=most_rows)
    assert most_rows * 4**total._bits <= 1 << 62
    assert total._bits >= GRID // 2 + 1
    rows = [np.full(10, value, dtype=np.float32) for value in (0.25, -0.5, 0.125, 3.0)][: min(4, most_rows)]
    add(total, outs_of([*rows, *[rows[0]] * (4 - len(rows))], plan), np.arange(4) < len(rows))
    found = total.take()
    assert np.abs(found - summed(rows, plan)).max() <= 4 * len(rows)  # in units of 2^-12 of the clip norm


def test_a_split_too_large_to_be_exact_is_refused_by_its_size() -> None:
    with pytest.raises(BadCommand, match=r"of 2199023255552 rows in batches of 4 can't be added exactly on a grid"):
        RowSum(gradients(), clip_norm=1.0, grid_bits=20, most_rows=1 << 41)
    total = RowSum(gradients(), clip_norm=1.0, grid_bits=GRID, most_rows=7)
    add(total, outs_of([np.ones(10, np.float32)] * 4, gradients()), np.ones(4, np.bool_))
    with pytest.raises(LocalError, match="more than the 7 rows"):
        add(total, outs_of([np.ones(10, np.float32)] * 4, gradients()), np.ones(4, np.bool_))


def test_bad_thresholds_are_our_own_mistake() -> None:
    for threshold in (0, FULL_SAMPLING + 1):
        with pytest.raises(LocalError, match="threshold"):
            poisson_sample(10, threshold)
    with pytest.raises(LocalError, match="row_bound"):
        row_bound(0, 16)


# --- the sample ----------------------------------------------------------------------------------------------------


def test_full_sampling_takes_every_row_and_none_needs_no_coin() -> None:
    assert poisson_sample(5, FULL_SAMPLING).tolist() == [0, 1, 2, 3, 4]
    assert poisson_sample(0, 1 << 31).tolist() == []


def test_a_row_is_taken_exactly_if_its_32_bits_are_below_the_threshold() -> None:
    coins = np.array([0, 99, 100, 101, 2**32 - 1], dtype="<u4")
    assert poisson_sample(5, 100, lambda count: coins.tobytes()[:count]).tolist() == [0, 1]
    assert poisson_sample(5, FULL_SAMPLING, lambda count: coins.tobytes()[:count]).tolist() == [0, 1, 2, 3, 4]


def test_batches_cover_the_sample_once_and_no_row_leaves_its_place() -> None:
    parts = list(batches_of(np.array([2, 3, 5, 7, 11]), 2, 12))
    assert [part.tolist() for part, _ in parts] == [[2, 3], [0, 5], [0, 7], [0, 11]]
    assert [counted.tolist() for _, counted in parts] == [[True, True], *[[False, True]] * 3]
    assert list(batches_of(np.array([], dtype=np.int64), 2, 12)) == []
    (few,) = batches_of(np.array([1]), 4, 2)
    assert (few[0].tolist(), few[1].tolist()) == ([0, 1, 1, 1], [False, True, False, False])


@given(st.integers(1, 9), st.sets(st.integers(0, 40)), st.integers(0, 40))
@settings(deadline=None)
def test_a_rows_place_does_not_depend_on_who_else_is_sampled(batch_rows: int, sample: set[int], row: int) -> None:
    rows = np.array(sorted(sample | {row}), dtype=np.int64)
    for some in (rows, rows[rows != row]):
        taken = [int(at) for part, counted in batches_of(some, batch_rows, 41) for at in part[counted]]
        assert sorted(taken) == some.tolist()
        for part, counted in batches_of(some, batch_rows, 41):
            assert part.shape == counted.shape == (batch_rows,) and counted.any()
            assert (part[counted] % batch_rows == np.flatnonzero(counted)).all()


@pytest.mark.parametrize(
    ("rows", "batch_rows", "rate"), [(41, 8, 1), (600, 128, 0.1), (5000, 128, 0.02), (60, 64, 0.25)]
)
def test_the_number_of_batches_is_foreseen(rows: int, batch_rows: int, rate: float) -> None:
    draw = np.random.default_rng(1)
    samples = [np.flatnonzero(draw.random(rows) < rate) for _ in range(100)]
    mean = np.mean([sum(1 for _ in batches_of(sample, batch_rows, rows)) for sample in samples])
    assert 0.5 <= mean / expected_batches(rows, batch_rows, round(rate * 2**32)) <= 1.5


RATE = 0.25


def poisson(steps: int, rows: int, source: RandomBytes) -> NDArray[np.bool_]:
    taken = np.zeros((steps, rows), dtype=bool)
    for step in taken:
        step[poisson_sample(rows, round(RATE * 2**32), source)] = True
    return taken


def shuffled(steps: int, rows: int, source: RandomBytes) -> NDArray[np.bool_]:
    """The twin that takes batches of a fixed size: every row as often as it should be, but pairs too seldom."""
    rng = np.random.default_rng(int.from_bytes(source(8), "big"))
    taken = np.zeros((steps, rows), dtype=bool)
    for step in taken:
        step[rng.permutation(rows)[: round(RATE * rows)]] = True
    return taken


def test_rows_pairs_and_sizes_are_those_of_a_poisson_sample() -> None:
    """Counts of rows against q, of pairs against q², within and across steps; false alarm below 1e-6."""
    assert sampler_faults(poisson, q=RATE, random=random.Random(5).randbytes) == []


def test_a_shuffling_twin_is_caught_by_the_pairs() -> None:
    faults = sampler_faults(shuffled, q=RATE, random=random.Random(5).randbytes)
    assert any(fault.startswith("all pairs") for fault in faults)
    assert not any(fault.startswith("rows") for fault in faults)  # its single rows look right
