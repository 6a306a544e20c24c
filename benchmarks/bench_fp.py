"""F_p, p = 2^127 - 1: how many passes over the data an operation costs, and what a check's products cost. One thread.

The unit is one pass: the addition of two int64 arrays of the same size into a third, which is about what any single
NumPy call over so many elements costs. Read a figure as "as if it were so many NumPy calls".
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Callable

import numpy as np
from timing import best_seconds

from sordino_common.ring import fp
from sordino_common.ring.limbs import Workspace
from sordino_common.ring.prg import Seed

SIZES = (64, 2048, 11_264, 22_528)
ALPHA = (1 << 126) + 12345
BUDGETED, BUDGET_PASSES = (
    22_528,
    80,
)  # two MACs for each of a Boston step's 11,234 openings, in 0.3 ms where a pass takes 3.7 us


def elementwise() -> dict[str, float]:
    print("passes (int64 additions of the same size)\nelements  " + "".join(f"{size:>10,d}" for size in SIZES))
    table: dict[str, list[float]] = {}
    for size in SIZES:
        rng = np.random.default_rng(size)
        v = rng.integers(-(1 << 63), (1 << 63) - 1, size)
        u, w = v[::-1].copy().view(np.uint64), np.empty_like(v)
        a, b = (fp.expand_fp(Seed(bytes(32)), name, (size,)) for name in (b"a", b"b"))
        out, seed, space = np.empty_like(a), Seed(bytes(32)), Workspace()
        operations: dict[str, Callable[[], object]] = {
            "pass": lambda v=v, w=w: np.add(v, v, out=w),
            "add": lambda a=a, b=b, out=out: fp.add(a, b, out),
            "sub": lambda a=a, b=b, out=out: fp.sub(a, b, out),
            "scale": lambda v=v, out=out: fp.scale(ALPHA, v, out),
            "scale_fp": lambda a=a, out=out: fp.scale_fp(ALPHA, a, out),
            "weighted": lambda u=u, v=v, out=out: fp.weighted(u, v, out),
            "mul_int64": lambda a=a, v=v, out=out: fp.mul_int64(a, v, out),
            "mul": lambda a=a, b=b, out=out: fp.mul(a, b, out),
            "dots": lambda a=a, b=b, v=v, space=space: fp.dots(a, (b, v), workspace=space),
            "sum_": lambda a=a: fp.sum_(a, (0,)),
            "expand_fp": lambda out=out, seed=seed, size=size: fp.expand_fp(seed, b"e", (size,), out),
        }
        seconds = best_seconds(operations, rounds=5, slice_s=0.02)
        for name in operations:
            table.setdefault(name, []).append(seconds[name] / seconds["pass"])
    for name, ratios in table.items():
        if name != "pass":
            print(f"{name:10s}" + "".join(f"{ratio:10.1f}" for ratio in ratios))
    return {name: ratios[SIZES.index(BUDGETED)] for name, ratios in table.items()}


def against_python() -> None:
    size = 2048
    v = np.random.default_rng(0).integers(-(1 << 63), (1 << 63) - 1, size)
    numbers = v.tolist()
    seconds = best_seconds(
        {"fp": lambda: fp.scale(ALPHA, v), "python": lambda: [ALPHA * number % fp.P for number in numbers]}
    )
    print(f"\nscale() of {size} elements: {seconds['python'] / seconds['fp']:.0f}x as fast as Python integers")


def checks() -> None:
    """Matrices of a check times vectors, over casting the matrix to float64 once (int64 entries: one cast, F_p: two).
    `mat_vecs` is 16 of them, an F_p and an int64 matrix each, over as many triple casts."""
    print("\ntimes a cast of the int64 matrix to float64\nmatrix         mat_vec mat_vec_fp   mat_vecs")
    for rows, columns in ((32, 13), (32, 64), (13, 64), (128, 784), (784, 128)):
        t = np.random.default_rng(0).integers(-(1 << 63), (1 << 63) - 1, (rows, columns))
        t_fp = fp.expand_fp(Seed(bytes(32)), b"t", (rows, columns))
        v = fp.expand_fp(Seed(bytes(32)), b"v", (columns,))
        jobs, space = [(t_fp, t, fp.vectors(t[0] & np.int64((1 << 63) - 1)))] * 16, Workspace()
        floats = np.empty((rows, columns))
        seconds = best_seconds(
            {
                "cast": lambda t=t, floats=floats: np.copyto(floats, t),
                "mat_vec": lambda t=t, v=v: fp.mat_vec(t, v),
                "mat_vec_fp": lambda t=t_fp, v=v: fp.mat_vec_fp(t, v),
                "mat_vecs": lambda jobs=jobs, space=space: fp.mat_vecs(jobs, workspace=space),
            },
            rounds=5,
        )
        ratios = [seconds[name] / seconds["cast"] for name in ("mat_vec", "mat_vec_fp", "mat_vecs")]
        ratios[2] /= 3 * len(jobs)
        print(f"{rows:4d} x {columns:3d}   " + "".join(f"{ratio:11.1f}" for ratio in ratios))


def main() -> None:
    passes = elementwise()
    within = passes["scale"] <= BUDGET_PASSES
    print(f"\nscale() of {BUDGETED:,d} elements: {passes['scale']:.0f} passes of {BUDGET_PASSES}: {within}")
    against_python()
    checks()


if __name__ == "__main__":
    main()
