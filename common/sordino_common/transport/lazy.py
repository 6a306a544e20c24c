"""Modules that a library imports at its top and never uses here: they cost nothing until something of them is used.

`importlib.util.LazyLoader` does not do: a second `import` of such a module reads its `__spec__`, and that loads it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType


class _Later(ModuleType):
    """Stands in for a module until an attribute of it is wanted; dunder names, which only tools ask for, are not."""

    def __getattr__(self, attribute: str) -> object:
        name = self.__name__
        if attribute.startswith("__"):
            raise AttributeError(f"module {name!r} is not loaded yet, and has no {attribute}")
        if sys.modules.get(name) is self:
            del sys.modules[name]
        return getattr(import_module(name), attribute)


def import_lazily(name: str) -> None:
    """From now on `import name` loads the module at the first look into it. Nothing happens if it is loaded already."""
    if name in sys.modules:
        return
    parent, _, child = name.rpartition(".")
    module = sys.modules[name] = _Later(name)
    if parent:
        setattr(import_module(parent), child, module)
