"""Products in Z_2^64: the integer loop against float64 limbs, one thread; and what is chosen."""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from timing import best_seconds

from sordino_common.ring.matmul import choose_backend, matmul
from sordino_common.ring.prg import Seed, expand_ring

SHAPES = [
    (32, 13, 64),
    (32, 64, 1),
    (13, 32, 64),
    (64, 64, 64),
    (32, 784, 64),
    (128, 128, 128),
    (128, 784, 128),
    (256, 256, 256),
    (512, 512, 512),
]


def main() -> None:
    rng = np.random.default_rng(0)
    print("shape             direct/limbs   chosen   right?")
    for rows, inner, columns in SHAPES:
        a = rng.integers(-(1 << 63), (1 << 63) - 1, (rows, inner))
        b = rng.integers(-(1 << 63), (1 << 63) - 1, (inner, columns))
        seconds = best_seconds(
            {
                "direct": lambda a=a, b=b: matmul(a, b, backend="direct"),
                "limbs": lambda a=a, b=b: matmul(a, b, backend="limbs"),
            }
        )
        ratio = seconds["direct"] / seconds["limbs"]
        chosen = choose_backend(rows, inner, columns)
        right = chosen == min(seconds, key=lambda name: seconds[name])
        print(f"{rows:4d} x {inner:3d} x {columns:3d}   {ratio:8.2f}       {chosen:6s}   {'yes' if right else 'no'}")
    out = np.empty(1 << 20, dtype=np.int64)
    seed = Seed(bytes(32))
    generator = np.random.Generator(np.random.Philox(0))
    seconds = best_seconds(
        {
            "chacha20": lambda: expand_ring(seed, b"bench", out.shape, out),
            "philox": lambda: generator.integers(-(1 << 63), (1 << 63) - 1, out.shape),
            "copy": lambda: out.copy(),
        }
    )
    print(
        f"seed expansion of 8 MiB: {seconds['philox'] / seconds['chacha20']:.1f}x as fast as NumPy's Philox, ", end=""
    )
    print(f"{seconds['chacha20'] / seconds['copy']:.1f}x the time of a copy")


if __name__ == "__main__":
    main()
