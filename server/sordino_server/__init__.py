"""The server's side of a fleet, and what a notebook imports: `import sordino_server as sordino`.

The names below are found when they are first used: PyTorch is not imported before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sordino_common.spdz.lowering import Ranges
    from sordino_server.tensors.chain import ChainTensor, LocalTensor
    from sordino_server.tensors.entry import connect, simulate
    from sordino_server.tensors.fleet import PointerFleet, RemoteAgent
    from sordino_server.tensors.loader import FederatedLoader, federated_loader
    from sordino_server.tensors.pointer import PointerTensor
    from sordino_server.tensors.shared.functions import polynomial_activations, sigmoid, tanh
    from sordino_server.tensors.shared.links import FixedPrecisionTensor, MPCTensor
    from sordino_server.tensors.shared.local import fix_precision

__all__ = [
    "ChainTensor",
    "FederatedLoader",
    "FixedPrecisionTensor",
    "LocalTensor",
    "MPCTensor",
    "PointerFleet",
    "PointerTensor",
    "Ranges",
    "RemoteAgent",
    "connect",
    "federated_loader",
    "fix_precision",
    "polynomial_activations",
    "sigmoid",
    "simulate",
    "tanh",
]

_ROOMS = {
    "ChainTensor": "chain",
    "FederatedLoader": "loader",
    "FixedPrecisionTensor": "shared.links",
    "LocalTensor": "chain",
    "MPCTensor": "shared.links",
    "PointerFleet": "fleet",
    "PointerTensor": "pointer",
    "Ranges": "shared.committees",
    "RemoteAgent": "fleet",
    "connect": "entry",
    "federated_loader": "loader",
    "fix_precision": "shared.local",
    "polynomial_activations": "shared.functions",
    "sigmoid": "shared.functions",
    "simulate": "entry",
    "tanh": "shared.functions",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"sordino_server.tensors.{_ROOMS[name]}"), name)
