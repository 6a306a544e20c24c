"""Products in Z_2^64: every back end against the chosen one, torch beside them; expansion of seeds. One thread."""

from __future__ import annotations

import os
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from timing import best_seconds

from sordino_common.ring.limbs import Workspace
from sordino_common.ring.matmul import choose_backend, costs_here, matmul, measure_costs
from sordino_common.ring.prg import Seed, expand_ring
from sordino_server.dealer.backend_torch import TorchBackend

SHAPES = [
    (32, 13, 64),
    (32, 64, 1),
    (13, 32, 64),
    (32, 1, 64),
    (64, 64, 64),
    (32, 784, 64),
    (576, 25, 8),
    (128, 128, 128),
    (128, 784, 128),
    (256, 256, 256),
    (512, 512, 512),
]
BACKENDS = ("direct", "dots", "limbs")
RIGHT_ENOUGH = 1.15  # of the fastest: crossovers are flat


def products() -> None:
    measured = measure_costs(time.perf_counter)
    print(f"costs in the table:    {costs_here()}\ncosts of this machine: {measured}\n")
    print("time over the fastest NumPy back end's; `chosen` by the table, `tuned` by this machine's own costs")
    print("shape              direct    dots   limbs   torch int64   chosen   right?   tuned")
    rng, workspace, backend = np.random.default_rng(0), Workspace(), TorchBackend()
    for rows, inner, columns in SHAPES:
        a = rng.integers(-(1 << 63), (1 << 63) - 1, (rows, inner))
        b = rng.integers(-(1 << 63), (1 << 63) - 1, (inner, columns))
        out = np.empty((rows, columns), dtype=np.int64)
        variants = {
            name: lambda a=a, b=b, out=out, name=name: matmul(a, b, backend=name, out=out, workspace=workspace)
            for name in BACKENDS + (("outer",) if inner == 1 else ())
        }
        variants["torch"] = lambda a=a, b=b: backend.matmul(a, b)
        seconds = best_seconds(variants)
        fastest = min(seconds[name] for name in seconds if name != "torch")
        chosen, tuned = choose_backend(rows, inner, columns), choose_backend(rows, inner, columns, costs=measured)
        right = seconds[chosen] <= RIGHT_ENOUGH * fastest
        ratios = "".join(f"{seconds[name] / fastest:8.2f}" for name in BACKENDS)
        print(
            f"{rows:4d} x {inner:3d} x {columns:3d}  {ratios}      {seconds['torch'] / fastest:8.2f}"
            f"   {chosen:6s}   {'yes' if right else 'no':6s}   {tuned}"
        )


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
