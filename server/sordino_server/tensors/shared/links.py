"""The links of a chain on secret shares.

    FixedPrecisionTensor(f=14) > MPCTensor[2, active] > PointerTensor(alice:…), PointerTensor(bob:…)

The top link is what a program computes with: it has real numbers' dtype, shape and autograd. Below it are ring elements
that nobody holds, and below these what each member keeps, which never comes here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from sordino_server.tensors.chain import ChainTensor
from sordino_server.tensors.errors import UnsupportedOperation, WrongPlace
from sordino_server.tensors.pointer import PointerTensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sordino_server.tensors.shared.committee import Committee
    from sordino_server.tensors.shared.local import LocalFixed


class FixedPrecisionTensor(ChainTensor):
    """Real numbers as integers: v stands as round(v 2^f). What is below is where the integers are."""

    @property
    def f(self) -> int:
        """Fraction bits."""
        raise NotImplementedError

    def describe(self) -> str:
        return f"FixedPrecisionTensor(f={self.f})"


class MPCTensor(ChainTensor):
    """Ring elements that a committee has shares of. Programs compute on the link above it (`parent`), which knows where
    the binary point is; `shares` are the links below."""

    owner: Committee

    @staticmethod
    def __new__(cls, parent: SharedTensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, parent.shape, dtype=torch.int64)

    def __init__(self, parent: SharedTensor) -> None:
        self.parent = parent
        self.owner = parent.owner
        self.child = None

    @property
    def shares(self) -> tuple[SharePointer, ...]:
        """What each member keeps."""
        return tuple(SharePointer(self, name) for name in self.owner.parties)

    def links(self) -> Iterator[Tensor]:
        yield self
        yield from self.shares

    def describe(self) -> str:
        return f"MPCTensor[{len(self.owner.parties)}, {self.owner.security}]"

    @property
    def chain(self) -> str:
        return f"{self.describe()} > {', '.join(share.describe() for share in self.shares)}"

    def get(self) -> NoReturn:
        raise UnsupportedOperation(
            f"get on {self.chain}: ring elements have no meaning without their binary point; .parent.get() or "
            f".parent.reconstruct()"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the stub describes another function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        chain = next(entry.chain for entry in args if isinstance(entry, MPCTensor))
        raise UnsupportedOperation(
            f"{func.name()} on {chain}: compute on the FixedPrecisionTensor above it (.parent), which knows where the "
            f"binary point is"
        )


class SharePointer(ChainTensor):
    """What one member of a committee keeps of a tensor: a masked value, and shares of masks while it computes."""

    @staticmethod
    def __new__(cls, parent: MPCTensor, name: str) -> Any:
        return Tensor._make_wrapper_subclass(cls, parent.shape, dtype=torch.int64)

    def __init__(self, parent: MPCTensor, name: str) -> None:
        self.parent = parent
        self.child = None
        self.agent = name

    def describe(self) -> str:
        return f"PointerTensor({self.agent}:…)"

    def get(self) -> NoReturn:
        raise UnsupportedOperation(
            f"get on {self.chain}: a member gives what it keeps to nobody, least of all to who deals the masks"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the stub describes another function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise UnsupportedOperation(
            f"{func.name()} on PointerTensor(…): shares are computed with by the committee only; use the "
            f"FixedPrecisionTensor at the top of the chain"
        )


class SharedTensor(FixedPrecisionTensor, PointerTensor):
    """A `FixedPrecisionTensor` whose integers are an `MPCTensor`. Operations on it are recorded for the committee, as a
    pointer's are for its agent."""

    owner: Committee  # pyright: ignore[reportIncompatibleVariableOverride]  # nobody gives a tensor another owner

    @property
    def f(self) -> int:
        return self.owner.fraction_bits

    @property
    def child(self) -> MPCTensor:  # made when somebody looks: most results die unseen
        return MPCTensor(self)

    @child.setter
    def child(self, value: object) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """There is nothing to set."""

    @property
    def owners(self) -> tuple[str, ...]:
        """The members of the committee."""
        return self.owner.parties

    @property
    def chain(self) -> str:
        return f"{self.describe()} > {self.child.chain}"

    def describe(self) -> str:
        return FixedPrecisionTensor.describe(self)

    def links(self) -> Iterator[Tensor]:
        yield self
        yield from self.child.links()

    def get(self) -> Tensor:
        """The tensor itself, in floats, after the MAC check and if every member's policy lets it open to us.

        Raises `RemoteFailure` with a member's reason, `MacCheckError` if one cheats."""
        return self.owner.fetch(self.value())

    def reconstruct(self) -> LocalFixed:
        """As `get`, in fixed point: a `FixedPrecisionTensor` in this process."""
        return self.owner.fetch_fixed(self.value())

    def float_precision(self) -> NoReturn:
        raise UnsupportedOperation(
            f"float_precision on {self.chain}: shares are integers; open it first: .get(), or "
            f".reconstruct().float_precision()"
        )

    def fix_precision(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedOperation(f"fix_precision on {self.chain}: it has {self.f} fraction bits already")

    def share(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedOperation(
            f"share on {self.chain}: it is shared already; another committee would have to be given it by who has it"
        )

    def send(self, to: Any) -> PointerTensor:
        """As `move`."""
        return self.move(to)

    def move(self, to: Any) -> PointerTensor:
        """The tensor itself at a member of the committee, and only there: a pointer. Every member's policy has to allow
        it (`policy.spdz.outputs: {tensors: [that member]}`, and `policy.fetch`).

        Raises `WrongPlace` for who is no member, `RemoteFailure` with a member's reason, `MacCheckError`."""
        name = getattr(to, "name", "")
        if name not in self.owner.parties:
            raise WrongPlace(
                f"move on {self.chain}: it opens to a member of {self.owner.name}, got {to!r}; .get() opens it here, "
                f"from where it can be sent on"
            )
        pointer = self.owner.move(self.value(), self.owner.fleet[name])
        return pointer.requires_grad_() if self.requires_grad else pointer  # type: ignore[return-value]
