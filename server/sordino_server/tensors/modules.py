"""A module's parameters and buffers, replaced in place by pointers, and back. The user's model is not edited."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import Tensor, nn

from sordino_server.tensors.pointer import PointerTensor

M = TypeVar("M", bound=nn.Module)


def send(module: M, send_one: Callable[[Tensor], Tensor]) -> M:
    """Every parameter and buffer becomes a pointer; one that several modules share stays shared. Make the optimizer
    afterwards: it holds the parameters that it was given. If one can't be sent, the module is as before."""
    return replaced(module, send_one)


def get(module: M) -> M:
    """Every pointer becomes what it points to, as far as its agent lets it leave; if one may not, none is replaced."""
    return replaced(module, lambda tensor: tensor.get() if isinstance(tensor, PointerTensor) else tensor)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, each once, in the order in which `replaced` asks for what is to take their place."""
    seen: set[int] = set()
    for part in module.modules():
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def replaced(module: M, make: Callable[[Tensor], Tensor]) -> M:
    """The module, `make(tensor)` in place of every parameter and buffer."""
    made: dict[int, Tensor] = {}
    places: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(make(parameter.detach()), requires_grad=parameter.requires_grad)
                places.append((part._parameters, name, made[id(parameter)]))  # type: ignore[arg-type]  # both hold tensors
        for name, buffer in part._buffers.items():
            if buffer is not None:
                if id(buffer) not in made:
                    made[id(buffer)] = make(buffer.detach())
                places.append((part._buffers, name, made[id(buffer)]))
    for holder, name, tensor in places:
        holder[name] = tensor
    return module
