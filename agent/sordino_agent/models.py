"""How the configuration names a model that this device may provide. No NumPy here: the worker reads the file."""

from __future__ import annotations

import msgspec

from sordino_common.messages.base import Name


class ModelFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`path`: an .npz file, a float32 array per parameter under the parameter's name; what this agent writes to its
    `models` folder when a model opens to it is one."""

    name: Name
    path: str

    def __post_init__(self) -> None:
        # A ValueError here becomes a validation error with the entry's file, line and column.
        if self.path.rpartition(".")[2].lower() != "npz":
            raise ValueError(f"the ending of {self.path!r} is not npz, which is what a model is read from")
