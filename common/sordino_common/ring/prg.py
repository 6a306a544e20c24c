"""Pseudo-random generation of masks: ChaCha20 keyed by HKDF, written straight into arrays.

One key per use: key = HKDF-SHA256(seed, info), where `info` names session, plan hash, step, gate, kind and party,
joined by `label` so that no two different tuples give the same bytes. With a fresh key the nonce may be zero. The
stream is the RFC 8439 key stream from block 0; a key gives at most 2^38 bytes (the 32-bit block counter), far beyond
any single use.

Why not AES-CTR: all parties must expand a seed to the same bytes, so there is one cipher for all machines. On x86-64
with AES instructions AES-256-CTR gives 1.3 to 2 times the bytes a second (`benchmarks/bench_ring.py`), a few us of a
step; a Raspberry Pi 4 has no such instructions, and AES by table is slow there and leaks through the cache.

NumPy's generators are forbidden for masks: they are not cryptographic, and slower (0.24 GB/s for Philox here).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from sordino_common.errors import LocalError
from sordino_common.ring.seed import SEED_BYTES, Seed

__all__ = ["SEED_BYTES", "Seed", "Stream", "expand_bytes", "expand_ring", "label"]

_MAX_STREAM_BYTES: Final = 1 << 38
_CHUNK: Final = 1 << 18  # zeros to encrypt at a time: fits the L2 cache beside the output
_ZEROS: Final = memoryview(bytes(_CHUNK))  # its slices are no copies
_SHA256: Final = SHA256()
_NONCE: Final = bytes(16)
_INTEGER: Final = b"i" + (9).to_bytes(4, "big")


def label(*parts: str | int | bytes) -> bytes:
    """An injective encoding of `parts`: type letter, 4-byte length, content, for each. Of two rows of parts, one after
    the other, it is their encodings one after the other."""
    out = []
    for part in parts:
        if isinstance(part, int):
            out.append(_INTEGER + part.to_bytes(9, "big", signed=True))
        elif isinstance(part, str):
            raw = part.encode()
            out.append(b"s" + len(raw).to_bytes(4, "big") + raw)
        else:
            out.append(b"b" + len(part).to_bytes(4, "big") + part)
    return b"".join(out)


class Stream:
    """The stream of (seed, info), piece after piece: each `fill` goes on where the last one ended."""

    __slots__ = ("_encryptor", "_left")

    def __init__(self, seed: Seed, info: bytes) -> None:
        # HKDF in its two steps: the first is the same for all uses of a seed.
        key = HKDFExpand(_SHA256, 32, b"sordino prg v1\0" + info).derive(seed.extracted(_extract))
        self._encryptor = Cipher(ChaCha20(key, _NONCE), mode=None).encryptor()
        self._left = _MAX_STREAM_BYTES

    def fill(self, out: memoryview) -> None:
        """Fill `out` (writable, contiguous, bytes) with the stream's next bytes."""
        if out.nbytes > self._left:
            raise LocalError(f"expand: {out.nbytes} bytes more from one key; split the use into several infos")
        self._left -= out.nbytes
        for start in range(0, out.nbytes, _CHUNK):
            part = out[start : start + _CHUNK]
            self._encryptor.update_into(_ZEROS[: part.nbytes], part)


def _extract(secret: bytes) -> bytes:
    return HKDF.extract(_SHA256, None, secret)


def expand_bytes(seed: Seed, info: bytes, out: memoryview) -> None:
    """Fill `out` (writable, contiguous, bytes) with the stream of (seed, info)."""
    Stream(seed, info).fill(out)


def expand_ring(
    seed: Seed, info: bytes, shape: tuple[int, ...], out: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.int64]:
    """Uniform elements of Z_2^64 (int64, little-endian reading of the stream), shape `shape`; into `out` if given."""
    if out is None:
        out = np.empty(shape, dtype="<i8")
    elif out.shape != shape or out.dtype != np.dtype("<i8") or not out.flags.c_contiguous:
        raise LocalError(f"expand: `out` must be C-contiguous int64{list(shape)}, got {out.dtype}{list(out.shape)}")
    if out.size:
        expand_bytes(seed, info, out.reshape(-1).view(np.uint8).data)
    return out
