"""What one call of an operation has in its arguments: operands, numbers that may change, and the rest as a template.

Most calls are like an earlier one. `read` makes their key without looking at the op: whatever a step's form depends on
is in it, so that a known call costs little more than the objects that it leaves behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from sordino_common.plan.spec import TensorSpec
from sordino_server.tensors.chain import ChainTensor
from sordino_server.tensors.errors import UnsupportedOperation, WrongPlace
from sordino_server.tensors.ops import info_of
from sordino_server.tensors.values import TORCH_DTYPES, Facts, Key, Number, Scalar, Slot, Value

if TYPE_CHECKING:
    from sordino_server.tensors.pointer import PointerTensor

# Arguments that stand in a key as they are: equal ones are the same argument.
_PLAIN: Final = frozenset({type(None), str, torch.dtype, torch.layout, torch.memory_format, torch.device})
_WHOLE: Final = frozenset({int, bool})


# A spec, and the same in PyTorch's terms.
Like = tuple[TensorSpec, torch.Size, torch.dtype]


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """What calls of one key share. `view`: the op and its arguments, if the results are views of the first operand.
    `likes`: of the results, None where there is none. `func`, `specs`: the op and the operands' specs, held because
    the key has their ids."""

    func: Any
    specs: tuple[TensorSpec, ...]
    facts: Facts
    writes: bool
    view: tuple[Any, tuple[Any, ...]] | None
    likes: tuple[Like | None, ...]


def form_of(
    func: Any, operands: Sequence[Value], facts: Facts, writes: bool, view: tuple[Any, tuple[Any, ...]] | None
) -> Form:
    likes = [None if out is None else (out, torch.Size(out.shape), TORCH_DTYPES[out.dtype]) for out in facts.outs]
    specs = tuple([operand.spec for operand in operands])
    return Form(func, specs, facts, writes, view, tuple(likes))


# By the op's id: hashing an op calls Python.
_LIFTED: Final[dict[int, tuple[Any, frozenset[int | str]]]] = {}


def lifted(func: Any) -> frozenset[int | str]:
    """Which arguments of the op, by place and by name, hold a number that may change."""
    found = _LIFTED.get(id(func))
    if found is None:
        info = info_of(func)
        places = [k for k, name in enumerate(info.names) if name in info.lifted]
        found = _LIFTED[id(func)] = (func, frozenset([*places, *info.lifted]))
    return found[1]


def read(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None, pointer: type[PointerTensor]
) -> tuple[Key, list[PointerTensor], list[float]] | None:
    """Key, operands and numbers that may change; None for what is seldom and has no key (lists of tensors, tensors
    that are here), and for an op that has no pointer or several owners."""
    key: list[Any] = [id(func)]
    operands: list[PointerTensor] = []
    numbers: list[float] = []
    for k, entry in enumerate(args):
        kind = type(entry)
        if kind is pointer:
            operands.append(entry)
            key.append(id(entry.spec))
        elif kind in _WHOLE:
            key += (kind, entry)  # 1 and True are equal keys
        elif kind in _PLAIN:
            key.append(entry)
        elif kind is float:
            if k in lifted(func):
                numbers.append(entry)
                key.append(Number)
            else:
                key.append(repr(entry))  # 0.0 and -0.0 are equal keys
        elif kind is list and _WHOLE.issuperset(map(type, entry)):
            key.append(tuple(entry))  # whole numbers, or truth values: an op takes one or the other
        else:
            return None
    for name, entry in kwargs.items() if kwargs else ():
        kind = type(entry)
        key.append(name)
        if kind is float and name in lifted(func):
            numbers.append(entry)
            key.append(Number)
        elif kind in _WHOLE:
            key += (kind, entry)
        elif kind in _PLAIN:
            key.append(entry)
        elif kind is float:
            key.append(repr(entry))
        else:
            return None
    if not operands:
        return None
    owner = operands[0].owner
    for operand in operands:
        if operand.owner is not owner:
            return None
    return tuple(key), operands, numbers


class Gathered:
    """The arguments of one call: operands by order of appearance, numbers apart, all else as a template."""

    __slots__ = ("_func", "_pointer", "kinds", "numbers", "operands", "owner")

    def __init__(self, func: Any, pointer: type[PointerTensor]) -> None:
        self._func = func
        self._pointer = pointer
        self.owner: Any = None
        self.operands: list[PointerTensor] = []
        self.numbers: list[float] = []
        self.kinds: list[str] = []

    def take(self, entry: Any, liftable: bool = False) -> Any:
        if isinstance(entry, Tensor):
            return self._tensor(entry)
        if isinstance(entry, float) and liftable:
            self.numbers.append(entry)
            return Number(len(self.numbers) - 1)
        if isinstance(entry, list | tuple):
            return tuple([self.take(item) for item in entry])
        if isinstance(entry, bool | int | float):
            self.kinds.append(repr(entry))  # 1, 1.0 and True are equal keys
        elif isinstance(entry, torch.device):
            raise UnsupportedOperation(
                f"{self._func}: where {self.chain} computes is its owner's choice; leave out the device"
            )
        return entry

    @property
    def chain(self) -> str:
        return self.operands[0].chain if self.operands else "a pointer"

    def _tensor(self, entry: Tensor) -> Any:
        if isinstance(entry, self._pointer):
            if self.owner is None:
                self.owner = entry.owner
            elif entry.owner is not self.owner:
                bring = self.owner.bring if len(self.owner.bring) > len(entry.owner.bring) else entry.owner.bring
                raise WrongPlace(
                    f"{self._func}: one operand is on {self.owner.name}, another on {entry.owner.name}; bring them "
                    f"together with {bring}"
                )
            self.operands.append(entry)
            return Slot(len(self.operands) - 1)
        if isinstance(entry, ChainTensor):
            raise WrongPlace(f"{self._func}: operands on different links ({entry.chain}); send the local one first")
        if entry.dim() == 0:  # a number, as PyTorch has it where devices differ
            scalar = entry.item()
            self.kinds.append(repr(scalar))
            return Scalar(scalar, entry.dtype)
        there = "a pointer; send it first with agent.send(tensor)"
        if self.owner is not None and self.owner.link is not self._pointer:
            there = f"on {self.owner.name}; share it first with {self.owner.bring}"
        raise WrongPlace(
            f"{self._func}: one operand is here (a tensor of shape {list(entry.shape)}), another is {there}, or fetch "
            f"the other with .get()"
        )


def fixed(template: Any, named: Any, gathered: Gathered) -> tuple[Any, Any]:
    """Beside an integer a number decides the result's dtype, so it stays part of the step."""
    numbers, gathered.numbers = gathered.numbers, []
    gathered.kinds += map(repr, numbers)

    def back(entry: Any) -> Any:
        return numbers[entry.index] if isinstance(entry, Number) else entry

    return tuple(map(back, template)), [(name, back(entry)) for name, entry in named]


def kinds(args: tuple[Any, ...]) -> tuple[str, ...]:
    found: list[str] = []
    for entry in args:
        if isinstance(entry, tuple):
            found += kinds(entry)
        elif isinstance(entry, bool | int | float):
            found.append(repr(entry))
    return tuple(found)
