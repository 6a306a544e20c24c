"""A helper's side of one sum, without I/O and without NumPy: whose seeds it holds, and the one cut that it answers.

The caller has opened the boxes (`seeds.py`), journals a cut before it computes the share, and computes it elsewhere
(`shares.py`). Security: a share is Σ_{i in U} PRG(seed_i); two shares for two sets of one session would differ by the
masks of single contributors, and with them the leader would know their vectors. Hence one answer, whatever is asked.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Final

from sordino_common.aggregate.terms import check_terms
from sordino_common.errors import CodecError, PolicyRefusal, RemoteError
from sordino_common.messages.sums import SumTerms
from sordino_common.ring.seed import Seed


class SumAnswered(RemoteError):
    """A helper has answered a cut of this session, or another session of this (run, index): it answers one."""

    code = "sum-answered"


class HelperSum:
    """One session's seeds. Raises `CodecError` at construction for terms that a helper does not serve."""

    def __init__(self, terms: SumTerms, *, helper: str) -> None:
        if helper not in terms.helpers:
            raise CodecError(f"{helper} is not among the helpers of the sum: {', '.join(terms.helpers)}")
        check_terms(terms)
        self.terms: Final = terms
        self.digest: Final = terms.digest
        self.answered = False
        self._seeds: dict[str, Seed] = {}

    def __repr__(self) -> str:
        return f"HelperSum({len(self._seeds)} seeds, hidden)"

    def require_same(self, terms: SumTerms) -> None:
        """Raise `CodecError` if the session comes with other terms than before."""
        if terms != self.terms:
            raise CodecError("the session has begun under other terms: a sum's terms do not change")

    def require_open(self, name: str) -> None:
        """Raise unless a seed of `name` could be taken now: `SumAnswered`, or `CodecError` for a second one."""
        if self.answered:
            raise SumAnswered("the seed comes after the cut")
        if name in self._seeds:
            raise CodecError(f"a second seed of {name}: the first one counts")
        if len(self._seeds) >= self.terms.most:
            raise CodecError(f"the terms allow {self.terms.most} contributors, and as many seeds are here")

    def accept(self, name: str, seed: Seed) -> None:
        """Hold the seed of contributor `name`. Raises as `require_open`."""
        self.require_open(name)
        self._seeds[name] = seed

    def check_cut(self, members: Sequence[str], *, at_least: int, roster: Collection[str]) -> None:
        """Raise unless the cut may be answered: `SumAnswered`; `PolicyRefusal` if U is smaller than the terms and this
        device's policy (`at_least`) allow; `CodecError` for members that are not in order, not in the roster, or
        without a seed here."""
        if self.answered:
            raise SumAnswered("this session's cut was answered before; a helper answers once")
        if any(a >= b for a, b in pairwise(members)):
            raise CodecError("the members of the cut are not in ascending order, each once")
        minimum = max(self.terms.minimum, at_least)
        if len(members) < minimum:
            raise PolicyRefusal(
                f"a sum of {len(members)} contributors: the terms say at least {self.terms.minimum}, this helper's "
                f"policy.min_cohort {at_least}"
            )
        if len(members) > self.terms.most:
            raise CodecError(f"a sum of {len(members)} contributors, the terms say at most {self.terms.most}")
        strangers = [name for name in members if name not in roster]
        if strangers:
            raise CodecError(f"not in the roster as owners of data: {', '.join(strangers[:10])}")
        unknown = [name for name in members if name not in self._seeds]
        if unknown:
            raise CodecError(f"no seed was taken from {', '.join(unknown[:10])}")

    def cut(self, members: Sequence[str], *, at_least: int, roster: Collection[str]) -> tuple[Seed, ...]:
        """The members' seeds, in order; all others are forgotten. Call it when the answer is journalled. Raises as
        `check_cut`; then nothing has changed."""
        self.check_cut(members, at_least=at_least, roster=roster)
        self.answered = True
        seeds = tuple(self._seeds[name] for name in members)
        self._seeds.clear()
        return seeds
