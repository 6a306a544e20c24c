"""What comes next in a loop, if its step goes as the last time. It saves looking things up, and changes nothing.

A window is what is recorded between two flushes. A call that was made at the same place of the last window, on the same
operands, needs no key: its form is known (`follow`). If all of the window was so, and the same results are due, the
flush is the last one's, and no step is walked (`flush_of`). The first call that is another one ends that until the next
window; steps and values are the same objects either way.

Values are told apart by *place*. A window has a range of numbers of its own, so that equal places are the same value of
the same recorder: from its base upwards the results of its steps, in order; from the base downwards the stored values
that its steps read, in the order of their first use.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from sordino_server.tensors.calls import Form, lifted
from sordino_server.tensors.compile import Family
from sordino_server.tensors.lines import Line
from sordino_server.tensors.values import Step, Value

if TYPE_CHECKING:
    from sordino_server.tensors.pointer import PointerTensor

_WINDOW: Final = 1 << 32  # more than twice the results that there can be between two flushes
_windows: Final = itertools.count(1)
_ABSENT: Final = object()


class Call(msgspec.Struct, frozen=True, eq=False):
    """One call. `operands`: which arguments they are, and their places, counted from the window's base. `plain`: the
    arguments that are the same each time; `numbers`: which ones may change; `named`: those by name, with whether they
    may change."""

    func: Any
    count: int
    operands: tuple[tuple[int, int], ...]
    plain: tuple[tuple[int, Any], ...]
    numbers: tuple[int, ...]
    named: tuple[tuple[str, Any, bool], ...]
    form: Form


@dataclass(frozen=True, slots=True, kw_only=True)
class Flush:
    """What a flush behind `count` calls was, if the results at `due` are due. `inputs`: the stored values that are
    read, by order of first use; `steps`: the calls that are needed; `given`: of all calls with numbers, those."""

    calls: Sequence[Call]
    count: int
    due: Sequence[int]
    family: Family
    inputs: Sequence[int]
    steps: Sequence[int]
    given: Sequence[int]


class Script:
    """The calls of a recorder's window, beside those of the window before.

    `expected`: the call that comes next, None if nothing is expected (any more). `next`: the place of the next result.
    `lines`: of all steps; `given`: the numbers of those that have some."""

    __slots__ = (
        "_at",
        "_base",
        "_calls",
        "_flush",
        "_following",
        "_read",
        "_whole",
        "expected",
        "given",
        "lines",
        "next",
    )

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._flush: Flush | None = None
        self._at = 0
        self._following = True
        self.begin()

    def begin(self) -> None:
        """A window begins."""
        if self._at:
            del self._calls[self._at :]
        self._following = self._whole = True
        self._at = 0
        self._base = self.next = next(_windows) * _WINDOW
        self._read: list[weakref.ref[Value]] = []
        self.lines: list[Line] = []
        self.given: list[Sequence[float]] = []
        self.expected = self._calls[0] if self._calls else None

    def place(self, value: Value) -> None:
        """A step reads `value`: if it is stored, and that is its first use in this window, it gets its place."""
        if value.step is None and value.place < self._base - len(self._read):
            self._read.append(weakref.ref(value))
            value.place = self._base - len(self._read)

    def follow(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, pointer: type[PointerTensor], owner: Any
    ) -> tuple[list[Value], list[float]] | None:
        """Operands and numbers of a call of what is expected, if it is the expected one in all else; else None."""
        call, base = self.expected, self._base
        assert call is not None
        if len(args) != call.count:
            return None
        operands: list[Value] = []
        for k, place in call.operands:
            entry = args[k]
            if type(entry) is not pointer:
                return None
            value = entry.cell.value
            if entry._views:
                shown = entry._read
                if shown is None or shown[0] is not value:
                    return None  # the view has to be read anew, by a step that no call has asked for
                value = shown[1]
            if value.place != base + place:
                # Is it a stored one that is used for the first time?
                if place != ~len(self._read) or value.step is not None or value.place >= base - len(self._read):
                    return None
                if entry.owner is not owner or value.spec is not call.form.specs[len(operands)]:
                    return None
                self.place(value)
            operands.append(value)
        for k, want in call.plain:
            if args[k] is not want and not _same(args[k], want):
                return None
        numbers: list[float] = []
        for k in call.numbers:
            if type(args[k]) is not float:
                return None
            numbers.append(args[k])
        if kwargs or call.named:
            if kwargs is None or len(kwargs) != len(call.named):
                return None
            for name, want, changes in call.named:
                entry = kwargs.get(name, _ABSENT)
                if changes and type(entry) is float:
                    numbers.append(entry)
                elif entry is not want and not _same(entry, want):
                    return None
        at = self._at = self._at + 1
        self.expected = self._calls[at] if at < len(self._calls) else None
        return operands, numbers

    def note(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
        pointer: type[PointerTensor],
        form: Form,
        operands: Iterable[Value],
    ) -> None:
        """A call has become the last step. It was not expected."""
        self._stray()
        if not self._whole or any(operand.place < self._base - len(self._read) for operand in operands):
            self._whole = False  # it reads what an earlier window has left
            return
        found, changing = iter(operands), lifted(func)
        places: list[tuple[int, int]] = []
        plain: list[tuple[int, Any]] = []
        numbers: list[int] = []
        for k, entry in enumerate(args):
            if type(entry) is pointer:
                places.append((k, next(found).place - self._base))
            elif type(entry) is float and k in changing:
                numbers.append(k)
            else:
                plain.append((k, entry))
        named = tuple(
            [(name, entry, type(entry) is float and name in changing) for name, entry in (kwargs or {}).items()]
        )
        self._calls.append(Call(func, len(args), tuple(places), tuple(plain), tuple(numbers), named, form))
        self._at += 1

    def interrupt(self) -> None:
        """The last step came of no call that can be recognized: nothing behind it can be expected."""
        self._stray()
        self._whole = False

    def _stray(self) -> None:
        if self._following:
            self._following, self.expected = False, None
            self._calls = self._calls[: self._at]

    def flush_of(self, due: Collection[Value]) -> Flush | None:
        """The last flush, if this one is the same but for numbers, lines and who the stored values are."""
        known = self._flush
        if known is None or not self._following or known.calls is not self._calls or known.count != self._at:
            return None
        return known if [value.place - self._base for value in due] == known.due else None

    def foreseen(self, known: Flush) -> list[Value | None] | None:
        """What that flush will read, as far as it has been read by now (else None), if all has gone as before it."""
        if not self._following or known.calls is not self._calls or self._at >= known.count:
            return None
        found: list[Value | None] = []
        for k in known.inputs:
            value = self._read[k]() if k < len(self._read) else None
            if value is None and k < len(self._read):
                return None  # nobody has it any more
            found.append(value)
        return found

    def read(self, known: Flush) -> tuple[Value, ...]:
        """The stored values that the flush reads: they are there, for its steps hold them."""
        found = [self._read[k]() for k in known.inputs]
        assert None not in found
        return tuple(found)  # type: ignore[arg-type]  # see above

    def remember(self, family: Family, steps: Sequence[Step], inputs: Iterable[Value], due: Iterable[Value]) -> None:
        """A flush that was no known one: what it was made of, if all of it is of this window and was recognized."""
        self._flush = None
        if not self._whole or steps[0].number < self._base:
            return
        order: dict[int, int] = {}
        place = self._base
        for k, call in enumerate(self._calls[: self._at]):
            order[place] = k
            place += len(call.form.facts.outs)
        if place != self.next or any(step.number not in order for step in steps):
            return
        reached = [order[step.number] for step in steps]
        needed, calls = set(reached), self._calls[: self._at]
        changing = [k for k, call in enumerate(calls) if call.numbers or any(changes for _, _, changes in call.named)]
        self._flush = Flush(
            calls=self._calls,
            count=self._at,
            due=[value.place - self._base for value in due],
            family=family,
            inputs=[self._base - 1 - value.place for value in inputs],
            steps=reached,
            given=[place for place, k in enumerate(changing) if k in needed],
        )


def _same(entry: Any, want: Any) -> bool:
    """Whether two arguments are the same one, or would be in a key (`calls.read`): 1 is not True, 0.0 is not -0.0."""
    return type(entry) is type(want) and entry == want and (type(want) is not float or repr(entry) == repr(want))
