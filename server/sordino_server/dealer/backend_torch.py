"""Products of masks by torch, on the CPU or on CUDA, to the same bits as NumPy's (`sordino_common.ring.backend`).

Z_2^64. On the CPU torch multiplies int64 matrices itself, with AVX-512's instruction where there is one; where there is
none, or the product is small, NumPy is quicker. CUDA has no such product, and two ways around it, both exact:

`float64`  three balanced 22-bit limbs, as in `ring.limbs`: 6 products on 3 diagonals.
`int8`     eight balanced 8-bit limbs on the tensor cores, `torch._int_mm`: 36 products on 8 diagonals, each one call.
           x + 0x8080...80 mod 2^64, read as bytes, each with its top bit flipped, are the limbs: no carries to make.
           int32 sums: 8 K 2^14 <= 2^30 for K <= 8192. Sizes are padded to what the call takes.

F_p, entry by entry: `fp_torch`.

Sums are exact only if the device really adds float64 (newer cuBLAS can emulate it, if the environment asks for that):
a backend multiplies the worst case once when it is made, and refuses a device that gets it wrong.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import numpy as np
import torch

from sordino_common.errors import LocalError
from sordino_common.ring.backend import NumpyBackend
from sordino_common.ring.fp import Fp, P
from sordino_common.ring.limbs import I64, INNER_BLOCK, WRAPPING_BITS
from sordino_common.ring.matmul import product_shape
from sordino_server.dealer.fp_torch import (
    as_int64,
    field_array,
    multiply,
    multiply_words,
    scalar_words,
    tensor_of,
    words_of,
)

Kernel = Literal["integer", "float64", "int8"]

_BYTES: Final = 8
_BYTES_OFFSET: Final = as_int64(0x8080808080808080)
_INT8_INNER: Final = 8192
_INT8_ROWS: Final = 32  # torch._int_mm wants more than 16
_INT8_MULTIPLE: Final = 8  # and other sizes in multiples of this
_CPU_PRODUCTS: Final = 1 << 16  # fewer scalar products than this take less than torch's call and its transposing
_GPU_PRODUCTS: Final = 1 << 20  # fewer scalar products than this are done before the data has reached a GPU
_GPU_ELEMENTS: Final = 1 << 16  # likewise, elementwise


def best_backend() -> TorchBackend:
    """On the first CUDA device if there is one, otherwise on the CPU."""
    return TorchBackend("cuda" if torch.cuda.is_available() else "cpu")


class TorchBackend:
    """`RingBackend` on a torch device. `kernel`: how Z_2^64 products are made; by default `integer` on the CPU, `int8`
    elsewhere.

    What torch would do more slowly stays with NumPy: on the CPU all of F_p (measured: half as fast in torch) and all of
    Z_2^64 without AVX-512 (measured from 8^3 to 256^3: half to a seventh as fast in torch), elsewhere what is small.
    `all_on_device` leaves nothing to NumPy (tests do that, to see the device's code without a GPU).

    Raises `LocalError` if the device is absent, lacks the kernel, or fails the exactness test."""

    def __init__(self, device: str = "cpu", *, kernel: Kernel | None = None, all_on_device: bool = False) -> None:
        self._device = torch.device(device)
        on_cpu = self._device.type == "cpu"
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise LocalError(f"dealer: torch sees no CUDA device, asked for {device!r}; use 'cpu'")
        self._kernel: Final[Kernel] = kernel or ("integer" if on_cpu else "int8")
        if self._kernel == "integer" and not on_cpu:
            raise LocalError(f"dealer: torch has no int64 product on {device!r}; use kernel 'int8' or 'float64'")
        self._numpy = NumpyBackend()
        self._min_ring: float = 0 if all_on_device else _cpu_products() if on_cpu else _GPU_PRODUCTS
        self._min_elements: float = 0 if all_on_device else math.inf if on_cpu else _GPU_ELEMENTS
        self._self_test()

    @property
    def name(self) -> str:
        return f"torch {self._device} ({self._kernel})"

    def matmul(self, a: I64, b: I64) -> I64:
        if self._min_ring == math.inf:
            return self._numpy.matmul(a, b)
        shape = product_shape(a, b)
        if not math.prod(shape) or not a.shape[-1]:
            return np.zeros(shape, dtype=np.int64)
        if math.prod(shape) * a.shape[-1] < self._min_ring:
            return self._numpy.matmul(a, b)
        return self._ring_product(a, b)

    def fp_scale(self, alpha: int, v: I64) -> Fp:
        if v.size < self._min_elements:
            return self._numpy.fp_scale(alpha, v)
        if not 0 <= alpha < P:
            raise LocalError("fp.scale: the scalar is not in 0..p-1")
        _check(v, "fp.scale", np.int64)
        return field_array(multiply(scalar_words(alpha), self._put(v)))

    def fp_scale_fp(self, alpha: int, a: Fp) -> Fp:
        if a.size < 2 * self._min_elements:
            return self._numpy.fp_scale_fp(alpha, a)
        if not 0 <= alpha < P:
            raise LocalError("fp.scale_fp: the scalar is not in 0..p-1")
        _check(a, "fp.scale_fp", np.uint64)
        return field_array(multiply_words(scalar_words(alpha), words_of(a, self._device)))

    def fp_mul_int64(self, a: Fp, v: I64) -> Fp:
        if v.size < self._min_elements:
            return self._numpy.fp_mul_int64(a, v)
        _check(a, "fp.mul_int64", np.uint64)
        _check(v, "fp.mul_int64", np.int64)
        if a.shape[1:] != v.shape:
            raise LocalError(f"fp.mul_int64: shapes {a.shape[1:]} and {v.shape} differ")
        return field_array(multiply(words_of(a, self._device), self._put(v)))

    # --- Z_2^64 ----------------------------------------------------------------------------------------------------

    def _ring_product(self, a: I64, b: I64) -> I64:
        x, y = self._put(a), self._put(b)
        if self._kernel == "integer":
            return _get(torch.matmul(x, y))
        if self._kernel == "int8":
            return _get(_int8_product(x, y))
        rows = _diagonals(_wrapping_limbs(x), _wrapping_limbs(y), product_shape(a, b))
        return _get(rows[0] + (rows[1] << WRAPPING_BITS) + (rows[2] << 2 * WRAPPING_BITS))

    def _put(self, x: I64) -> torch.Tensor:
        return tensor_of(x, self._device)

    def _self_test(self) -> None:
        """Every limb at its largest size and of one sign: sums reach the bounds that the module's text gives."""
        worst = np.full((32, INNER_BLOCK), as_int64(0x8080808080808080), dtype=np.int64)
        half = -(1 << 21)
        balanced = np.full((32, INNER_BLOCK), half + (half << WRAPPING_BITS), dtype=np.int64)
        for x in (worst, balanced):
            entry = as_int64(int(x[0, 0]) ** 2 * INNER_BLOCK % (1 << 64))
            if not np.all(self._ring_product(x, x.T) == np.int64(entry)):
                raise LocalError(
                    f"dealer: {self.name} does not multiply exactly; is float64 emulation on? Use the NumPy backend"
                )


def _cpu_products() -> float:
    """From how many scalar products on torch's int64 product is the faster one."""
    return _CPU_PRODUCTS if torch.backends.cpu.get_cpu_capability() == "AVX512" else math.inf


def _get(x: torch.Tensor) -> I64:
    result: I64 = x.cpu().numpy()
    return result


def _check(x: I64 | Fp, what: str, dtype: type[np.int64] | type[np.uint64]) -> None:
    if x.dtype != dtype:
        raise LocalError(f"{what}: expected {np.dtype(dtype)}, got {x.dtype}{list(x.shape)}")


def _wrapping_limbs(x: torch.Tensor) -> list[torch.Tensor]:
    """Three balanced limbs of 22 bits; see `ring.limbs.split_wrapping`."""
    up, half = 64 - WRAPPING_BITS, 1 << (WRAPPING_BITS - 1)
    middle = (x + half) >> WRAPPING_BITS
    return [(x << up) >> up, (middle << up) >> up, (middle + half) >> WRAPPING_BITS]


def _diagonals(a: list[torch.Tensor], b: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Σ_i a_i b_(d - i) for d < len(a) as int64 [len(a), *shape]; see `ring.limbs.diagonal_product`."""
    count, inner = len(a), a[0].shape[-1]
    rows = torch.zeros((count, *shape), dtype=torch.int64, device=a[0].device)
    for start in range(0, inner, INNER_BLOCK):
        stop = min(start + INNER_BLOCK, inner)
        left = torch.stack([limb[..., start:stop] for limb in a], dim=-2).to(torch.float64)
        right = torch.stack([limb[..., start:stop, :] for limb in reversed(b)], dim=-3).to(torch.float64)
        for d in range(count):
            x = left[..., : d + 1, :].flatten(-2)
            y = right[..., count - 1 - d :, :, :].flatten(-3, -2)
            rows[d] += torch.matmul(x, y).to(torch.int64)
    return rows


def _int8_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b mod 2^64 by int8 limbs; batches one after another, but for a shared right side."""
    if b.ndim == 2:
        return _int8_matrices(a.reshape(-1, a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[-1])
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    left = a.expand(*batch, *a.shape[-2:]).reshape(-1, *a.shape[-2:])
    right = b.expand(*batch, *b.shape[-2:]).reshape(-1, *b.shape[-2:])
    products = [_int8_matrices(x, y) for x, y in zip(left, right, strict=True)]
    return torch.stack(products).reshape(*batch, a.shape[-2], b.shape[-1])


def _int8_matrices(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    rows, inner = a.shape
    columns = b.shape[1]
    total = torch.zeros((rows, columns), dtype=torch.int64, device=a.device)
    for start in range(0, inner, _INT8_INNER):
        x, y = a[:, start : start + _INT8_INNER], b[start : start + _INT8_INNER]
        part = x.shape[1]
        padded = (_up(max(rows, _INT8_ROWS)), _up(part), _up(columns))
        left = torch.nn.functional.pad(x, (0, padded[1] - part, 0, padded[0] - rows))
        right = torch.nn.functional.pad(y, (0, padded[2] - columns, 0, padded[1] - part))
        left_limbs = _byte_limbs(left).permute(0, 2, 1).contiguous()  # [M, limb, K]
        right_limbs = _byte_limbs(right).permute(2, 0, 1).flip(0).contiguous()  # [7 - limb, K, N]
        for d in range(_BYTES):
            x8 = left_limbs[:, : d + 1].reshape(padded[0], -1)
            y8 = right_limbs[_BYTES - 1 - d :].reshape(-1, padded[2])
            product: torch.Tensor = torch._int_mm(x8, y8)  # pyright: ignore[reportPrivateImportUsage]  # no public name yet
            total += product[:rows, :columns].to(torch.int64) << 8 * d
    return total


def _up(size: int) -> int:
    return -(-size // _INT8_MULTIPLE) * _INT8_MULTIPLE


def _byte_limbs(x: torch.Tensor) -> torch.Tensor:
    """[..., 8] int8 with x = Σ_i limb_i 256^i mod 2^64, each in -128..127."""
    return ((x.contiguous() + _BYTES_OFFSET).unsqueeze(-1).view(torch.int8)) ^ -128
