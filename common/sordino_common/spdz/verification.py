"""The four messages of a check, as a machine: commit, open, commit, open.

    check-1   hash of all openings so far, commitment of this check's seed  hashes differ: EquivocationError
    check-2   the seed                                                      not the committed one: CommitmentError
    check-3   commitment of σ_i (`check`, with coefficients from all seeds together), once `work` has computed it
    check-4   σ_i and the commitment's nonce                                sum is not 0: MacCheckError

A member's seed leaves when all others have told it that they saw the same openings and are bound to their seeds, so the
coefficients come after the openings; its σ leaves when all others' are committed to it, so nobody can make the sum 0
for this member. Somebody who withholds a message from one member can hear another's seed or σ first; what he does not
know then is the share of the one whom he would deceive.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from sordino_common.errors import LocalError
from sordino_common.ring.prg import Seed
from sordino_common.spdz.check import Checker, Record
from sordino_common.spdz.effects import KINDS, Kind
from sordino_common.spdz.errors import CommitmentError, EquivocationError, MacCheckError
from sordino_common.spdz.spec import SessionSpec
from sordino_common.spdz.transcript import (
    HASH_BYTES,
    NONCE_BYTES,
    SEED_BYTES,
    SIGMA_BYTES,
    commit_seed,
    commit_sigma,
    joint_seed,
)

Said = tuple[Kind, bytes]
SIZES: Final[Mapping[str, int]] = {
    "check-1": 2 * HASH_BYTES,
    "check-2": SEED_BYTES,
    "check-3": HASH_BYTES,
    "check-4": SIGMA_BYTES + NONCE_BYTES,
}


class Verification:
    """One check, by party `index`, of everything since the last one. `step`: the last step that it covers; `seed`: this
    party's part of the joint seed (`check.coefficient_seed`)."""

    def __init__(
        self,
        spec: SessionSpec,
        index: int,
        step: int,
        *,
        checker: Checker,
        records: list[Record],
        transcript: bytes,
        seed: bytes,
        random: Callable[[int], bytes],
    ) -> None:
        self._spec = spec
        self._index = index
        self._step = step
        self._checker = checker
        self._records = records
        self._random = random
        self._hash = transcript
        self._seed = seed
        self._phase = 1
        self._seed_commitments: dict[int, bytes] = {}
        self._sigma_commitments: dict[int, bytes] = {}
        self._portions: Iterator[int | None] | None = None
        self.passed = False
        self._sigma = b""
        self._nonce = b""

    @property
    def awaits(self) -> Kind:
        """The kind of message that the others have to send next; nothing is done with it before the `work` is."""
        return KINDS[self._phase]

    @property
    def has_work(self) -> bool:
        """Whether σ_i is to be computed now."""
        return self._portions is not None

    def begin(self) -> Said:
        """The first message."""
        return "check-1", self._hash + commit_seed(self._spec, self._step, self._index, self._seed)

    def advance(self, came: Mapping[int, bytes]) -> Said | None:
        """All others' messages of the kind that was awaited, by party, of the right sizes. Returns what to say next, or
        None: there is `work` to do, or the check has passed. Raises `EquivocationError`, `CommitmentError`,
        `MacCheckError`."""
        if self.has_work:
            raise LocalError(f"{self.awaits}: σ is not computed yet")
        if len(came) != len(self._spec.parties) - 1:
            raise LocalError(
                f"{self.awaits}: messages of {len(self._spec.parties) - 1} parties expected, got {len(came)}"
            )
        phase, self._phase = self._phase, self._phase + 1
        match phase:
            case 1:
                self._compare_transcripts(came)
                return "check-2", self._seed
            case 2:
                self._portions = self._checker.sigma(self._records, self._joint_seed(came))
                return None
            case 3:
                self._sigma_commitments = dict(came)
                return "check-4", self._sigma + self._nonce
            case _:
                self._judge(came)
                self.passed = True
                return None

    def work(self) -> Said | None:
        """Compute a portion of σ_i. Returns what to say, after the last one."""
        if self._portions is None:
            raise LocalError("no σ is to be computed now")
        sigma = next(self._portions)
        if sigma is None:
            return None
        self._portions = None
        self._sigma = sigma.to_bytes(SIGMA_BYTES, "little")
        self._nonce = self._random(NONCE_BYTES)
        return "check-3", commit_sigma(self._spec, self._step, self._index, self._sigma, self._nonce)

    def _compare_transcripts(self, came: Mapping[int, bytes]) -> None:
        names = self._spec.parties
        for sender, payload in sorted(came.items()):
            if not hmac.compare_digest(payload[:HASH_BYTES], self._hash):
                raise EquivocationError(
                    f"{names[sender]} has seen other openings than {names[self._index]} up to step {self._step}: "
                    "somebody told different members different things"
                )
            self._seed_commitments[sender] = payload[HASH_BYTES:]

    def _joint_seed(self, came: Mapping[int, bytes]) -> Seed:
        for sender, seed in sorted(came.items()):
            commitment = commit_seed(self._spec, self._step, sender, seed)
            if not hmac.compare_digest(commitment, self._seed_commitments[sender]):
                raise CommitmentError(f"{self._spec.parties[sender]} opened a seed that it had not committed to")
        seeds = [self._seed if k == self._index else came[k] for k in range(len(self._spec.parties))]
        return Seed(joint_seed(self._spec, self._step, seeds))

    def _judge(self, came: Mapping[int, bytes]) -> None:
        total = int.from_bytes(self._sigma, "little")
        for sender, payload in sorted(came.items()):
            sigma, nonce = payload[:SIGMA_BYTES], payload[SIGMA_BYTES:]
            commitment = commit_sigma(self._spec, self._step, sender, sigma, nonce)
            if not hmac.compare_digest(commitment, self._sigma_commitments[sender]):
                raise CommitmentError(f"{self._spec.parties[sender]} opened a check value that it had not committed to")
            total += int.from_bytes(sigma, "little")
        if total % self._checker.prime:
            raise MacCheckError(
                f"the MAC check after step {self._step} failed: a member or the preprocessing cheats, or a value left "
                "the range that the job states (spdz.ranges). Nothing was output; the session is over"
            )
