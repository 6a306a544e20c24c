"""The links of a chain. A link is a `torch.Tensor` for PyTorch (shape, dtype, autograd) and has no values of its own:
they are in its child, or elsewhere. What is shown of it is chain, dtype and shape, never a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sordino_common.ring.fixed import FRACTION_BITS
from sordino_server.tensors.errors import HiddenValue, UnsupportedOperation, WrongPlace


class ChainTensor(Tensor):
    """Base of all links. `child` is the link below, None if that is on another machine; `parent` the link above."""

    # Every op arrives in __torch_dispatch__, below autograd; nothing is intercepted above it.
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    child: Tensor | None
    parent: ChainTensor | None

    def links(self) -> Iterator[Tensor]:
        """This link and those below it."""
        yield self
        child = self.child
        if isinstance(child, ChainTensor):
            yield from child.links()
        elif child is not None:
            yield child

    def describe(self) -> str:
        """This link's name and owners: `PointerTensor(alice)`."""
        return type(self).__name__

    @property
    def chain(self) -> str:
        """The chain in words: `FixedPrecisionTensor(f=14) > PointerTensor(alice)`."""
        return " > ".join(link.describe() if isinstance(link, ChainTensor) else "Tensor" for link in self.links())

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # the stub has no name for it
        dtype = str(self.dtype).removeprefix("torch.")
        grad = ", requires_grad" if self.requires_grad else ""
        return f"{self.chain} {dtype}{list(self.shape)}{grad}"

    def __str__(self) -> str:
        return repr(self)

    def __format__(self, spec: str) -> str:
        return self.hidden(f"format(..., {spec!r})") if spec else repr(self)

    def hidden(self, what: str) -> NoReturn:
        """Refuse to tell a value."""
        raise HiddenValue(
            f"{what} needs the values of {self!r}, which are not here; keep computing on it (torch.where, clamp, sums "
            f"instead of a Python branch), or fetch what its owner lets you have with .get() first"
        )

    def __bool__(self) -> bool:
        self.hidden("bool(): a branch, a comparison in an `if` or `while`,")

    def __float__(self) -> float:
        self.hidden("float()")

    def __int__(self) -> int:
        self.hidden("int()")

    def __index__(self) -> int:
        self.hidden("a Python index")

    def __contains__(self, element: object) -> bool:
        self.hidden("`in`")

    def item(self) -> NoReturn:
        self.hidden(".item()")

    def tolist(self) -> NoReturn:
        self.hidden(".tolist()")

    def numpy(self, *, force: bool = False) -> NoReturn:
        self.hidden(".numpy()")

    def __array__(self, *_: object, **__: object) -> NoReturn:
        self.hidden("a NumPy array")

    def fix_precision(self, *args: Any, **kwargs: Any) -> Any:
        self.refuse("fix_precision", "it is for tensors that are here, or on an agent")

    def float_precision(self) -> Any:
        self.refuse("float_precision", "it is no fixed point; .fix_precision(f) makes it that")

    def share(self, *args: Any, **kwargs: Any) -> Any:
        self.refuse("share", "it is for tensors that are here, or on an agent of the committee")

    def reconstruct(self) -> Any:
        self.refuse("reconstruct", "it is not shared; .share(alice, bob) shares it, .get() fetches it as it is")

    def refuse(self, name: str, why: str) -> NoReturn:
        raise UnsupportedOperation(f"{name} on {self.chain}: {why}")


class LocalTensor(ChainTensor):
    """The end of a chain in this process: `child` is a plain tensor, on which every op of PyTorch runs."""

    @staticmethod
    def __new__(cls, child: Tensor) -> LocalTensor:
        if isinstance(child, ChainTensor):
            raise WrongPlace(f"LocalTensor: its child is a plain tensor, got {child.chain}")
        return Tensor._make_wrapper_subclass(
            cls, child.shape, strides=child.stride(), dtype=child.dtype, requires_grad=child.requires_grad
        )

    def __init__(self, child: Tensor) -> None:
        self.child = child.detach()
        self.parent = None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the stub describes another function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, ChainTensor) and kind is not LocalTensor for kind in types):
            names = ", ".join(sorted(kind.__name__ for kind in types))
            raise WrongPlace(f"{func}: operands on different links ({names}); send the local one first")
        kwargs = kwargs or {}
        result = func(*tree_map(_opened, args), **tree_map(_opened, kwargs))
        if func._schema.is_mutable:
            return args[0]
        return tree_map(lambda value: LocalTensor(value) if isinstance(value, Tensor) else value, result)

    def get(self) -> Tensor:
        """The plain tensor."""
        assert self.child is not None
        return self.child

    def fix_precision(self, f: int = FRACTION_BITS) -> Any:
        """A `FixedPrecisionTensor` with `f` fraction bits, in this process."""
        from sordino_server.tensors.shared.local import fix_precision  # which stands above this link

        return fix_precision(self.get(), f)

    def share(self, *agents: Any, **terms: Any) -> Any:
        """Shares on these agents; see `PointerFleet.share`."""
        if not agents:
            raise WrongPlace("share: name the agents that are to keep the shares")
        return agents[0].fleet.share(self.get(), *agents, **terms)


def _opened(value: Any) -> Any:
    return value.child if isinstance(value, LocalTensor) else value
