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


def elementwise() -> None:
    print("passes (int64 additions of the same size)\nelements  " + "".join(f"{size:>10,d}" for size in SIZES))
    table: dict[str, list[float]] = {}
    for size in SIZES:
        rng = np.random.default_rng(size)
        v = rng.integers(-(1 << 63), (1 << 63) - 1, size)
        u, w = v[::-1].copy().view(np.uint64), np.empty_like(v)
        a, b = (fp.expand_fp(Seed(bytes(32)), name, (size,)) for name in (b"a", b"b"))
        operations: dict[str, Callable[[], object]] = {
            "pass": lambda v=v, w=w: np.add(v, v, out=w),
            "add": lambda a=a, b=b: fp.add(a, b),
            "sub": lambda a=a, b=b: fp.sub(a, b),
            "scale": lambda v=v: fp.scale(ALPHA, v),
            "scale_fp": lambda a=a: fp.scale_fp(ALPHA, a),
            "mul_exact": lambda u=u, v=v: fp.mul_exact(u.view(np.int64), v),
            "mul_int64": lambda a=a, v=v: fp.mul_int64(a, v),
            "expand_fp": lambda size=size: fp.expand_fp(Seed(bytes(32)), b"e", (size,)),
        }
        seconds = best_seconds(operations, rounds=5, slice_s=0.02)
        for name in operations:
            table.setdefault(name, []).append(seconds[name] / seconds["pass"])
    for name, ratios in table.items():
        if name != "pass":
            print(f"{name:10s}" + "".join(f"{ratio:10.1f}" for ratio in ratios))


def against_python() -> None:
    size = 2048
    v = np.random.default_rng(0).integers(-(1 << 63), (1 << 63) - 1, size)
    numbers = v.tolist()
    seconds = best_seconds(
        {"fp": lambda: fp.scale(ALPHA, v), "python": lambda: [ALPHA * number % fp.P for number in numbers]}
    )
    print(f"\nscale() of {size} elements: {seconds['python'] / seconds['fp']:.0f}x as fast as Python integers")


def inner_products() -> None:
    """Over casting every word of every vector to float64 limbs of 16 bits once: what must be done at least. The shapes
    are those of a check of the Boston step: most elements of one member, of the dealer, and small families."""
    print("\ninner products, times a cast of all vectors\nvectors (F_p, int64)   pairs   rows x entries    dots")
    shapes = ((5, 7, 13, 1, 14_336), (5, 7, 13, 1, 2048), (3, 8, 8, 7, 2048), (1, 1, 1, 1, 224), (1, 1, 1, 7, 32))
    for of_field, of_integers, count, rows, entries in shapes:
        rng, space = np.random.default_rng(0), Workspace()
        left = [fp.expand_fp(Seed(bytes(32)), b"%d" % k, (rows, entries)) for k in range(of_field)]
        right = [rng.integers(-(1 << 63), (1 << 63) - 1, (rows, entries)) for _ in range(of_integers)]
        pairs = [(k % of_field, k % of_integers) for k in range(count)]
        words = rng.integers(0, 1 << 62, (2 * of_field + of_integers, rows * entries))
        floats = np.empty((len(words), 4 * rows * entries))
        seconds = best_seconds(
            {
                "cast": lambda words=words, floats=floats: np.copyto(floats, words.view(np.uint16)),
                "dots": lambda left=left, right=right, pairs=pairs, space=space: fp.dots(
                    left, right, pairs, workspace=space
                ),
            },
            rounds=5,
        )
        ratio = seconds["dots"] / seconds["cast"]
        print(f"{of_field:9d} {of_integers:6d} {count:13d} {rows:6d} x {entries:6d} {ratio:10.1f}")


def matrices() -> None:
    """18 matrices together, of the sizes that a check of the Boston step has, over casting them to float64 once."""
    print("\nmatrices times vectors, times a cast of the matrices\nsteps together   mat_vecs   vectors")
    sizes = [(13, 32), (64, 32), (1, 32), (32, 64), (32, 1), (13, 64), (64, 1), (1, 64), (32, 13)]
    for steps in (1, 2, 7):
        rng, space = np.random.default_rng(0), Workspace()
        a = [rng.integers(-(1 << 63), (1 << 63) - 1, (steps, *size)) for size in 2 * sizes]
        v = [rng.integers(0, (1 << 63) - 1, steps * columns) for _, columns in 2 * sizes]
        jobs = [
            (each, fp.vectors(numbers).reshape(1, steps, each.shape[2], -1)) for each, numbers in zip(a, v, strict=True)
        ]
        drawn = np.concatenate(v)
        words = np.concatenate([each.reshape(-1) for each in a])
        floats = np.empty(words.shape)
        seconds = best_seconds(
            {
                "cast": lambda words=words, floats=floats: np.copyto(floats, words),
                "mat_vecs": lambda jobs=jobs, space=space: fp.mat_vecs(jobs, workspace=space),
                "vectors": lambda drawn=drawn: fp.vectors(drawn),
            },
            rounds=5,
        )
        ratios = [seconds[name] / seconds["cast"] for name in ("mat_vecs", "vectors")]
        print(f"{steps:14d} {ratios[0]:10.1f} {ratios[1]:9.1f}")


def main() -> None:
    elementwise()
    against_python()
    inner_products()
    matrices()


if __name__ == "__main__":
    main()
