"""A contributor's side: y = x - Σ_j PRG(seed_j) mod 2^b, with a fresh 32-byte seed for every helper.

Without one of the seeds y is uniform and independent of x. Bytes: b/8 an entry to the leader, 32 to each helper
(sealed: about 210). The vector is checked against the terms' own bound: what does not fit is refused, not wrapped.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sordino_common.aggregate.masks import Words, add_mask, dtype_of, mask_info
from sordino_common.aggregate.terms import check_terms
from sordino_common.errors import LimitExceeded, LocalError
from sordino_common.messages.sums import SumTerms
from sordino_common.ring.seed import SEED_BYTES, Seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Masked:
    """y, and the seeds of its masks in the order of `terms.helpers`."""

    words: Words
    seeds: tuple[Seed, ...]

    def __repr__(self) -> str:
        return f"Masked({self.words.dtype}[{self.words.size}], {len(self.seeds)} seeds, hidden)"


def mask(
    x: npt.NDArray[np.int64], terms: SumTerms, *, contributor: str, random: Callable[[int], bytes] = os.urandom
) -> Masked:
    """Mask `x` (int64[length], at most `terms.bound` in size). Raises `LimitExceeded` if an entry is larger,
    `CodecError` for terms that let the sum wrap."""
    check_terms(terms)
    if x.dtype != np.int64 or x.shape != (terms.length,):
        raise LocalError(f"sum: expected int64[{terms.length}], got {x.dtype}{list(x.shape)}")
    largest = max(int(x.max()), -int(x.min()))
    if largest > terms.bound:
        raise LimitExceeded(
            "an entry of the contribution is beyond the bound that the terms of the sum state; a larger bound "
            "(secure_aggregation.largest in the job) may take it"  # not by how much: that is the device's own
        )
    words = x.astype(dtype_of(terms))  # two's complement: mod 2^bits
    seeds = tuple(Seed(random(SEED_BYTES)) for _ in terms.helpers)
    digest = terms.digest
    for helper, seed in zip(terms.helpers, seeds, strict=True):
        add_mask(words, terms, seed, mask_info(digest, contributor, helper), negative=True)
    return Masked(words=words, seeds=seeds)
