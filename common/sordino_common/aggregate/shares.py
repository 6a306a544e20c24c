"""A helper's share: Σ_{i in U} PRG(seed_i) + N_Z(0, σ²) mod 2^b. One accumulator and one chunk in memory, for any N.

Work: N · length words of the cipher's stream and as many additions; 32 bytes per contributor come in, b/8 bytes an
entry go out, however many contributors there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sordino_common.aggregate.masks import DrawNoise, Words, add_mask, add_noise, dtype_of, mask_info
from sordino_common.errors import LocalError
from sordino_common.messages.sums import SumTerms
from sordino_common.ring.seed import Seed


def share_of(
    terms: SumTerms,
    *,
    helper: str,
    members: Sequence[str],
    seeds: Sequence[Seed],
    draw: DrawNoise,
    check: Callable[[], None] | None = None,
) -> Words:
    """The share of `helper` for `members`, whose seeds are `seeds`. `check` is called between contributors and may
    raise to stop the work."""
    if len(members) != len(seeds) or not members:
        raise LocalError(f"share: {len(seeds)} seeds for {len(members)} members")
    share: Words = np.zeros(terms.length, dtype=dtype_of(terms))
    digest = terms.digest
    for name, seed in zip(members, seeds, strict=True):
        if check is not None:
            check()
        add_mask(share, terms, seed, mask_info(digest, name, helper))
    if terms.noise is not None:
        add_noise(share, terms, terms.noise, draw)
    return share
