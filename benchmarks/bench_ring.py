"""Products in Z_2^64: every back end against the chosen one, torch beside them; expansion of seeds. One thread.

A product is a list of calls that was made once (`matmul_calls`), as a session's are. `lie`: which of A and B lies in
memory column by column (`-`: neither, `AB`: both); what a back end has to transpose is part of its time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from timing import best_seconds

from sordino_common.ring.limbs import Workspace
from sordino_common.ring.matmul import choose_backend, costs_here, matmul_calls, measure_costs
from sordino_common.ring.prg import Seed, expand_ring
from sordino_server.dealer.backend_torch import TorchBackend

SHAPES = [
    (1, 512, 512),
    (4, 512, 512),
    (1, 784, 64),
    (4, 64, 64),
    (32, 13, 64),
    (32, 64, 1),
    (13, 32, 64),
    (512, 512, 1),
    (32, 1, 64),
    (64, 64, 64),
    (32, 784, 64),
    (576, 25, 8),
    (25, 576, 8),
    (25, 4608, 8),
    (128, 128, 128),
    (128, 784, 128),
    (256, 256, 256),
    (512, 512, 512),
]
LIE = {"-": (False, False), "A": (True, False), "B": (False, True), "AB": (True, True)}
TURNED_PRODUCTS = 4_000_000  # larger ones go to `limbs`, however they lie: rows only
BACKENDS = ("direct", "dots", "limbs")
RIGHT_ENOUGH = 1.15  # of the fastest: crossovers are flat


def products() -> None:
    measured = measure_costs(time.perf_counter)
    print(f"costs in the table:    {costs_here()}\ncosts of this machine: {measured}\n")
    print("time over the fastest NumPy back end's; `chosen` by the table, `tuned` by this machine's own costs")
    print("shape            lie   direct    dots   limbs   torch int64   chosen   right?   tuned")
    rng, workspace, backend = np.random.default_rng(0), Workspace(), TorchBackend()
    wrong, worst = 0, 1.0
    tried = [
        (shape, lie) for shape in SHAPES for lie in LIE if lie == "-" or np.prod(shape, dtype=int) <= TURNED_PRODUCTS
    ]
    for (rows, inner, columns), lie in tried:
        a_turned, b_turned = LIE[lie]
        a = _laid(rng.integers(-(1 << 63), (1 << 63) - 1, (rows, inner)), a_turned)
        b = _laid(rng.integers(-(1 << 63), (1 << 63) - 1, (inner, columns)), b_turned)
        out = np.empty((rows, columns), dtype=np.int64)
        variants = {
            name: _together(matmul_calls(a, b, out, backend=name, workspace=workspace))
            for name in BACKENDS + (("outer",) if inner == 1 else ())
        }
        variants["torch"] = lambda a=a, b=b: backend.matmul(a, b)
        seconds = best_seconds(variants)
        fastest = min(seconds[name] for name in seconds if name != "torch")
        lying = {"a_turned": a_turned and rows > 1, "b_turned": b_turned or columns == 1}
        chosen = choose_backend(rows, inner, columns, **lying)
        tuned = choose_backend(rows, inner, columns, costs=measured, **lying)
        right = seconds[chosen] <= RIGHT_ENOUGH * fastest
        wrong, worst = wrong + (not right), max(worst, seconds[chosen] / fastest)
        ratios = "".join(f"{seconds[name] / fastest:8.2f}" for name in BACKENDS)
        print(
            f"{rows:4d} x {inner:3d} x {columns:3d} {lie:>2s}  {ratios}      {seconds['torch'] / fastest:8.2f}"
            f"   {chosen:6s}   {'yes' if right else 'no':6s}   {tuned}"
        )
    print(f"{wrong} of {len(tried)} choices are not right; the worst takes {worst:.2f} times what the fastest takes")


def _laid(array: np.ndarray, turned: bool) -> np.ndarray:
    return np.ascontiguousarray(array.T).T if turned else array


def _together(calls: list[Callable[[], object]]) -> Callable[[], object]:
    return calls[0] if len(calls) == 1 else lambda: [call() for call in calls]


def expansion() -> None:
    print()
    generator, key = np.random.Generator(np.random.Philox(0)), bytes(32)
    for count in (2048, 22_528, 1 << 20):
        out = np.empty(count, dtype=np.int64)
        zeros, target = bytes(8 * count), out.view(np.uint8).data

        def aes(zeros: bytes = zeros, target: memoryview = target) -> None:
            Cipher(AES(key), CTR(bytes(16))).encryptor().update_into(zeros, target)

        seconds = best_seconds(
            {
                "chacha20": lambda out=out: expand_ring(Seed(key), b"bench", out.shape, out),
                "aes-256-ctr": aes,
                "philox": lambda out=out: generator.integers(-(1 << 63), (1 << 63) - 1, out.shape),
                "copy": lambda out=out: out.copy(),
            }
        )
        chacha = seconds["chacha20"]
        print(
            f"seed expansion of {8 * count:8,d} bytes: {seconds['philox'] / chacha:4.1f}x as fast as NumPy's Philox, "
            f"{seconds['aes-256-ctr'] / chacha:.2f}x the bytes a second of AES-256-CTR without its key derivation, "
            f"{chacha / seconds['copy']:.1f}x the time of a copy"
        )


def main() -> None:
    torch.set_num_threads(1)
    products()
    expansion()


if __name__ == "__main__":
    main()
