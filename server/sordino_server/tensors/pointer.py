"""`PointerTensor`: a tensor that lives on an agent. Here it has shape, dtype and autograd history, there its values.

PyTorch's autograd runs above `__torch_dispatch__`, so a backward pass through pointers is recorded like any other
operations, and runs where the data is. Pointers are contiguous and on the device `cpu`, whatever the agent computes on.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from sordino_common.plan.spec import TensorSpec
from sordino_common.ring.fixed import FRACTION_BITS
from sordino_server.tensors.chain import ChainTensor
from sordino_server.tensors.compile import TORCH_DTYPES
from sordino_server.tensors.errors import UnsupportedOperation, WrongPlace
from sordino_server.tensors.ops import OpInfo, View, info_of, unviewed
from sordino_server.tensors.recorder import Recorder, liftable
from sordino_server.tensors.values import Cell, Number, Scalar, Slot, Value

_ATEN = torch.ops.aten
_NOT_OPTIONS = frozenset({"layout", "pin_memory", "memory_format", "non_blocking"})  # of memory that is not here


class Owner(Protocol):
    """What a pointer needs of the agent that has its tensor."""

    name: str

    @property
    def recorder(self) -> Recorder: ...

    @property
    def link(self) -> type[PointerTensor]:
        """The class of its tensors."""
        ...

    @property
    def bring(self) -> str:
        """How a tensor that is elsewhere comes to it, as the end of a sentence."""
        ...

    def fetch(self, value: Value) -> Tensor: ...

    def send(self, tensor: Tensor) -> PointerTensor: ...

    def flush(self) -> None: ...


class PointerTensor(ChainTensor):
    """A tensor on `owner`. `child` is None: the link below is the agent's."""

    owner: Owner
    cell: Cell

    @staticmethod
    def __new__(cls, owner: Owner, cell: Cell, *, spec: TensorSpec | None = None, views: tuple[Any, ...] = ()) -> Any:
        spec = spec or cell.value.spec
        return Tensor._make_wrapper_subclass(cls, spec.shape, dtype=TORCH_DTYPES[spec.dtype])

    def __init__(
        self, owner: Owner, cell: Cell, *, spec: TensorSpec | None = None, views: tuple[tuple[View, int], ...] = ()
    ) -> None:
        self.owner, self.cell = owner, cell
        self.child = None
        self.parent = None
        self._views = views
        self._read: tuple[Value, Value] | None = None  # what the base was, what the view of it is

    def describe(self) -> str:
        return f"PointerTensor({self.owner.name})"

    # --- what a user does ----------------------------------------------------------------------------------------

    def get(self) -> Tensor:
        """The tensor itself, if the agent's policy lets it leave. Raises `RemoteFailure` with the agent's reason."""
        return self.owner.fetch(self.value())

    def send(self, to: Owner) -> PointerTensor:
        """As `move`."""
        return self.move(to)

    def move(self, to: Owner) -> PointerTensor:
        """The same tensor on another agent. It passes through this process, so the agent's policy decides."""
        if to is self.owner:
            return self
        return to.send(self.get().requires_grad_(self.requires_grad))

    def fix_precision(self, f: int = FRACTION_BITS) -> Any:
        """In what precision it is to be shared: a `FixedPrecisionTensor` over this pointer."""
        from sordino_server.tensors.shared.local import fix_precision  # which stands above this link

        return fix_precision(self, f)

    def share(self, *agents: Any, **terms: Any) -> Any:
        """Shares on these agents, of which the owner is one: it masks the tensor, which is never seen here; see
        `PointerFleet.share`."""
        if not agents:
            raise WrongPlace("share: name the agents that are to keep the shares")
        return agents[0].fleet.share(self, *agents, **terms)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise UnsupportedOperation(
            f"assignment to .data of {self!r}; write into it with .copy_() under torch.no_grad(), or replace it in its "
            f"module (fleet.send(module, agent) does)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PointerTensor:
        copy: Any = self.detach().clone().requires_grad_(self.requires_grad)
        memo[id(self)] = copy
        return copy  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.hidden("pickling")

    # --- reading and writing -------------------------------------------------------------------------------------

    def value(self) -> Value:
        """What is in it now: of a view, what its base's memory shows through it."""
        base = self.cell.value
        if not self._views:
            return base
        if self._read is None or self._read[0] is not base:
            value = base
            for view, index in self._views:
                value = self._through(view, index, value)
            self._read = (base, value)
        return self._read[1]

    def _apply(self, op: Any, first: Value, *rest: Any) -> Value:
        operands = [first]
        args: list[Any] = [Slot(0)]
        for entry in rest:
            if isinstance(entry, Value):
                args.append(Slot(len(operands)))
                operands.append(entry)
            else:
                args.append(entry)
        _, values = self.owner.recorder.apply(op, tuple(args), (), tuple(operands), (), _kinds(rest))
        assert values[0] is not None
        return values[0]

    def _through(self, view: View, index: int, value: Value) -> Value:
        op, args = view
        _, values = self.owner.recorder.apply(op, (Slot(0), *args), (), (value,), (), _kinds(args))
        found = values[index]
        assert found is not None
        return found

    def _write(self, value: Value, info: OpInfo) -> None:
        shown = [self.cell.value]
        for view, index in self._views:
            shown.append(self._through(view, index, shown[-1]))
        for (view, _), base in zip(reversed(self._views), reversed(shown[:-1]), strict=True):
            back = unviewed(view, base.spec.shape)
            if back is None:
                raise UnsupportedOperation(
                    f"{info.name} writes into a view ({view[0].name()}) of {self!r}; write into the tensor itself, or "
                    f"make a new one"
                )
            value = back(base, value, self._apply)
        self.owner.recorder.write(self.cell, value)
        self._read = None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the stub describes another function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Gathered:
    """The arguments of one call: operands by order of appearance, numbers apart, all else as a template."""

    __slots__ = ("_func", "kinds", "numbers", "operands", "owner", "values")

    def __init__(self, func: Any) -> None:
        self._func = func
        self.owner: Owner | None = None
        self.operands: list[PointerTensor] = []
        self.values: list[Value] = []
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
        if isinstance(entry, PointerTensor):
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
        if self.owner is not None and self.owner.link is not PointerTensor:
            there = f"on {self.owner.name}; share it first with {self.owner.bring}"
        raise WrongPlace(
            f"{self._func}: one operand is here (a tensor of shape {list(entry.shape)}), another is {there}, or fetch "
            f"the other with .get()"
        )


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    info = info_of(func)
    first = args[0] if args else None
    if info.refusal:
        pointer = first if isinstance(first, PointerTensor) else _some_pointer(args)
        if func is _ATEN._local_scalar_dense.default:
            pointer.hidden("bool(), item() or a number of it")
        raise UnsupportedOperation(f"{info.name} on {pointer.chain}: {info.refusal}")
    if info.writes and not isinstance(first, PointerTensor):
        raise WrongPlace(f"{func}: would write a remote value into a tensor that is here; fetch it with .get() first")
    if info.alias and isinstance(first, PointerTensor):
        return _alias(first)
    gathered = _Gathered(func)
    template = tuple([gathered.take(entry, name in info.lifted) for entry, name in zip(args, info.names, strict=False)])
    named: list[tuple[str, Any]] = []
    for name, entry in kwargs.items():
        if name in _NOT_OPTIONS or (name == "device" and (entry is None or entry.type == "cpu")) or entry is None:
            continue
        named.append((name, gathered.take(entry, name in info.lifted)))
    owner = gathered.owner
    assert owner is not None
    recorder = owner.recorder
    if recorder.boundary():
        owner.flush()
        recorder.new_step()
    elif recorder.full:
        owner.flush()
    operands = tuple([pointer.value() for pointer in gathered.operands])
    if gathered.numbers and not all(liftable(value.spec) for value in operands):
        template, named = _fixed(template, named, gathered)
    facts, values = recorder.apply(
        info.op, template, tuple(named), operands, tuple(gathered.numbers), tuple(gathered.kinds)
    )
    if info.writes:
        target = first
        assert isinstance(target, PointerTensor)
        (value,) = values
        assert value is not None
        spec = target.value().spec
        if value.spec != spec:
            raise UnsupportedOperation(f"{func} on {target.chain}: gives {value.spec}, but writes into {spec}")
        target._write(value, info)
        return target
    if info.view and isinstance(first, PointerTensor):
        results: list[Any] = [_view(first, info, template[1:], k, value) for k, value in enumerate(values)]
    else:
        link = owner.link
        results = [None if value is None else link(owner, recorder.cell(value)) for value in values]
    return results[0] if facts.single else results


def _fixed(template: Any, named: Any, gathered: _Gathered) -> tuple[Any, Any]:
    """Beside an integer a number decides the result's dtype, so it stays part of the step."""
    numbers, gathered.numbers = gathered.numbers, []
    gathered.kinds += map(repr, numbers)

    def back(entry: Any) -> Any:
        return numbers[entry.index] if isinstance(entry, Number) else entry

    return tuple(map(back, template)), [(name, back(entry)) for name, entry in named]


def _view(base: PointerTensor, info: OpInfo, args: tuple[Any, ...], index: int, value: Value | None) -> PointerTensor:
    assert value is not None
    pointer = base.owner.link(base.owner, base.cell, spec=value.spec, views=(*base._views, ((info.op, args), index)))
    pointer._read = (base.cell.value, value)
    return pointer


def _alias(pointer: PointerTensor) -> PointerTensor:
    alias = pointer.owner.link(pointer.owner, pointer.cell, spec=pointer.value().spec, views=pointer._views)
    alias._read = pointer._read
    return alias


def _some_pointer(args: Any) -> PointerTensor:
    for entry in args:
        if isinstance(entry, PointerTensor):
            return entry
        if isinstance(entry, list | tuple):
            for item in entry:
                if isinstance(item, PointerTensor):
                    return item
    raise WrongPlace("an operation on pointers has no pointer among its operands")


def _kinds(args: tuple[Any, ...]) -> tuple[str, ...]:
    found: list[str] = []
    for entry in args:
        if isinstance(entry, tuple):
            found += _kinds(entry)
        elif isinstance(entry, bool | int | float):
            found.append(repr(entry))
    return tuple(found)
