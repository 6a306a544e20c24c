"""The leader's side of one sum: who is in, who is excluded and why, one accumulator, and the sum in the end.

    asked -> waiting (vector here, boxes with the helpers) -> added (every helper holds the seed)
          -> excluded, by name and with the reason: malformed, foreign, late, no room, rejected by a helper

A vector is added when all helpers have accepted its seeds, and is then gone; so nothing has to be taken back. Vectors
that wait are bounded (`waiting_bytes`). After the cut come the shares, one of each helper:

    Σ_U y_i + Σ_j share_j + noise = Σ_U x_i + (helpers + 1) noises      mod 2^b, decoded as signed

The leader sees y_i (uniform if one helper is honest), boxes that it can't open, shares, and the sum.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from sordino_common.aggregate.masks import DrawNoise, Words, add_noise, dtype_of
from sordino_common.aggregate.terms import check_terms
from sordino_common.errors import CodecError, LocalError, RemoteError
from sordino_common.messages.array import Array
from sordino_common.messages.sums import Contribution, SumCut, SumSeedsChecked, SumShare, SumTerms, members_digest
from sordino_common.plan.arrays import to_numpy

WAITING_BYTES: Final = 256 << 20

Phase = Literal["open", "cut", "done"]


class NotTaken(RemoteError):
    """A contribution or a share that is not taken. The text says why; the sum goes on without it."""

    code = "not-taken"


class LeaderSum:
    """One session. `asked`: who may contribute. Every method that raises has changed nothing but `excluded`."""

    def __init__(self, terms: SumTerms, *, asked: Collection[str], waiting_bytes: int = WAITING_BYTES) -> None:
        check_terms(terms)
        if len(asked) > terms.most:
            raise LocalError(f"sum: {len(asked)} are asked, the terms say at most {terms.most}")
        self.terms: Final = terms
        self.phase: Phase = "open"
        self.excluded: dict[str, str] = {}
        self._asked: Final = frozenset(asked)
        self._most_waiting: Final = max(1, waiting_bytes // (terms.length * terms.word_bytes))
        self._sum: Words = np.zeros(terms.length, dtype=dtype_of(terms))
        self._waiting: dict[str, tuple[Array, set[str]]] = {}  # the vector, and the helpers that are still to answer
        self._added: set[str] = set()
        self._members: tuple[str, ...] = ()
        self._shares: set[str] = set()

    # --- contributions ---------------------------------------------------------------------------------------------

    @property
    def added(self) -> frozenset[str]:
        """Whose vectors are in the sum."""
        return frozenset(self._added)

    @property
    def waiting(self) -> frozenset[str]:
        """Whose vectors wait until every helper holds their seeds."""
        return frozenset(self._waiting)

    @property
    def unconfirmed(self) -> tuple[str, ...]:
        """Helpers that have not said of everybody who waits whether they hold the seed."""
        return tuple(
            name for name in self.terms.helpers if any(name in missing for _, missing in self._waiting.values())
        )

    def contribute(self, name: str, message: Contribution) -> Mapping[str, bytes]:
        """Take the contribution of `name`; the boxes to relay, by helper. Raises `NotTaken`: then `name` is excluded,
        unless an earlier contribution of theirs is in."""
        try:
            self._check_contribution(name, message)
        except NotTaken as error:
            if name in self._asked and name not in self._added and name not in self._waiting:
                self.excluded[name] = str(error)
            raise
        self._waiting[name] = (message.masked, set(self.terms.helpers))
        return dict(zip(self.terms.helpers, message.boxes, strict=True))

    def exclude(self, name: str, why: str) -> None:
        """`name` will not contribute: refused, gone, too late. Nothing happens if their vector is in already."""
        if name not in self._added:
            self._waiting.pop(name, None)
            self.excluded[name] = why

    def checked(self, helper: str, message: SumSeedsChecked) -> None:
        """What `helper` says of the seeds that it was sent. Raises `CodecError` for another session or a stranger."""
        if helper not in self.terms.helpers or message.session != self.terms.session:
            raise CodecError(f"{helper} speaks of seeds of another sum")
        if self.phase != "open":
            return
        for entry in message.rejected:
            if entry.name in self._waiting:
                self.exclude(entry.name, f"helper {helper} rejects its seed: {entry.reason}")
        for name in message.accepted:
            vector, missing = self._waiting.get(name, (None, set()))
            if vector is None:
                continue
            missing.discard(helper)
            if not missing:
                del self._waiting[name]
                self._sum += to_numpy(vector)
                self._added.add(name)

    def _check_contribution(self, name: str, message: Contribution) -> None:
        terms, masked = self.terms, message.masked
        if name not in self._asked:
            raise NotTaken("was not asked to contribute to this sum")
        if message.session != terms.session:
            raise NotTaken("a contribution to another sum")
        if name in self._added or name in self._waiting:
            raise NotTaken("a second contribution: the first one counts")
        if name in self.excluded:
            raise NotTaken(f"is excluded already: {self.excluded[name]}")
        if self.phase != "open":
            raise NotTaken("too late: the set of contributors was fixed")
        wanted = dtype_of(terms).name
        if masked.dtype != wanted or masked.shape != (terms.length,):
            raise NotTaken(f"its vector is {masked.dtype}{list(masked.shape)}, expected {wanted}[{terms.length}]")
        if len(message.boxes) != len(terms.helpers):
            raise NotTaken(f"{len(message.boxes)} sealed seeds for {len(terms.helpers)} helpers")
        if len(self._waiting) >= self._most_waiting:
            raise NotTaken(
                f"no room: {len(self._waiting)} vectors wait for the helpers, as many as the leader holds at a time"
            )

    # --- cut and shares --------------------------------------------------------------------------------------------

    def cut(self) -> SumCut:
        """Fix U: whose vectors are in. Who still waits is excluded. Raises `LocalError` if they are too few, or if the
        set is fixed already."""
        if self.phase != "open":
            raise LocalError("sum: the set of contributors is fixed already")
        if len(self._added) < self.terms.minimum:
            raise LocalError(f"sum: {len(self._added)} contributions, the terms say at least {self.terms.minimum}")
        for name, (_, missing) in list(self._waiting.items()):
            self.exclude(name, f"helper {', '.join(sorted(missing))} had not confirmed its seed at the cut")
        self.phase = "cut"
        self._members = tuple(sorted(self._added))
        return SumCut(session=self.terms.session, members=self._members)

    def share(self, helper: str, message: SumShare) -> None:
        """Add a helper's share. Raises `NotTaken`; without a good share of every helper there is no sum."""
        if helper not in self.terms.helpers or message.session != self.terms.session:
            raise NotTaken("a share of another sum")
        if self.phase != "cut":
            raise NotTaken("a share before the set of contributors was fixed, or after the sum")
        if helper in self._shares:
            raise NotTaken("a second share: the first one counts")
        if message.members != members_digest(self._members):
            raise NotTaken("a share of another set of contributors")
        wanted = dtype_of(self.terms).name
        if message.share.dtype != wanted or message.share.shape != (self.terms.length,):
            raise NotTaken(
                f"its share is {message.share.dtype}{list(message.share.shape)}, expected {wanted}[{self.terms.length}]"
            )
        self._sum += to_numpy(message.share)
        self._shares.add(helper)

    @property
    def missing_shares(self) -> tuple[str, ...]:
        return tuple(name for name in self.terms.helpers if name not in self._shares)

    @property
    def members(self) -> tuple[str, ...]:
        """U, ascending; empty before the cut."""
        return self._members

    def result(self, draw: DrawNoise) -> npt.NDArray[np.int64]:
        """Σ_U x_i + noise, int64[length]. The leader's own noise is added now. Raises `LocalError` before the last
        share is in, or the second time."""
        if self.phase != "cut" or self.missing_shares:
            raise LocalError(f"sum: no result yet; shares are missing of {', '.join(self.missing_shares) or 'all'}")
        self.phase = "done"
        if self.terms.noise is not None:
            add_noise(self._sum, self.terms, self.terms.noise, draw)
        signed = self._sum.view(np.dtype("<i4" if self.terms.bits == 32 else "<i8"))
        return signed.astype(np.int64)
