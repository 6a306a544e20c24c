"""The parties of one sum in this process; boxes are not encrypted here, but bound to the terms."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sordino_common.aggregate.contributor import mask
from sordino_common.aggregate.helper import HelperSum
from sordino_common.aggregate.leader import LeaderSum, NotTaken
from sordino_common.aggregate.seeds import read_seed, seed_plaintext
from sordino_common.aggregate.shares import share_of
from sordino_common.errors import RemoteError
from sordino_common.messages import Contribution, RejectedSeed, SumCut, SumNoise, SumSeedsChecked, SumShare, SumTerms
from sordino_common.messages.sums import members_digest
from sordino_common.plan.arrays import from_numpy
from sordino_common.ring.prg import Seed

I64 = npt.NDArray[np.int64]
SESSION = bytes(range(16))


def sum_terms(**changes: object) -> SumTerms:
    fields: dict[str, object] = {
        "session": SESSION, "run": "toy-1", "index": 3, "purpose": "a test", "bits": 32, "length": 7, "bound": 1000,
        "helpers": ("helper-0", "helper-1"), "minimum": 2, "most": 10_000, "noise": None,
    }  # fmt: skip
    return SumTerms(**{**fields, **changes})  # type: ignore[arg-type]


def seeded(seed: int) -> Callable[[int], bytes]:
    """A reproducible stand-in for the cryptographic generator."""
    return random.Random(seed).randbytes


def names(count: int) -> list[str]:
    return [f"agent-{k:05d}" for k in range(count)]


def no_noise(_sigma_squared: int, _count: int) -> I64:
    raise AssertionError("no noise was asked for")


def rounded_gaussian(seed: int) -> Callable[[int, int], I64]:
    """Integer noise that is close enough for tests of the plumbing."""
    rng = np.random.default_rng(seed)
    return lambda sigma_squared, count: np.rint(rng.normal(size=count) * sigma_squared**0.5).astype(np.int64)


@dataclass
class Helper:
    """A helper's program, without its desk: opens nothing, for these boxes are plain."""

    name: str
    terms: SumTerms
    roster: frozenset[str]
    at_least: int = 2
    draw: Callable[[int, int], I64] = no_noise
    sum: HelperSum = field(init=False)

    def __post_init__(self) -> None:
        self.sum = HelperSum(self.terms, helper=self.name)

    def check(self, boxes: Mapping[str, bytes]) -> SumSeedsChecked:
        accepted, rejected = [], []
        for name, box in boxes.items():
            try:
                self.sum.accept(name, read_seed(box, self.sum.digest))
                accepted.append(name)
            except RemoteError as error:
                rejected.append(RejectedSeed(name=name, reason=str(error)))
        return SumSeedsChecked(session=self.terms.session, accepted=tuple(accepted), rejected=tuple(rejected))

    def answer(self, cut: SumCut) -> SumShare:
        seeds = self.sum.cut(cut.members, at_least=self.at_least, roster=self.roster)
        share = share_of(self.terms, helper=self.name, members=cut.members, seeds=seeds, draw=self.draw)
        return SumShare(session=cut.session, members=members_digest(cut.members), share=from_numpy(share))


@dataclass
class Circle:
    """All parties of one sum."""

    terms: SumTerms
    asked: list[str]
    draw: Callable[[int, int], I64] = no_noise
    leader: LeaderSum = field(init=False)
    helpers: dict[str, Helper] = field(init=False)

    def __post_init__(self) -> None:
        self.leader = LeaderSum(self.terms, asked=self.asked)
        roster = frozenset(self.asked)
        self.helpers = {name: Helper(name, self.terms, roster, draw=self.draw) for name in self.terms.helpers}

    def contribution(self, name: str, x: I64, *, seed: int = 0) -> Contribution:
        masked = mask(x, self.terms, contributor=name, random=seeded(zlib.crc32(f"{name} {seed}".encode())))
        return contribution_of(self.terms, masked.words, [seed.expose() for seed in masked.seeds])

    def give(self, name: str, message: Contribution) -> str | None:
        """Deliver to the leader and the boxes to the helpers; why it was not taken, if it was not."""
        try:
            boxes = self.leader.contribute(name, message)
        except NotTaken as error:
            return str(error)
        for helper, box in boxes.items():
            self.leader.checked(helper, self.helpers[helper].check({name: box}))
        return None

    def finish(self) -> I64:
        cut = self.leader.cut()
        for name, helper in self.helpers.items():
            self.leader.share(name, helper.answer(cut))
        return self.leader.result(self.draw)


def contribution_of(terms: SumTerms, words: npt.NDArray[np.generic], seeds: Iterable[bytes]) -> Contribution:
    boxes = tuple(seed_plaintext(seed, terms) for seed in seeds)
    return Contribution(session=terms.session, masked=from_numpy(words), boxes=boxes, seconds=0.5)


def vectors(count: int, length: int, *, bound: int, seed: int = 0) -> I64:
    """[count, length] integers of at most `bound` in size, the extremes among them."""
    x = np.random.default_rng(seed).integers(-bound, bound + 1, size=(count, length))
    x[0], x[-1] = bound, -bound
    return x.astype(np.int64)


def noise_of(sigma_squared: int) -> SumNoise:
    return SumNoise(sigma_squared=sigma_squared)


def opened(count: int = 4, **changes: object) -> tuple[Helper, list[str]]:
    """A helper that holds `count` seeds."""
    terms = sum_terms(**changes)
    helper = Helper("helper-0", terms, frozenset(names(count + 2)))
    for name in names(count):
        helper.sum.accept(name, Seed(seeded(len(name))(32)))
    return helper, names(count)
