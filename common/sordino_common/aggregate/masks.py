"""Masks of a sum: PRG(seed) as words of Z_2^32 or Z_2^64, added into an accumulator chunk by chunk.

The key of a mask names the terms, the contributor and the helper: a seed that somebody uses twice, for two helpers or
in two sums, still gives independent masks. Memory beside the accumulator: one chunk, whatever the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError
from sordino_common.messages.sums import SumNoise, SumTerms
from sordino_common.ring.prg import Seed, Stream, label

Words = npt.NDArray[np.uint32] | npt.NDArray[np.uint64]
# `draw(sigma_squared, count)`: that many values of N_Z(0, sigma_squared), int64.
DrawNoise = Callable[[int, int], npt.NDArray[np.int64]]
CHUNK_BYTES: Final = 1 << 17  # half of a small board's L2 cache, so that chunk and accumulator's part both fit


def dtype_of(terms: SumTerms) -> np.dtype[Any]:
    """uint32 or uint64, little-endian."""
    return np.dtype("<u4" if terms.bits == 32 else "<u8")


def mask_info(terms_digest: bytes, contributor: str, helper: str) -> bytes:
    return label("sum-mask", terms_digest, contributor, helper)


def chunks(terms: SumTerms) -> Iterator[slice]:
    """The accumulator's parts, one after the other."""
    step = CHUNK_BYTES // terms.word_bytes
    for start in range(0, terms.length, step):
        yield slice(start, min(start + step, terms.length))


def add_mask(into: Words, terms: SumTerms, seed: Seed, info: bytes, *, negative: bool = False) -> None:
    """`into` += PRG(seed, info), or -= it, mod 2^bits, in place."""
    _require(into, terms)
    combine = np.subtract if negative else np.add
    stream = Stream(seed, info)
    buffer = np.empty(min(terms.length, CHUNK_BYTES // terms.word_bytes), dtype=dtype_of(terms))
    for part in chunks(terms):
        piece = buffer[: part.stop - part.start]
        stream.fill(piece.view(np.uint8).data)
        combine(into[part], piece, out=into[part])


def add_noise(into: Words, terms: SumTerms, noise: SumNoise, draw: DrawNoise) -> None:
    """`into` += N_Z(0, σ²) on every entry, mod 2^bits, in place. Raises `LocalError` if `draw` gives no int64."""
    _require(into, terms)
    for part in chunks(terms):
        drawn = draw(noise.sigma_squared, part.stop - part.start)
        if drawn.dtype != np.int64 or drawn.shape != (part.stop - part.start,):
            raise LocalError(f"noise: expected int64[{part.stop - part.start}], got {drawn.dtype}{list(drawn.shape)}")
        into[part] += drawn.astype(into.dtype)  # two's complement: mod 2^bits


def _require(into: Words, terms: SumTerms) -> None:
    if into.dtype != dtype_of(terms) or into.shape != (terms.length,) or not into.flags.c_contiguous:
        raise LocalError(f"sum: expected {dtype_of(terms)}[{terms.length}], got {into.dtype}{list(into.shape)}")
