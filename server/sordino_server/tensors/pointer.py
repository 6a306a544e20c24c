"""`PointerTensor`: a tensor that lives on an agent. Here it has shape, dtype and autograd history, there its values.

PyTorch's autograd runs above `__torch_dispatch__`, so a backward pass through pointers is recorded like any other
operations, and runs where the data is. Pointers are contiguous and on the device `cpu`, whatever the agent computes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from sordino_common.plan.spec import TensorSpec
from sordino_common.ring.fixed import FRACTION_BITS
from sordino_server.tensors.calls import Form, Gathered, fixed, form_of, kinds, read
from sordino_server.tensors.chain import ChainTensor
from sordino_server.tensors.errors import UnsupportedOperation, WrongPlace
from sordino_server.tensors.ops import View, info_of, unviewed
from sordino_server.tensors.recorder import Recorder, backward_pass, liftable
from sordino_server.tensors.values import TORCH_DTYPES, Cell, Key, Slot, Value

_ATEN = torch.ops.aten
_DETACH, _ALIAS = _ATEN.detach.default, _ATEN.alias.default
_wrapper = Tensor._make_wrapper_subclass
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

    def end_step(self) -> None: ...


class PointerTensor(ChainTensor):
    """A tensor on `owner`. `child` is None: the link below is the agent's."""

    # Most pointers are made by one operation and gone after the next: slots are cheaper than a dictionary of each.
    __slots__ = ("_read", "_views", "cell", "owner", "spec")

    owner: Owner
    cell: Cell
    spec: TensorSpec
    child: Tensor | None = None
    parent: ChainTensor | None = None
    _views: tuple[tuple[View, int], ...]
    _read: tuple[Value, Value] | None  # what the base was, what the view of it is

    def __new__(cls, owner: Owner, cell: Cell, spec: TensorSpec) -> Self:
        pointer: Any = _wrapper(cls, spec.shape, dtype=TORCH_DTYPES[spec.dtype])
        pointer.owner, pointer.cell, pointer.spec = owner, cell, spec
        pointer._views, pointer._read = (), None
        return pointer  # type: ignore[no-any-return]  # PyTorch says no more of it

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
        _, values = self.owner.recorder.apply(op, tuple(args), (), tuple(operands), (), kinds(rest))
        assert values[0] is not None
        return values[0]

    def _through(self, view: View, index: int, value: Value) -> Value:
        op, args = view
        _, values = self.owner.recorder.apply(op, (Slot(0), *args), (), (value,), (), kinds(args))
        found = values[index]
        assert found is not None
        return found

    def _write(self, value: Value, op: Any) -> None:
        if not self._views:
            self.owner.recorder.write(self.cell, value)
            return
        shown = [self.cell.value]
        for view, index in self._views:
            shown.append(self._through(view, index, shown[-1]))
        for (view, _), base in zip(reversed(self._views), reversed(shown[:-1]), strict=True):
            back = unviewed(view, base.spec.shape)
            if back is None:
                raise UnsupportedOperation(
                    f"{op.name()} writes into a view ({view[0].name()}) of {self!r}; write into the tensor itself, or "
                    f"make a new one"
                )
            value = back(base, value, self._apply)
        self.owner.recorder.write(self.cell, value)
        self._read = None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the stub describes another function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is _DETACH or func is _ALIAS:
            return _alias(args[0])
        if args and type(args[0]) is cls:
            owner = args[0].owner
            recorder = owner.recorder
            expected = recorder.script.expected
            if expected is not None and expected.func is func:
                # A window is as long as the one before at most, so it need not be asked whether it is full.
                if backward_pass() != recorder.backward and recorder.crowded():
                    _make_room(owner)
                elif (found := recorder.script.follow(args, kwargs, cls, owner)) is not None:
                    known: Form = expected.form
                    values = recorder.add(known.facts, *found)
                    if known.writes or not known.facts.single:
                        return _results(known, args[0], values)
                    return _result(known, args[0], 0, values[0])
        call = read(func, args, kwargs, cls)
        if call is None:
            return _first_call(func, args, kwargs or {}, None)
        key, pointers, numbers = call
        first = pointers[0]
        owner = first.owner
        recorder = owner.recorder
        form = recorder.compiler.forms.get(key)
        if form is None:
            return _first_call(func, args, kwargs or {}, key)
        if recorder.crowded():
            _make_room(owner)
        operands = [pointer.value() if pointer._views else pointer.cell.value for pointer in pointers]
        values = recorder.record(form.facts, operands, numbers)
        recorder.script.note(func, args, kwargs, cls, form, operands)
        return _results(form, first, values)


def _make_room(owner: Owner) -> None:
    if owner.recorder.full:
        owner.flush()
    else:
        owner.end_step()
        owner.recorder.new_step()


def _first_call(func: Any, args: Any, kwargs: dict[str, Any], key: Key | None) -> Any:
    """A call whose like has not been seen, or that has no key: what it asks for is looked at, and refused by name."""
    info = info_of(func)
    first = args[0] if args else None
    if info.refusal:
        pointer = first if isinstance(first, PointerTensor) else _some_pointer(args)
        if func is _ATEN._local_scalar_dense.default:
            pointer.hidden("bool(), item() or a number of it")
        raise UnsupportedOperation(f"{info.name} on {pointer.chain}: {info.refusal}")
    if info.writes and not isinstance(first, PointerTensor):
        raise WrongPlace(f"{func}: would write a remote value into a tensor that is here; fetch it with .get() first")
    gathered = Gathered(func, PointerTensor)
    template = tuple([gathered.take(entry, name in info.lifted) for entry, name in zip(args, info.names, strict=False)])
    named: list[tuple[str, Any]] = []
    for name, entry in kwargs.items():
        if name in _NOT_OPTIONS or (name == "device" and (entry is None or entry.type == "cpu")) or entry is None:
            continue
        named.append((name, gathered.take(entry, name in info.lifted)))
    owner = gathered.owner
    assert owner is not None
    recorder: Recorder = owner.recorder
    if recorder.crowded():
        _make_room(owner)
    operands = tuple([pointer.value() for pointer in gathered.operands])
    if gathered.numbers and not all(liftable(value.spec) for value in operands):
        template, named = fixed(template, named, gathered)
        key = None  # it has no place for those numbers
    facts, values = recorder.apply(
        info.op, template, tuple(named), operands, tuple(gathered.numbers), tuple(gathered.kinds)
    )
    view = None
    if info.view and isinstance(first, PointerTensor):
        view = (info.op, template[1:])
    if info.writes:
        assert isinstance(first, PointerTensor)
        if facts.outs != (first.spec,):
            raise UnsupportedOperation(f"{func} on {first.chain}: gives {facts.outs[0]}, but writes into {first.spec}")
    form = form_of(func, operands, facts, info.writes, view)
    if key is not None and recorder.knows(facts):
        recorder.compiler.forms[key] = form
    return _results(form, first if isinstance(first, PointerTensor) else gathered.operands[0], values)


def _results(form: Form, first: PointerTensor, values: Sequence[Value | None]) -> Any:
    if form.writes:
        (value,) = values
        assert value is not None
        first._write(value, form.facts.op)
        return first
    if form.facts.single:
        return _result(form, first, 0, values[0])
    return [_result(form, first, k, value) for k, value in enumerate(values)]


def _result(form: Form, first: PointerTensor, index: int, value: Value | None) -> Any:
    """A pointer with memory of its own, or one that views `first`."""
    like, owner = form.likes[index], first.owner
    if value is None or like is None:
        return None
    spec, size, dtype = like
    pointer: Any = _wrapper(type(first), size, dtype=dtype)
    pointer.owner, pointer.spec = owner, spec
    if form.view is None:
        pointer.cell, pointer._views, pointer._read = owner.recorder.cell(value), (), None
    else:
        pointer.cell = first.cell
        pointer._views, pointer._read = (*first._views, (form.view, index)), (first.cell.value, value)
    return pointer


def _alias(pointer: PointerTensor) -> Any:
    alias: Any = _wrapper(type(pointer), pointer.shape, dtype=pointer.dtype)
    alias.owner, alias.spec, alias.cell = pointer.owner, pointer.spec, pointer.cell
    alias._views, alias._read = pointer._views, pointer._read
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
