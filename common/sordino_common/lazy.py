"""Modules that a library imports at its top and never uses here: they cost nothing until something of them is used.

`importlib.util.LazyLoader` does not do: a second `import` of such a module reads its `__spec__`, and that loads it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType


class _Later(ModuleType):
    """Stands in for a module until an attribute of it is wanted; dunder names, which only tools ask for, are not. But
    `__path__` is asked for by an import of something inside."""

    def __getattr__(self, attribute: str) -> object:
        name = self.__name__
        if attribute.startswith("__") and attribute != "__path__":
            raise AttributeError(f"module {name!r} is not loaded yet, and has no {attribute}")
        if sys.modules.get(name) is self:
            del sys.modules[name]
        return getattr(import_module(name), attribute)


def is_loaded(name: str) -> bool:
    """Whether the module itself is there, not only what stands in for it."""
    return name in sys.modules and not isinstance(sys.modules[name], _Later)


def import_lazily(*names: str) -> None:
    """From now on `import name` loads the module at the first look into it. Nothing happens to those loaded already."""
    for name in names:
        if name in sys.modules:
            continue
        parent, _, child = name.rpartition(".")
        module = sys.modules[name] = _Later(name)
        if parent:
            setattr(import_module(parent), child, module)
