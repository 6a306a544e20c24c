"""Hashes that bind a check to its session: the transcript of openings, commitments, the joint seed.

    commitment of a seed    H("seed", session, check, party, seed)              32 random bytes hide themselves
    joint seed              H("joint", session, check, all seeds in order)      only the dealer knows it before all are
                                                                                committed
    commitment of σ         H("sigma", session, check, party, σ, nonce)

H is SHA-256 over an injective encoding; `session` is `SessionSpec.bound`, so nothing fits another session, nor one that
a member was told other terms of. For the joint seed it is `SessionSpec.digest`: the dealer need not know the terms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sordino_common.ring.prg import label
from sordino_common.spdz.spec import SessionSpec

HASH_BYTES: Final = 32
SEED_BYTES: Final = 32
NONCE_BYTES: Final = 32
SIGMA_BYTES: Final = 16


class Transcript:
    """A running SHA-256 over every value that was opened to the committee, in order."""

    def __init__(self, spec: SessionSpec) -> None:
        self._hash = hashlib.sha256(label("sordino spdz transcript v1", spec.bound))

    def add(self, kind: str, step: int, attempt: int, round_: int, name: str, opened: npt.NDArray[Any]) -> None:
        head, data = (
            label(kind, step, attempt, round_, name, opened.size),
            np.ascontiguousarray(opened, dtype="<i8").data,
        )
        self._hash.update(head)  # all or nothing: what fails for want of memory may be tried again (`Party.catch_up`)
        self._hash.update(data)

    def digest(self) -> bytes:
        """Of everything so far; more may be added."""
        return self._hash.copy().digest()


def _hash(*parts: str | int | bytes) -> bytes:
    return hashlib.sha256(label(*parts)).digest()


def commit_seed(spec: SessionSpec, check: int, party: int, seed: bytes) -> bytes:
    return _hash("sordino spdz seed commitment v1", spec.bound, check, party, seed)


def joint_seed(spec: SessionSpec, check: int, seeds: Sequence[bytes]) -> bytes:
    return _hash("sordino spdz joint seed v2", spec.digest, check, *seeds)


def commit_sigma(spec: SessionSpec, check: int, party: int, sigma: bytes, nonce: bytes) -> bytes:
    return _hash("sordino spdz sigma commitment v1", spec.bound, check, party, sigma, nonce)
