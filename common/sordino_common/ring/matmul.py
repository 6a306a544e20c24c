"""Matrix products in Z_2^64, bit-exact: C = A B mod 2^64 on signed 64-bit arrays.

Back ends:

`direct`  NumPy's integer loop: no set-up cost, no SIMD, any strides.
`dots`    inner products of contiguous rows by einsum's loops, which the compiler did vectorize; first A is copied if it
          lies column by column, and B is transposed if it does not.
`outer`   for inner dimension 1: an elementwise product with broadcasting.
`limbs`   three balanced 22-bit limbs per operand, float64 GEMM, six products in three calls (`limbs`).

Which is fastest depends on sizes and on the machine: a float64 GEMM costs what BLAS and SIMD width say, integer loops
cost about the same everywhere. And on how operands lie: where a step along the inner dimension is a multiple of 512
bytes, all lines of a column are in few sets of the cache, and every access is a miss once there are more than ways.
`Costs` is a model of all that; `COSTS` holds measured ones by machine kind, and `measure_costs` measures those of this
machine for a caller who asks (0.2 s; nothing is measured at import).
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Final, Literal

import numpy as np

from sordino_common.errors import LocalError
from sordino_common.ring.limbs import (
    I64,
    INNER_BLOCK,
    WRAPPING_BITS,
    Workspace,
    diagonal_product,
    split_wrapping,
)

Backend = Literal["direct", "dots", "outer", "limbs"]
# A first-level cache of 32 KiB: 512 lines of 8 elements. Whether 64 sets of 8 or 256 sets of 2 makes no difference.
_LINE: Final = 8
_LINES: Final = 512
_COLLIDING: Final = 64  # elements; what is less far apart is fetched in advance
_DOTS: Final = "...mk,...nk->...mn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Nanoseconds. `direct`: per product. `dots`: per product of two rows, `dots_join` per result element, `dots_fixed`
    per call, `turn` per element that is copied into another order for it. `far`: how many times as long an integer
    product or such a copy takes where cache lines are in one another's way. `gemm`: per product of limb matrices,
    `split` per operand element, `join` per result element, `fixed` per call."""

    direct: float
    far: float
    turn: float
    dots: float
    dots_join: float
    dots_fixed: float
    gemm: float
    split: float
    join: float
    fixed: float


# Measured by `measure_costs` with one BLAS thread; `benchmarks/bench_ring.py` prints them for the machine it runs on.
COSTS: Final[Mapping[str, Costs]] = MappingProxyType(
    {
        # AVX-512 (AMD EPYC 9xx4, OpenBLAS 0.3.31)
        "x86_64": Costs(
            direct=0.7,
            far=2.0,
            turn=1.0,
            dots=0.33,
            dots_join=8.0,
            dots_fixed=3_000.0,
            gemm=0.04,
            split=5.0,
            join=4.0,
            fixed=35_000.0,
        ),
        # Not measured yet: a Cortex-A72's NEON does 2 doubles a multiply-add against AVX-512's 16, at about the same
        # cost of an integer product; issue 3's runs on a Pi settle it.
        "aarch64": Costs(
            direct=2.0,
            far=2.0,
            turn=4.0,
            dots=1.2,
            dots_join=25.0,
            dots_fixed=10_000.0,
            gemm=0.3,
            split=15.0,
            join=15.0,
            fixed=120_000.0,
        ),
    }
)


def costs_here() -> Costs:
    """The table's row for this kind of machine; x86-64's for kinds that are not in it (all back ends are right)."""
    return COSTS.get(platform.machine(), COSTS["x86_64"])


@lru_cache(maxsize=1024)  # a circuit multiplies the same few shapes in every step
def choose_backend(
    rows: int,
    inner: int,
    columns: int,
    *,
    batch: int = 1,
    costs: Costs | None = None,
    a_turned: bool = False,
    b_turned: bool = False,
) -> Backend:
    """The back end that should be fastest for `batch` products of [rows, inner] by [inner, columns]. `a_turned`: A lies
    in memory column by column; `b_turned`: B does."""
    if inner == 1:
        return "outer"
    model = costs or costs_here()
    results, operands = batch * rows * columns, batch * inner * (rows + columns)
    products = results * inner
    a_far = model.far if a_turned and _collides(rows, inner) else 1.0
    b_far = model.far if not b_turned and _collides(columns, inner) else 1.0
    # Down the columns of both: a line for every step, unless several steps are in one.
    both = a_turned and not b_turned and inner * (min(rows, _LINE) + min(columns, _LINE)) > _LINES * _LINE
    turning = 0.0 if b_turned else batch * inner * columns * model.turn * b_far
    dot = model.dots
    if a_turned and columns > 1:
        turning += batch * rows * inner * model.turn * a_far
    elif a_turned:
        dot = model.direct  # einsum goes along A's columns then, which is not vectorized
    estimates: dict[Backend, float] = {
        "direct": products * model.direct * max(a_far, b_far, model.far if both else 1.0),
        "dots": model.dots_fixed + turning + results * model.dots_join + products * dot,
        "limbs": model.fixed + 6 * products * model.gemm + operands * model.split + results * model.join,
    }
    return min(estimates, key=lambda name: estimates[name])


def _collides(stride: int, count: int) -> bool:
    """Whether `count` elements, `stride` elements apart, fall into so few sets of the cache that they don't stay there
    until their neighbours are wanted."""
    return stride % _COLLIDING == 0 and count > _LINES // math.gcd(stride // _LINE, _COLLIDING)


def matmul(
    a: I64,
    b: I64,
    *,
    backend: Backend | None = None,
    out: I64 | None = None,
    workspace: Workspace | None = None,
    costs: Costs | None = None,
) -> I64:
    """a @ b mod 2^64. a: [..., M, K], b: [..., K, N], int64, batch dimensions broadcast. Returns int64 [..., M, N], in
    `out` if given (C-contiguous, not an operand). With `workspace`, scratch memory is kept between calls.

    Raises `LocalError` for other dtypes or shapes that don't fit."""
    if out is None:
        out = np.empty(product_shape(a, b), dtype=np.int64)
    for call in matmul_calls(a, b, out, backend=backend, workspace=workspace, costs=costs):
        call()
    return out


def matmul_calls(
    a: I64,
    b: I64,
    out: I64,
    *,
    backend: Backend | None = None,
    workspace: Workspace | None = None,
    costs: Costs | None = None,
    room: Callable[[int, tuple[int, ...]], I64] | None = None,
) -> list[Callable[[], object]]:
    """`matmul` into `out` as calls that can be made again and again, whatever a and b hold by then. `room`: gives
    memory, C-contiguous, for a copy of a (0) or b (1); it may be used for something else between two times."""
    shape = product_shape(a, b)
    if out.shape != shape or out.dtype != np.int64 or not out.flags.c_contiguous:
        raise LocalError(f"matmul: `out` must be C-contiguous int64{list(shape)}, got {out.dtype}{list(out.shape)}")
    rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    batch = max(a.size // max(rows * inner, 1), b.size // max(inner * columns, 1))
    right = b.swapaxes(-1, -2)
    chosen = backend or choose_backend(
        rows, inner, columns, batch=batch, costs=costs, a_turned=not _in_rows(a), b_turned=_in_rows(right)
    )
    if chosen == "limbs" and out.size and inner:
        return [partial(_limbs, a, b, out, workspace or Workspace())]
    if chosen == "outer" and inner == 1:
        return [partial(np.multiply, a, b, out)]
    if chosen != "dots":
        return [partial(np.matmul, a, b, out)]
    calls: list[Callable[[], object]] = []

    def laid_in_rows(number: int, array: I64) -> I64:
        if _in_rows(array):
            return array
        copy = room(number, array.shape) if room is not None else np.empty(array.shape, dtype=np.int64)
        calls.append(partial(np.positive, array, copy))
        return copy

    left = laid_in_rows(0, a) if columns > 1 else a
    calls.append(partial(np.einsum, _DOTS, left, laid_in_rows(1, right), out=out))
    return calls


def _in_rows(array: I64) -> bool:
    """Whether the last axis is contiguous."""
    return array.strides[-1] == array.itemsize


def product_shape(a: I64, b: I64) -> tuple[int, ...]:
    """Shape of a @ b. Raises `LocalError` for other dtypes than int64 and for shapes that don't fit."""
    if a.dtype != np.int64 or b.dtype != np.int64:
        raise LocalError(f"matmul: expected int64 operands, got {a.dtype} and {b.dtype}")
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise LocalError(f"matmul: shapes {a.shape} and {b.shape} do not fit")
    try:
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2]) if a.ndim > 2 or b.ndim > 2 else ()
    except ValueError:
        raise LocalError(f"matmul: batch dimensions of {a.shape} and {b.shape} do not fit") from None
    return (*batch, a.shape[-2], b.shape[-1])


def _limbs(a: I64, b: I64, out: I64, workspace: Workspace) -> None:
    inner = a.shape[-1]
    diagonals = workspace.integers("diagonals", (3, *out.shape))
    product = workspace.floats("product", out.shape)
    for start in range(0, inner, INNER_BLOCK):
        x, y = a[..., start : start + INNER_BLOCK], b[..., start : start + INNER_BLOCK, :]
        left = workspace.floats("left", (*x.shape[:-1], 3, x.shape[-1]))
        right = workspace.floats("right", (*y.shape[:-2], 3, *y.shape[-2:]))
        split_wrapping(
            x,
            (left[..., 0, :], left[..., 1, :], left[..., 2, :]),
            workspace.integers("scratch", x.shape),
            workspace.integers("rest", x.shape),
        )
        split_wrapping(
            y,
            (right[..., 2, :, :], right[..., 1, :, :], right[..., 0, :, :]),
            workspace.integers("scratch", y.shape),
            workspace.integers("rest", y.shape),
        )
        diagonal_product(left, right, product, diagonals, first=start == 0)
    np.left_shift(diagonals[2], np.int64(WRAPPING_BITS), out=out)
    np.add(out, diagonals[1], out=out)
    np.left_shift(out, np.int64(WRAPPING_BITS), out=out)
    np.add(out, diagonals[0], out=out)


def measure_costs(clock: Callable[[], float]) -> Costs:
    """`Costs` of this machine, from the fastest of several small runs. `clock` gives seconds (time.perf_counter): ring
    arithmetic itself knows no clock."""

    def best(run: Callable[[], object], repeats: int) -> float:
        run()
        fastest = float("inf")
        for _ in range(repeats):
            start = clock()
            run()
            fastest = min(fastest, clock() - start)
        return fastest * 1e9

    workspace = Workspace()

    def limbs(rows: int, inner: int, columns: int, repeats: int) -> float:
        a, b = np.full((rows, inner), -3, dtype=np.int64), np.full((inner, columns), 5, dtype=np.int64)
        out = np.empty((rows, columns), dtype=np.int64)
        return best(lambda: _limbs(a, b, out, workspace), repeats)

    def dots(rows: int, inner: int, repeats: int) -> float:
        a, out = np.full((rows, inner), -3, dtype=np.int64), np.empty((rows, rows), dtype=np.int64)
        (call,) = matmul_calls(a, a.T, out, backend="dots")
        return best(call, repeats)

    a = np.full((32, 64), -3, dtype=np.int64)
    direct = best(lambda: np.matmul(a, a.T), 50) / (32 * 64 * 32)
    wide, turned = np.full((200, 100), -3, dtype=np.int64), np.empty((100, 200), dtype=np.int64)
    turn = best(lambda: np.positive(wide.T, turned), 50) / wide.size
    few, colliding = np.full((8, 256), -3, dtype=np.int64), np.full((256, 128), 5, dtype=np.int64)
    far = max(1.0, best(lambda: np.matmul(few, colliding), 20) / (8 * 256 * 128 * direct))
    dots_fixed = dots(1, 1, 100)
    dots_long, dots_short = (dots(32, inner, 50) - dots_fixed for inner in (256, 16))
    per_dot = max(0.0, (dots_long - dots_short) / (32 * 32 * 240))
    dots_join = max(0.0, dots_short / 32**2 - 16 * per_dot)
    fixed = limbs(2, 2, 2, 100)
    gemm_a, gemm_b = np.ones((256, 256)), np.ones((256, 256))
    gemm = best(lambda: np.matmul(gemm_a, gemm_b), 10) / 256**3
    split = max(0.0, limbs(1, 512, 256, 20) - fixed - 6 * 512 * 256 * gemm) / (512 * 257)
    join = max(0.0, limbs(256, 1, 256, 20) - fixed - 6 * 256 * 256 * gemm - 512 * split) / 256**2
    return Costs(
        direct=direct,
        far=far,
        turn=turn,
        dots=per_dot,
        dots_join=dots_join,
        dots_fixed=dots_fixed,
        gemm=gemm,
        split=split,
        join=join,
        fixed=fixed,
    )
