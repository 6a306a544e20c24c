"""The server's side of a fleet, and what a notebook imports: `import sordino_server as sordino`.

The names below are found when they are first used: PyTorch is not imported before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sordino_server.tensors.chain import ChainTensor, LocalTensor
    from sordino_server.tensors.entry import connect, simulate
    from sordino_server.tensors.fleet import PointerFleet, RemoteAgent
    from sordino_server.tensors.pointer import PointerTensor

__all__ = ["ChainTensor", "LocalTensor", "PointerFleet", "PointerTensor", "RemoteAgent", "connect", "simulate"]

_ROOMS = {
    "ChainTensor": "chain",
    "LocalTensor": "chain",
    "PointerFleet": "fleet",
    "PointerTensor": "pointer",
    "RemoteAgent": "fleet",
    "connect": "entry",
    "simulate": "entry",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"sordino_server.tensors.{_ROOMS[name]}"), name)
