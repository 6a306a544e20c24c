"""The type of secret seeds. Apart from `prg.py` because who only carries a seed needs no NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from sordino_common.errors import LocalError

SEED_BYTES: Final = 32


class Seed:
    """32 secret bytes. Shows nothing, compares with nothing; `expose` is the one way out, to seal it to its party."""

    __slots__ = ("_bytes", "_extracted")

    def __init__(self, data: bytes) -> None:
        if len(data) != SEED_BYTES:
            raise LocalError(f"Seed: expected {SEED_BYTES} bytes, got {len(data)}")
        self._bytes = bytes(data)
        self._extracted: bytes | None = None

    def expose(self) -> bytes:
        return self._bytes

    def extracted(self, extract: Callable[[bytes], bytes]) -> bytes:
        """`extract` of the bytes, computed once: the part of a key's derivation that is the same for every use."""
        if self._extracted is None:
            self._extracted = extract(self._bytes)
        return self._extracted

    def __repr__(self) -> str:
        return "Seed(32 bytes, hidden)"

    def __eq__(self, other: object) -> bool:
        raise TypeError("a Seed is not compared; compare what was derived from it, in constant time")

    __hash__ = None  # type: ignore[assignment]  # secrets are not keys of tables

    def __bool__(self) -> bool:
        raise TypeError("a Seed has no truth value")
