"""Random 64-bit words for the samplers: a ChaCha20 stream of a fresh key for every draw.

The key comes from a source of bytes that the caller passes (`os.urandom` in the field, a seeded one in the simulator).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sordino_common.ring.prg import SEED_BYTES, Seed, Stream, label

RandomBytes = Callable[[int], bytes]
U64 = npt.NDArray[np.uint64]


class Words:
    """A stream of uniform uint64, keyed once. Not to be shared between two uses; never prints its state."""

    __slots__ = ("_stream",)

    def __init__(self, random: RandomBytes = os.urandom) -> None:
        self._stream = Stream(Seed(random(SEED_BYTES)), label("privacy words"))

    def take(self, count: int) -> U64:
        """`count` fresh words, uint64[count]: the stream's bytes as they come, read little-endian."""
        out = np.empty(count, dtype="<u8")
        if count:
            self._stream.fill(out.view(np.uint8).data)
        return out
