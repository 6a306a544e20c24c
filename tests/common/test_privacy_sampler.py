"""The exact sampler of the discrete Gaussian: its distribution, its arithmetic, its refusals, and broken twins of it.

False-alarm chances: below 1e-7 for each comparison (`helpers_privacy`), and the streams are fixed besides."""

from __future__ import annotations

import ast
import inspect
import json
import math
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_privacy import chi_square_excess, correlation_excess, frequency_excess, seeded
from sordino_common.errors import LocalError
from sordino_common.privacy import discrete_gaussian, exponential, gaussian_cells, grid, words
from sordino_common.privacy.discrete_gaussian import noise_bound
from sordino_common.privacy.exponential import below_exp, exp_bounds
from sordino_common.privacy.gaussian_cells import CELL_BITS, HEIGHT_BITS, LINE_BITS, Cells
from sordino_common.privacy.words import Words

SAMPLES = 200_000
SIGMAS_SQUARED = [1, 2, 3, 10, 97, 10_000, (1 << 32) + 12_345, 1 << 60, 1 << 80]
sample = discrete_gaussian.discrete_gaussian
VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "privacy.json").read_text())


def verdicts(samples: np.ndarray, sigma_squared: int) -> dict[str, float]:
    """Each test's statistic in units of its threshold; above 1 is a rejection."""
    unit = samples / math.sqrt(sigma_squared)
    sign = np.sign(samples).astype(float)
    return {
        "chi-square": chi_square_excess(samples, sigma_squared),
        "symmetry": frequency_excess(int((samples > 0).sum()), int((samples != 0).sum()), 0.5),
        "neighbours": correlation_excess(unit[1:], unit[:-1]),
        "neighbours' sizes": correlation_excess(np.abs(unit[1:]), np.abs(unit[:-1])),
        "neighbours' signs": correlation_excess(sign[1:], sign[:-1]),
        "two apart": correlation_excess(unit[2:], unit[:-2]),
        **{f"bit {bit}": bit_excess(samples, bit) for bit in low_bits(sigma_squared)},
    }


def low_bits(sigma_squared: int) -> list[int]:
    """Bits of x that are fair coins, but for exp(-π²σ²/(2 4^bit)) < 10^-7: the last, and those beside a bin's edge."""
    most = math.isqrt(sigma_squared).bit_length() - 3
    width = max(0, most - 5)
    return sorted({0, width - 1, width, most} & set(range(most + 1)))


def bit_excess(samples: np.ndarray, bit: int) -> float:
    return frequency_excess(int((samples >> bit & 1).sum()), samples.size, 0.5)


@pytest.mark.parametrize("sigma_squared", SIGMAS_SQUARED)
def test_distribution(sigma_squared: int) -> None:
    samples = sample(sigma_squared, SAMPLES, seeded(f"distribution {sigma_squared}"))
    assert samples.dtype == np.int64
    assert {name: value for name, value in verdicts(samples, sigma_squared).items() if value > 1.0} == {}


@pytest.mark.parametrize("sigma_squared", [1, 10_000, 1 << 40])
def test_variance_within_one_percent(sigma_squared: int) -> None:
    # A million samples: the estimate's standard deviation is 0.14 %, so 1 % is 7 of them.
    samples = sample(sigma_squared, 1_000_000, seeded("variance")).astype(float)
    assert abs(samples.mean()) < 5.4 * math.sqrt(sigma_squared) / 1000
    assert samples.var() / sigma_squared == pytest.approx(1.0, abs=0.01)


def _edited(old: str, new: str) -> Any:
    """`_block` with a piece of its text exchanged."""
    text = inspect.getsource(discrete_gaussian._block)
    assert text.count(old) == 1
    scope = dict(vars(discrete_gaussian))
    exec(text.replace(old, new), scope)
    return scope["_block"]


EDITS = {
    "all candidates kept": ("keep[edges] = fine", "pass"),
    "only what is under the curve": ("keep[edges] = fine", "keep[edges] = False"),
    "no place in the bin": ("x |= rest & inside", "pass"),
    "places of 8": ("x |= rest & inside", "x |= rest & inside & -8"),
    "a bin's left half": ("x |= rest & inside", "x |= (rest & inside) >> 1"),
    "U is seldom large": ("rest >>= _DRAWN_FROM", "rest >>= _DRAWN_FROM + 2"),
}


def twin(mutate: str, sigma_squared: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Samples of a broken sampler."""
    random = seeded(f"twin {mutate}")
    rng = np.random.default_rng(5)
    if mutate == "half of sigma":
        return sample(max(1, sigma_squared // 4), SAMPLES, random)
    if mutate == "5 % less variance":
        return sample(sigma_squared * 95 // 100, SAMPLES, random)
    if mutate == "rounded continuous Gaussian":
        return np.round(rng.normal(size=SAMPLES) * math.sqrt(sigma_squared)).astype(np.int64)
    if mutate in EDITS:
        monkeypatch.setattr(discrete_gaussian, "_block", _edited(*EDITS[mutate]))
    samples = sample(sigma_squared, SAMPLES, random)
    if mutate == "biased sign":
        samples = np.where(rng.random(SAMPLES) < 0.03, np.abs(samples), samples)
    elif mutate == "off by one":
        samples = samples + (samples > 0)
    elif mutate == "each value twice":
        samples = np.repeat(samples[: SAMPLES // 2], 2)
    elif mutate == "antithetic":
        samples = np.ravel(np.column_stack([samples[: SAMPLES // 2], -samples[: SAMPLES // 2]]))
    elif mutate == "shared sizes":
        samples[1::2] = np.abs(samples[::2]) * np.sign(samples[1::2])
    elif mutate == "even numbers":
        samples = samples // 2 * 2
    return samples


@pytest.mark.parametrize(
    ("mutate", "sigma_squared"),
    [
        ("half of sigma", 97),
        ("half of sigma", 1 << 40),
        ("5 % less variance", 10_000),
        ("5 % less variance", 1 << 60),
        ("rounded continuous Gaussian", 1),
        ("all candidates kept", 10_000),
        ("all candidates kept", 1 << 60),
        ("only what is under the curve", 10_000),
        ("only what is under the curve", 1 << 40),
        ("no place in the bin", 1 << 40),
        ("places of 8", 1 << 40),
        ("a bin's left half", 1 << 40),
        ("U is seldom large", 1 << 40),
        ("biased sign", 10_000),
        ("off by one", 10),
        ("each value twice", 97),
        ("antithetic", 1 << 40),
        ("shared sizes", 97),
        ("even numbers", 10),
    ],
)
def test_broken_twins_are_caught(mutate: str, sigma_squared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdicts(twin(mutate, sigma_squared, monkeypatch), sigma_squared)
    assert max(found.values()) > 1.0, found


# --- what is under the curve, what is over it, and what lies beyond ------------------------------------------------

sigmas_squared = st.one_of(st.integers(1, 1 << 80), st.integers(1, 40_000), st.integers(0, 80).map(lambda n: 1 << n))


def curve(cells: Cells, x: int, bits: int) -> tuple[int, int]:
    """Bounds of κ f(x) 2^bits."""
    low, high = exp_bounds(x * x, 2 * cells.sigma_squared, 160)
    shift = 160 + HEIGHT_BITS - bits
    return (cells.height * low) >> shift, -(-cells.height * high >> shift)


@given(sigmas_squared, st.data())
@settings(max_examples=150, deadline=None)
def test_cells_cover_the_curve_and_those_under_it_are(sigma_squared: int, data: st.DataObject) -> None:
    cells = Cells(sigma_squared)
    width = 1 << cells.width_bits
    over = cells.bins[cells.under : cells.under + cells.layers.size]
    assert np.array_equal(np.unique(over), np.arange(-cells.half, cells.half))  # so the bins leave no gap
    assert cells.under + cells.layers.size <= (1 << CELL_BITS) - 2
    for q in data.draw(st.lists(st.integers(-cells.half, cells.half - 1), min_size=8, max_size=8)):
        ends = sorted((q * width, q * width + width - 1), key=abs)
        least, most = ends
        under = int(np.count_nonzero(cells.bins[: cells.under] == q))
        layers = cells.layers[over == q].tolist()
        assert layers == list(range(under, under + len(layers)))
        assert under <= curve(cells, most, 0)[1]
        assert curve(cells, most, 20)[0] >= (under << 20) - 1
        assert curve(cells, least, 20)[1] <= (under + len(layers)) << 20


@given(sigmas_squared, st.data())
@settings(max_examples=150, deadline=None)
def test_lines_are_as_near_to_the_curve_as_they_say(sigma_squared: int, data: st.DataObject) -> None:
    """And so near that one candidate in some thousands is settled by Python's integers."""
    cells = Cells(sigma_squared)
    assert cells.margin + (1 << cells.unknown_bits) < 1 << (LINE_BITS - 9)
    assert CELL_BITS + cells.width_bits + LINE_BITS - cells.unknown_bits <= 64  # no bit of a word is used twice
    for cell in data.draw(st.lists(st.integers(0, cells.layers.size - 1), min_size=8, max_size=8)):
        q, layer = int(cells.bins[cells.under + cell]), int(cells.layers[cell])
        place = data.draw(st.integers(0, (1 << cells.width_bits) - 1))
        low, high = curve(cells, (q << cells.width_bits) + place, LINE_BITS)
        first = place >> (cells.width_bits - cells.place_bits)
        assert abs(first * int(cells.rise[cell])) < 1 << 62
        line = int(cells.line[cell]) + (first * int(cells.rise[cell]) >> cells.place_bits) + (layer << LINE_BITS)
        assert line - cells.margin <= low and high <= line + cells.margin


@given(sigmas_squared)
@settings(max_examples=100, deadline=None)
def test_cells_of_no_bin_are_rejected_and_few(sigma_squared: int) -> None:
    cells = Cells(sigma_squared)
    lines = cells.line[cells.layers.size :] + np.abs(cells.rise[cells.layers.size :])
    assert (lines < -cells.margin).all()  # the tails' two among them: they are settled before
    assert 2 <= lines.size <= (1 << CELL_BITS) // 50
    assert cells.tail == cells.line.size - 2
    assert cells.under >= (1 << CELL_BITS) * 94 // 100


@given(sigmas_squared, st.integers(0, 128), st.integers(0, (1 << 40) - 1), st.booleans())
@settings(max_examples=300, deadline=None)
def test_no_chance_beyond_the_bins_is_above_one(sigma_squared: int, steps: int, rest: int, negative: bool) -> None:
    """κ f(x) t 2^(V+1) / w for every step V and every rest R."""
    cells = Cells(sigma_squared)
    start = cells.half << cells.width_bits
    assert start << cells.tail_bits >= sigma_squared
    x = start + rest % (1 << cells.tail_bits) + (steps << cells.tail_bits) + negative
    _, high = exp_bounds(x * x, 2 * sigma_squared, 400)
    assert cells.height * high << (cells.tail_bits + steps + 1) <= 1 << (400 + HEIGHT_BITS + cells.width_bits)


@pytest.mark.parametrize("sigma_squared", [1, 97, 30_000])
def test_what_lies_beyond_the_bins(sigma_squared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many candidates of the tails' cells are kept, and which."""
    cells, source, trials = Cells(sigma_squared), Words(seeded(f"beyond {sigma_squared}")), 8_000
    start, width = cells.half << cells.width_bits, 1 << cells.width_bits
    kept: dict[bool, list[int]] = {False: [], True: []}
    for at in range(trials):
        x, fine = discrete_gaussian._beyond(source, cells, negative=at % 2 == 1)
        assert x >= start if at % 2 == 0 else x <= -start - 1
        if fine:
            kept[at % 2 == 1].append(x)
    kappa = Fraction(cells.height, 1 << HEIGHT_BITS)
    for negative, values in kept.items():
        sizes = np.arange(start + negative, start + negative + 12 * math.isqrt(sigma_squared) + 12)
        mass = float(kappa / width) * np.exp(-(sizes.astype(float) ** 2) / (2 * sigma_squared))
        assert frequency_excess(len(values), trials // 2, float(mass.sum())) < 1.0
        median = sizes[np.searchsorted(np.cumsum(mass), mass.sum() / 2)]
        share = float(mass[sizes <= median].sum() / mass.sum())
        assert frequency_excess(int((np.abs(values) <= median).sum()), len(values), share) < 1.0


def test_a_table_that_does_not_cover_the_tails_is_our_own_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian_cells, "_REACH", 3)
    with pytest.raises(LocalError, match="no table for sigma_squared 10000: a bug here"):
        Cells(10_000)


def test_every_path_of_a_block_is_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"_below": 0, "_beyond": 0}
    for name in calls:
        honest = getattr(discrete_gaussian, name)

        def counted(*args: Any, honest: Any = honest, name: str = name, **more: Any) -> Any:
            calls[name] += 1
            return honest(*args, **more)

        monkeypatch.setattr(discrete_gaussian, name, counted)
    sample(1 << 32, SAMPLES, seeded("paths"))
    assert 0 < calls["_below"] < SAMPLES // 5_000
    assert 0 < calls["_beyond"] < SAMPLES // 5_000


# --- decisions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [Fraction(0), Fraction(1, 7), Fraction(1), Fraction(7, 3), Fraction(40)])
@pytest.mark.parametrize("factor", [Fraction(1), Fraction(13, 64), Fraction(9, 2)])
@pytest.mark.parametrize("bits", [0, 3])
def test_decisions_are_exact_however_few_bits_are_known(gamma: Fraction, factor: Fraction, bits: int) -> None:
    """Y uniform in [0, 1), `bits` of it drawn before."""
    source, trials = Words(seeded(f"{gamma}/{factor}/{bits}")), 4_000
    hits = sum(
        below_exp(source, at % (1 << bits), bits, factor.as_integer_ratio(), gamma.as_integer_ratio())
        for at in range(trials)
    )
    chance = float(factor) * math.exp(-gamma)
    if chance >= 1.0:
        assert hits == trials
    else:
        assert frequency_excess(hits, trials, chance) < 1.0


@given(st.fractions(Fraction(1, 1 << 60), 40), st.fractions(Fraction(1, 1 << 40), 1 << 40), st.integers(1, 90))
@settings(max_examples=300, deadline=None)
def test_a_decision_is_the_comparison_with_the_true_product(gamma: Fraction, factor: Fraction, bits: int) -> None:
    """Around factor · exp(-γ), found here to 400 bits more."""
    low, _ = exp_bounds(gamma.numerator, gamma.denominator, bits + 400)
    edge = math.floor(factor * low / (1 << 400))
    for drawn in range(max(0, edge - 2), edge + 3):
        for rest in (0, (1 << 64) - 1):
            answer = below_exp(_Fixed(rest), drawn, bits, factor.as_integer_ratio(), gamma.as_integer_ratio())
            known = (drawn << 400) | ((1 << 400) - 1 if rest else 0)
            assert answer == (known < factor * low)


class _Fixed(Words):
    """Words that are all one."""

    def __init__(self, word: int) -> None:
        self._word = word

    def take(self, count: int) -> np.ndarray:
        return np.full(count, self._word, dtype=np.uint64)


def test_broken_sources_end() -> None:
    with pytest.raises(LocalError, match="192 zero bits in a row: the random source is broken"):
        discrete_gaussian._beyond(_Fixed(0), Cells(100), negative=False)


@given(st.fractions(0, 4000), st.integers(1, 400))
@settings(deadline=None)
def test_exp_bounds_enclose(gamma: Fraction, bits: int) -> None:
    low, high = exp_bounds(gamma.numerator, gamma.denominator, bits)
    finer_low, finer_high = exp_bounds(gamma.numerator, gamma.denominator, bits + 100)
    assert 0 <= low <= high <= low + 3
    assert low << 100 <= finer_low + 3
    assert finer_high - 3 <= high << 100
    with localcontext() as context:
        context.prec = 200
        true = (-Decimal(gamma.numerator) / Decimal(gamma.denominator)).exp() * 2**bits
        assert low <= true <= high


@given(sigmas_squared)
@settings(max_examples=40, deadline=None)
def test_powers_are_below_the_truth_by_less_than_two_units(sigma_squared: int) -> None:
    cells = Cells(sigma_squared)
    values = gaussian_cells._values(sigma_squared, cells.width_bits, cells.half)
    assert values.dtype == np.int64
    for at in {0, 1, 2, cells.half // 3, cells.half - 1, cells.half}:
        low, high = exp_bounds((at << cells.width_bits) ** 2, 2 * sigma_squared, 100)
        assert int(values[at]) << 60 <= high
        assert low < (int(values[at]) + 2) << 60


class _Whole(np.ndarray):
    """An array that fails the test when arithmetic with it takes or gives anything but integers and truth values."""

    seen = 0

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        plain = [np.asarray(value) if isinstance(value, np.ndarray) else value for value in inputs]
        if "out" in kwargs:
            kwargs["out"] = tuple(np.asarray(value) for value in kwargs["out"])
        result = getattr(ufunc, method)(*plain, **kwargs)
        for value in (*plain, result):
            if isinstance(value, (np.ndarray, np.generic, int, float)):
                assert np.asarray(value).dtype.kind in "iub", f"{ufunc.__name__} on {np.asarray(value).dtype}"
        _Whole.seen += 1
        return result.view(_Whole) if isinstance(result, np.ndarray) else result


@pytest.mark.parametrize("sigma_squared", [1, 10_000, 1 << 80])
def test_no_float_in_the_path(sigma_squared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Words.take
    monkeypatch.setattr(Words, "take", lambda *args: honest(*args).view(_Whole))
    _Whole.seen = 0
    sample(sigma_squared, 30_000, seeded("types"))
    assert _Whole.seen > 30
    tables = [value for value in vars(Cells(sigma_squared)).values() if isinstance(value, np.ndarray)]
    assert len(tables) == 4 and all(table.dtype.kind == "i" for table in tables)
    assert all(type(value) is int for value in vars(Cells(sigma_squared)).values() if not isinstance(value, np.ndarray))


def test_no_float_in_the_source() -> None:
    for module in (exponential, gaussian_cells, discrete_gaussian, words):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Constant) and isinstance(node.value, float)), ast.dump(node)
            assert not isinstance(node, ast.Div), f"{module.__name__}: a true division"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                assert not name.startswith("math.") or name == "math.isqrt", name
                assert node.attr not in ("float64", "float32", "sqrt", "exp", "log", "random"), name
            assert not (isinstance(node, ast.Name) and node.id in ("float", "complex"))


def test_golden_vectors() -> None:
    for case in VECTORS["discrete_gaussian"]:
        key = bytes.fromhex(case["key"])
        drawn = sample(int(case["sigma_squared"]), len(case["samples"]), lambda _, key=key: key)
        assert drawn.tolist() == case["samples"]
    for case in VECTORS["bad_discrete_gaussian"]:  # one bit of the key, or one of σ²
        key = bytes.fromhex(case["key"])
        drawn = sample(int(case["sigma_squared"]), len(case["samples"]), lambda _, key=key: key)
        assert drawn.tolist() != case["samples"]


def test_a_longer_draw_is_no_other_stream_for_the_key() -> None:
    assert sample(100, 0, seeded(1)).size == 0
    assert not np.array_equal(sample(100, 50, seeded(1)), sample(100, 50, seeded(2)))
    random = seeded(1)
    assert not np.array_equal(sample(100, 50, random), sample(100, 50, random))


@pytest.mark.parametrize("sigma_squared", [0, -1, (1 << 80) + 1, 2.0, True])
def test_refuses_other_sigmas(sigma_squared: Any) -> None:
    with pytest.raises(LocalError, match=r"sigma_squared is an int in \[1, 2\^80\], got"):
        sample(sigma_squared, 1)


def test_refuses_a_negative_count() -> None:
    with pytest.raises(LocalError, match="a count is not negative, got -1"):
        sample(1, -1)


def test_noise_bound_is_what_the_subgaussian_tail_gives() -> None:
    for sigma_squared, length, aggregators in ((1 << 32, 1_000_000, 3), (1, 1, 1), (1 << 80, 1 << 20, 4)):
        m = noise_bound(sigma_squared, length, aggregators)
        log2 = 1 + math.log2(length) - m**2 / (2 * aggregators * sigma_squared) / math.log(2)
        assert (-64 if sigma_squared > 1 else -73) < log2 < -60  # m is an integer
    with pytest.raises(LocalError, match="at least 1"):
        noise_bound(1, 0)


def test_a_bound_that_can_be_seen_to_hold() -> None:
    # At chance 2^-7 over 1000 entries, a few of 1000 vectors may pass it, and not many more than half of a bit fewer.
    noise = sample(10_000, 300_000, seeded("tail")).reshape(300, 1000)
    passed = (np.abs(noise).max(axis=1) > noise_bound(10_000, 1000, chance_bits=7)).sum()
    assert passed <= 12  # expected at most 300/128 = 2.3; P(Poisson(2.3) > 12) < 1e-6


def test_grid_uses_no_float_after_rounding() -> None:
    released, bound = grid.clip_to_grid(np.ones(4), clip_norm=1.0, grid_bits=8, random=seeded(3))
    assert released.dtype == np.int64
    assert type(bound) is int
