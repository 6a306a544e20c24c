"""Makes fp.json by Python integers and RFC 8439 alone, without `sordino_common`: `python tests/vectors/make_fp.py`.

key = HKDF-SHA256(seed, "sordino prg v1" 00 info); the key stream is the elements' low words, then their high words,
8 bytes little-endian each, the top bit of the high ones cleared, p read as 0.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

P = 2**127 - 1
SEED = bytes(range(7, 39))
INTEGERS = [-1, 2**63 - 1, -(2**63), 12345678901]


def expand(info: bytes, count: int) -> list[int]:
    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"sordino prg v1\0" + info).derive(SEED)
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(16 * count))
    words = [int.from_bytes(stream[8 * k : 8 * k + 8], "little") for k in range(2 * count)]
    return [(words[count + k] % 2**63 << 64 | words[k]) % P for k in range(count)]


def planar(values: list[int]) -> bytes:
    """The bytes of an array as it travels: low words, then high words."""
    words = [value % 2**64 for value in values] + [value >> 64 for value in values]
    return b"".join(word.to_bytes(8, "little") for word in words)


def hexadecimal(values: list[int]) -> list[str]:
    return [f"{value % P:032x}" for value in values]


def main() -> None:
    a = expand(b"fp golden", 4)
    many, more = expand(b"many", 10_000), expand(b"more", 10_000)
    golden = {
        "seed": SEED.hex(),
        "expanded": hexadecimal(a),
        "bytes": planar(a).hex(),
        "integers": INTEGERS,
        "times_integers": hexadecimal([x * y for x, y in zip(a, INTEGERS, strict=True)]),
        "square_norm": hexadecimal([sum(x * x for x in a)])[0],
        "inner_product": hexadecimal([sum(x * y for x, y in zip(many, more, strict=True))])[0],
        "sha256_of_multiples": hashlib.sha256(planar([a[0] * x % P for x in many])).hexdigest(),
    }
    (Path(__file__).parent / "fp.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
