"""Heads of CBOR items in their shortest form (RFC 8949, sections 3 and 4.2.1): for what is written and read by hand.

    head = major type (3 bits) and additional information (5 bits) | argument (0, 1, 2, 4 or 8 bytes, big-endian)

Arguments below 24 are the additional information itself; above that it says how many bytes follow.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

NUMBER: Final = 0x00  # major types, as the bits of a head: natural number
BYTES: Final = 0x40  # byte string
TEXT: Final = 0x60
LIST: Final = 0x80
MAP: Final = 0xA0
TAG: Final = 0xC0

# Additional information -> (bytes of the argument, least argument that has no shorter form).
WIDE: Final = {24: (1, 24), 25: (2, 1 << 8), 26: (4, 1 << 16), 27: (8, 1 << 32)}
NO_HEAD: Final = (0, 1)  # in place of one of these: no argument is large enough
_KNOWN: Final = 1024  # heads that are remembered


@lru_cache(maxsize=_KNOWN)  # lengths, steps and rounds come again and again
def head(major: int, argument: int) -> bytes:
    """The head of major type `major` with that argument, below 2^64."""
    if argument < 24:
        return bytes((major + argument,))
    width = 0 if argument < 1 << 8 else 1 if argument < 1 << 16 else 2 if argument < 1 << 32 else 3
    return bytes((major + 24 + width,)) + argument.to_bytes(1 << width, "big")


def pattern_of(major: int) -> bytes:
    """A regular expression, one group, for all that `head` writes for that major type: no argument has a shorter
    head. To be compiled with `re.DOTALL`."""
    wide = (
        rb"\x%02x[\x18-\xff]" % (major + 24),
        rb"\x%02x(?!\0).." % (major + 25),
        rb"\x%02x(?!\0\0)...." % (major + 26),
        rb"\x%02x(?!\0\0\0\0)........" % (major + 27),
    )
    return rb"([\x%02x-\x%02x]|%b)" % (major, major + 23, b"|".join(wide))


def argument_of(written: bytes, major: int = NUMBER) -> int:
    """The argument of what `pattern_of(major)` has matched."""
    return int.from_bytes(written[1:], "big") if len(written) > 1 else written[0] - major
