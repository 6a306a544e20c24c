"""Keys of simulated parties, derived from the simulation's seed. NEVER for a real fleet: who knows the seed has them.

HKDF-SHA256 with info ["sordino-simulation-key", seed, name, what]: the same seed gives the same fleet, to the bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sordino_common.channel.identity import DeviceKey, OperatorKey
from sordino_common.messages import encode


def simulation_device_key(seed: int, name: str) -> DeviceKey:
    """The key of the simulated device `name`."""
    return DeviceKey.from_seeds(_derive(seed, name, "sign"), _derive(seed, name, "box"))


def simulation_operator_key(seed: int) -> OperatorKey:
    """The key that signs the simulated fleet's roster."""
    return OperatorKey.from_seed(_derive(seed, "", "operator"))


def simulation_random(seed: int, name: str, boot: int) -> Callable[[int], bytes]:
    """A source of bytes in place of `os.urandom` for one boot of one simulated party: reproducible, not secret."""
    return random.Random(f"sordino-simulation|{seed}|{name}|{boot}").randbytes


def _derive(seed: int, name: str, what: str) -> bytes:
    info = encode(["sordino-simulation-key", seed, name, what])
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(b"not secret: simulation only")
