"""What the leader of a secure sum sees, with all helpers but one beside it, is uniform."""

from __future__ import annotations

import math

import numpy as np
import pytest

from helpers_sums import names, opened, seeded, sum_terms
from sordino_common.aggregate.contributor import mask
from sordino_common.aggregate.masks import add_mask, mask_info
from sordino_common.ring.prg import Seed

SCORE = 6.1  # the normal tail beyond 6.1 is 5.3e-10; with fewer than 100 tables a test, false alarms stay below 1e-7


def score(words: np.ndarray) -> float:
    """Chi-square of the words' bytes against uniform, the worst byte position, as a standard normal score
    (Wilson-Hilferty: the cube root of X / k is normal with mean 1 - 2/(9k) and variance 2/(9k))."""
    raw = np.ascontiguousarray(words).view(np.uint8).reshape(-1, words.dtype.itemsize)
    worst = -math.inf
    for position in range(raw.shape[1]):
        counts = np.bincount(raw[:, position], minlength=256)
        expected = len(raw) / 256
        statistic = float(((counts - expected) ** 2 / expected).sum())
        spread = 2 / (9 * 255)
        worst = max(worst, ((statistic / 255) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))
    return worst


def views(bad: str = "") -> dict[str, np.ndarray]:
    """What a leader sees that works together with helper-1, of 8 contributors that send the largest vector there is, in
    two sums: masked vectors without helper-1's mask, their differences between contributors and between sums."""
    seen: dict[tuple[int, int], np.ndarray] = {}
    for index in range(2):
        terms = sum_terms(length=20_000, bits=32, bound=1 << 20, most=8, session=bytes([index] * 16), index=index)
        digest = bytes(32) if bad == "same key in two sums" else terms.digest
        for k, name in enumerate(names(8)):
            x = np.full(20_000, 1 << 20, np.int64)
            random = seeded(1 + k + 8 * index)
            if bad == "":
                masked = mask(x, terms, contributor=name, random=random)
                words, seeds = masked.words.copy(), masked.seeds
            else:
                words = x.astype(np.uint32)
                seeds = (Seed(random(32)), Seed(random(32)))
                if bad == "same seed for all":
                    seeds = (Seed(bytes(32)), seeds[1])
                if bad == "same key in two sums":
                    seeds = (Seed(bytes([k] * 32)), seeds[1])
                who = "" if bad == "same seed for all" else name
                if bad != "no mask of the honest helper":
                    add_mask(words, terms, seeds[0], mask_info(digest, who, "helper-0"), negative=True)
                add_mask(words, terms, seeds[1], mask_info(terms.digest, name, "helper-1"), negative=True)
            add_mask(words, terms, seeds[1], mask_info(terms.digest, name, "helper-1"))
            if bad == "folded to 8 bits":
                words &= np.uint32(0xFFFFFF)
            seen[index, k] = words
    return {
        "masked vectors": np.concatenate(list(seen.values())),
        "differences between contributors": np.concatenate([seen[0, k] - seen[0, k + 1] for k in range(7)]),
        "differences between sums": np.concatenate([seen[0, k] - seen[1, k] for k in range(8)]),
    }


def test_what_the_leader_sees_is_uniform() -> None:
    """With all helpers but one colluding. The vectors are constant, as far from uniform as can be."""
    for what, words in views().items():
        assert score(words) < SCORE, what


@pytest.mark.parametrize(
    ("bad", "caught_by"),
    [
        ("no mask of the honest helper", "masked vectors"),
        ("folded to 8 bits", "masked vectors"),
        ("same seed for all", "differences between contributors"),
        ("same key in two sums", "differences between sums"),
    ],
)
def test_bad_masks_are_seen(bad: str, caught_by: str) -> None:
    assert score(views(bad)[caught_by]) > SCORE


def test_without_helpers_who_collude_the_whole_vector_is_uniform() -> None:
    terms = sum_terms(length=50_000, bits=64, bound=1 << 20, most=8)
    y = [
        mask(np.zeros(50_000, np.int64), terms, contributor=name, random=seeded(k)).words
        for k, name in enumerate(names(4))
    ]
    assert score(np.concatenate(y)) < SCORE


def test_a_seed_used_twice_gives_two_masks() -> None:
    """Misuse that the key's label forgives: one seed for two helpers, two contributors, or two sums."""
    terms = sum_terms(length=64)
    seed = Seed(bytes(32))
    masks = []
    for digest, who, helper in (
        (terms.digest, "a", "h"),
        (terms.digest, "a", "i"),
        (terms.digest, "b", "h"),
        (sum_terms(index=9).digest, "a", "h"),
    ):
        words = np.zeros(64, np.uint32)
        add_mask(words, terms, seed, mask_info(digest, who, helper))
        masks.append(words.tobytes())
    assert len(set(masks)) == 4


def test_nothing_secret_is_in_a_repr() -> None:
    terms = sum_terms()
    masked = mask(np.ones(7, np.int64), terms, contributor="agent-00000")
    assert repr(masked) == "Masked(uint32[7], 2 seeds, hidden)"
    helper, _ = opened()
    assert repr(helper.sum) == "HelperSum(4 seeds, hidden)"
    assert "hidden" in repr(masked.seeds[0])
