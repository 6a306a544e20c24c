"""F_p on torch tensors: the kernels of `ring.fp_core` and `ring.fp_elementwise`, to the same bits, without branches.

An element's words are two int64 tensors: torch has hardly any uint64 arithmetic. Sums, products and masks are the same
bits; a logical shift is an arithmetic one and a mask; an unsigned comparison is a signed one with both top bits
flipped. Nothing here asks the device for a value, so a GPU's queue never waits.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import torch

from sordino_common.ring.fp import Fp
from sordino_common.ring.limbs import I64

Words: TypeAlias = tuple[torch.Tensor, torch.Tensor]
Factor: TypeAlias = torch.Tensor | int

_HALF: Final = 32
_HALF_MASK: Final = (1 << 32) - 1
_HIGH_MASK: Final = (1 << 63) - 1
_TOP_BIT: Final = -(1 << 63)
_WORD: Final = 1 << 64


def tensor_of(x: I64, device: torch.device) -> torch.Tensor:
    """A tensor on `device` with the values of x; on the CPU it may share x's memory."""
    contiguous = np.asarray(x, order="C")
    if not contiguous.flags.writeable:  # torch can't promise not to write
        contiguous = contiguous.copy()
    return torch.from_numpy(contiguous).to(device)


def words_of(a: Fp, device: torch.device) -> Words:
    return tensor_of(a[0].view(np.int64), device), tensor_of(a[1].view(np.int64), device)


def field_array(words: Words) -> Fp:
    """The NumPy array of a pair of words."""
    out = np.empty((2, *words[0].shape), dtype=np.uint64)
    out[0, ...] = words[0].cpu().numpy().view(np.uint64)
    out[1, ...] = words[1].cpu().numpy().view(np.uint64)
    return out


def scalar_words(alpha: int) -> tuple[int, int]:
    """A field element's words as Python integers that are written as int64."""
    return as_int64(alpha % _WORD), alpha >> 64


def as_int64(word: int) -> int:
    return word - _WORD if word >> 63 else word


def _logical_shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _unsigned_less(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a ^ _TOP_BIT) < (b ^ _TOP_BIT)


def fold(low: torch.Tensor, high: torch.Tensor, over: torch.Tensor, *, signed: bool = True) -> Words:
    """low + 2^64 (high mod 2^63) + over mod p, canonical; over: bits 127 and up, signed or not."""
    low, high = _fold_once(low, high, over, signed)
    # The high word is below 2^63 now, or 2^63 (which reads as the lowest int64), or -1.
    again = torch.where(high < 0, torch.where(high == -1, -1, 1), 0)
    low, high = _fold_once(low, high, again, signed=True)
    is_p = (low == -1) & (high == _HIGH_MASK)
    return low.masked_fill(is_p, 0), high.masked_fill(is_p, 0)


def _fold_once(low: torch.Tensor, high: torch.Tensor, over: torch.Tensor, signed: bool) -> Words:
    total = low + over
    carry = _unsigned_less(total, over).to(torch.int64)
    if signed:
        carry = carry + (over >> 63)
    return total, (high & _HIGH_MASK) + carry


def multiply(a: tuple[Factor, Factor], v: torch.Tensor, *, signed: bool = True) -> Words:
    """a v mod p, v signed or not; a: words of canonical elements, tensors or numbers. Columns as in
    `ring.fp_elementwise`."""
    (a0, a1), (a2, a3) = _halves(a[0]), _halves(a[1])

    def upper(x: torch.Tensor) -> torch.Tensor:
        return x >> _HALF if signed else _logical_shift(x, _HALF)

    v0, v1 = v & _HALF_MASK, upper(v)
    t = a1 * v0 + _logical_shift(a0 * v0, _HALF)
    s = a0 * v1 + (t & _HALF_MASK)
    t = _logical_shift(t, _HALF)
    s = upper(s) + a1 * v1
    low = a[0] * v
    high = a[1] * v + t + s
    t = t + a2 * v0
    s = s + (t & _HALF_MASK)
    t = _logical_shift(t, _HALF) + a3 * v0
    s = upper(s) + (t & _HALF_MASK) + a2 * v1
    top = _logical_shift(t, _HALF) + a3 * v1 + upper(s)
    return fold(low, high, (top << 1) | _logical_shift(high, 63), signed=signed)


def multiply_words(alpha: tuple[int, int], a: Words) -> Words:
    """alpha a mod p: alpha a_lo + 2^64 (alpha a_hi). 2^128 = 2, so times 2^64 the words change places."""
    low, high = multiply(alpha, a[0], signed=False)
    upper_low, upper_high = multiply(alpha, a[1])
    turned_low = (upper_high << 1) | _logical_shift(upper_low, 63)
    total = low + turned_low
    carry = _unsigned_less(total, low).to(torch.int64)
    high = high + (upper_low & _HIGH_MASK) + carry
    return fold(total, high, _logical_shift(high, 63), signed=False)


def _halves(word: Factor) -> tuple[Factor, Factor]:
    if isinstance(word, int):
        return word & _HALF_MASK, (word >> _HALF) & _HALF_MASK
    return word & _HALF_MASK, _logical_shift(word, _HALF)
