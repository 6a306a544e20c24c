"""What travels in the sealed box of a seed. No NumPy: daemons seal and open."""

from __future__ import annotations

from typing import Final

from sordino_common.errors import CodecError
from sordino_common.messages.sums import SumTerms
from sordino_common.ring.seed import SEED_BYTES, Seed

DIGEST_BYTES: Final = 32
BOX_KIND: Final = "seed"  # of the sealed box; its session is the terms' session, its round their index


def seed_plaintext(seed: bytes, terms: SumTerms) -> bytes:
    """What is sealed to a helper: the seed, and the digest of the very terms (noise included) that it is meant for."""
    return seed + terms.digest


def read_seed(plaintext: bytes, terms_digest: bytes) -> Seed:
    """The seed in an opened box. Raises `CodecError` if it was sealed under other terms."""
    if len(plaintext) != SEED_BYTES + DIGEST_BYTES:
        raise CodecError(f"a seed's box holds {len(plaintext)} bytes, expected {SEED_BYTES + DIGEST_BYTES}")
    if plaintext[SEED_BYTES:] != terms_digest:
        raise CodecError("the seed was sealed under other terms than those that the leader shows")
    return Seed(plaintext[:SEED_BYTES])
