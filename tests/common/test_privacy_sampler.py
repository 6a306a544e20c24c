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
from sordino_common.privacy import discrete_gaussian, exponential, grid, words
from sordino_common.privacy.discrete_gaussian import noise_bound
from sordino_common.privacy.exponential import bernoulli_exp, decide, exp_bounds, floor_log
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
    }


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


def _block_with_minus_zero() -> Any:
    """`_block` without the rejection of -0."""
    text = inspect.getsource(discrete_gaussian._block)
    assert text.count("(y | ~signs) != np.int64(0)") == 1
    scope = dict(vars(discrete_gaussian))
    exec(text.replace("(y | ~signs) != np.int64(0)", "y >= np.int64(0)"), scope)
    return scope["_block"]


def _gamma_of_laplace(shape: Any, y: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """U/t alone: only the first of the two rejections."""
    gamma = (y - (v << shape.tau)) << (50 - shape.tau)
    return gamma, gamma


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
    if mutate == "Laplace":
        monkeypatch.setattr(discrete_gaussian._Enclosure, "gamma", _gamma_of_laplace)
    elif mutate == "minus zero kept":
        monkeypatch.setattr(discrete_gaussian, "_block", _block_with_minus_zero())
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
        ("Laplace", 97),
        ("Laplace", 1 << 60),
        ("minus zero kept", 3),
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


@pytest.mark.parametrize(
    "gamma", [Fraction(0), Fraction(1, 7), Fraction(1, 2), Fraction(1), Fraction(7, 3), Fraction(4), Fraction(40)]
)
@pytest.mark.parametrize("widen_bits", [0, 30, 46, 50, 56])
def test_coins_are_exact_however_wide_the_interval(gamma: Fraction, widen_bits: int) -> None:
    trials = 100_000 if widen_bits < 40 else 20_000  # wide intervals are settled one by one
    scaled = gamma * (1 << 50)
    low = np.full(trials, math.floor(scaled) - (1 << widen_bits), dtype=np.int64)
    high = np.full(trials, math.ceil(scaled) + (1 << widen_bits), dtype=np.int64)
    hits = bernoulli_exp(
        Words(seeded(f"{gamma}/{widen_bits}")), low, high, lambda _: (gamma.numerator, gamma.denominator)
    )
    if gamma == 0:
        assert hits.all()
    elif gamma == 40:
        assert not hits.any()
    else:
        assert frequency_excess(int(hits.sum()), trials, math.exp(-gamma)) < 1.0


def test_coins_keep_each_elements_own_gamma() -> None:
    gammas = [Fraction(n, 5) for n in range(12)] * 5_000
    low = np.array([math.floor(g * 16) << 46 for g in gammas], dtype=np.int64)
    high = np.array([math.ceil(g * 16) << 46 for g in gammas], dtype=np.int64)
    exact = [(g.numerator, g.denominator) for g in gammas]
    hits = bernoulli_exp(Words(seeded("own")), low, high, exact.__getitem__)
    for n in range(12):
        assert frequency_excess(int(hits[n::12].sum()), 5_000, math.exp(-n / 5) if n else 1 - 1e-12) < 1.0


@given(st.fractions(0, 100, max_denominator=1 << 60), st.integers(0, 1 << 40))
@settings(max_examples=500, deadline=None)
def test_a_coin_is_the_comparison_of_its_word_with_the_true_chance(gamma: Fraction, width: int) -> None:
    """Around exp(-γ), found here to 400 bits, every word's answer is the true one; only a word that agrees with all of
    exp(-γ)'s first bits needs more."""
    low_chance, high_chance = exp_bounds(gamma.numerator, gamma.denominator, 400)
    edge = low_chance >> 336
    firsts = [edge + d for d in (-(1 << 40), -(1 << 34), -(1 << 33), -2, -1, 1, 2, 1 << 33, 1 << 34, 1 << 40)]
    firsts = [first for first in firsts if 0 <= first < 1 << 64]
    low = np.full(len(firsts), math.floor(gamma * (1 << 50)) - width, dtype=np.int64)
    high = np.full(len(firsts), math.ceil(gamma * (1 << 50)) + width, dtype=np.int64)

    answers = decide(
        _Rest(firsts), np.array(firsts, dtype=np.uint64), low, high, lambda _: (gamma.numerator, gamma.denominator)
    )

    for first, answer in zip(firsts, answers.tolist(), strict=True):
        # U lies in [top, top + 1) 2^-31 by its word's first 31 bits, and further by what `_Rest` adds: zeros.
        assert answer == ((first >> 33) << 369 < low_chance or gamma == 0), (first, edge, high_chance)


class _Rest(Words):
    """Words whose further bits are zeros: U is what its first 31 bits say."""

    def __init__(self, firsts: list[int]) -> None:
        pass

    def take(self, count: int) -> np.ndarray:
        return np.zeros(count, dtype=np.uint64)


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


def test_the_tables_are_below_the_truth_by_less_than_an_ulp() -> None:
    for table, parts in zip(exponential._tables(), (1 << 6, 1 << 18), strict=True):
        for at in (0, 1, 2, 63, 64, 1000, 1373, len(table) - 1):
            low, high = exp_bounds(at, parts, 100)
            assert int(table[at]) << 69 <= high
            assert low < (int(table[at]) + 1) << 69
    assert int(exponential._tables()[0][-1]) == 0


def test_floor_log() -> None:
    source = Words(seeded("floor of the logarithm"))
    counts = np.bincount(floor_log(source, source.take(200_000)), minlength=10)
    for value in range(8):
        assert frequency_excess(int(counts[value]), 200_000, math.exp(-value) * (1 - math.exp(-1))) < 1.0


def test_floor_log_at_its_thresholds() -> None:
    """A word beside a threshold decides; one on it asks for more bits, here all zeros or all ones."""
    for k in range(1, 45):
        edge = exp_bounds(k, 1, 200)[0] >> 136
        beside = np.array([edge - 1, edge + 1], dtype=np.uint64)
        if k < 43:  # exp(-44) 2^64 is 1.4: there is no room between the last ones
            assert floor_log(_Fixed(0), beside).tolist() == [k, k - 1]
        on = np.array([edge], dtype=np.uint64)
        assert floor_log(_Fixed(0), on).tolist() == [k]
        assert floor_log(_Fixed((1 << 64) - 1), on).tolist() == [k - 1]
    # Past the table: the word is 0 and further bits say how far.
    for k in (45, 50, 60):
        further = (exp_bounds(k, 1, 128)[0] + exp_bounds(k + 1, 1, 128)[0]) // 2
        assert floor_log(_Fixed(further), np.zeros(1, dtype=np.uint64)).tolist() == [k]


class _Fixed(Words):
    """Words that repeat a cycle."""

    def __init__(self, *cycle: int) -> None:
        self._cycle, self._at = cycle, 0

    def take(self, count: int) -> np.ndarray:
        self._at += 1
        return np.full(count, self._cycle[(self._at - 1) % len(self._cycle)], dtype=np.uint64)


def test_broken_sources_end() -> None:
    with pytest.raises(LocalError, match="-ln U > 60: the random source is broken"):
        floor_log(_Fixed(0), np.zeros(4, dtype=np.uint64))


@given(st.integers(1, 1 << 80), st.integers(0, (61 << 40) - 1), st.booleans())
@settings(max_examples=2_000, deadline=None)
def test_gamma_is_enclosed(sigma_squared: int, y: int, near: bool) -> None:
    shape = discrete_gaussian._Enclosure(sigma_squared)
    assert sigma_squared <= 2 * 4**shape.tau < 4 * sigma_squared
    y %= (5 if near else 61) << shape.tau
    v = y >> shape.tau
    (low,), (high,) = shape.gamma(np.array([y], dtype=np.int64), np.array([v], dtype=np.int64))
    numerator, denominator = shape.exact(y)
    t = 2**shape.tau
    first = Fraction(y % t, t)
    assert Fraction(numerator, denominator) == first + (y - Fraction(sigma_squared, t)) ** 2 / (2 * sigma_squared)
    assert int(low) * denominator <= numerator << 50 <= int(high) * denominator
    assert int(high) < 1 << 62
    if near:  # where candidates fall: about one in a million is settled one by one
        assert int(high) - int(low) < 1 << 31


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
    honest = words.expand_ring
    monkeypatch.setattr(words, "expand_ring", lambda *args: honest(*args).view(_Whole))
    _Whole.seen = 0
    sample(sigma_squared, 3_000, seeded("types"))
    assert _Whole.seen > 30


def test_no_float_in_the_source() -> None:
    for module in (exponential, discrete_gaussian, words):
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
