"""Local rules that keep a Plan short: views of views, permutations, scalar factors.

They matter twice: each node costs an interpreter about a microsecond, as much as the arithmetic of a small model, and
on secret shares each multiplication by a constant costs a truncation.
"""

from __future__ import annotations

from typing import TypeGuard

from sordino_common.plan.row_rules import ELEMENTWISE
from sordino_common.plan.spec import FLOATS, TensorSpec
from sordino_common.plan.values import Arg, Ref
from sordino_server.trace.draft import Draft
from sordino_server.trace.origins import Origin

Operand = Ref | int | float


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Peephole:
    """Emits to a draft, simplifying against how the operands were made.

    `by_rows`: the graph is a `vmap` over batches of one row, so its tensors are [B, 1, ...]. Elementwise ops then leave
    out the dimension of 1, and the views that a linear layer needs around it meet and vanish."""

    def __init__(self, draft: Draft, *, by_rows: bool = False) -> None:
        self._draft = draft
        self._by_rows = by_rows

    def _emit(self, op: str, args: tuple[Arg, ...], origin: Origin) -> Ref:
        return self.emit(op, args, origin)[0]

    def emit(self, op: str, args: tuple[Arg, ...], origin: Origin) -> tuple[Ref, ...]:
        """The results of the op."""
        if not self._by_rows or op not in ELEMENTWISE:
            return self._draft.emit(op, args, origin)
        out = self._draft.infer(op, args)
        if out.rank < 2 or out.shape[1] != 1:
            return (self._sum_of_product(op, args, out, origin),)
        flat = tuple(self._without_one(arg, out.rank, origin) if isinstance(arg, Ref) else arg for arg in args)
        result = self._sum_of_product(op, flat, self._draft.infer(op, flat), origin)
        return (self.view(result, out.shape, origin),)

    def _without_one(self, x: Ref, rank: int, origin: Origin) -> Ref:
        """An operand of a result of that rank, without the dimension that is the result's second one."""
        shape = self._draft.spec(x).shape
        at = 1 - (rank - len(shape))  # operands meet from the right
        return x if at < 0 else self.view(x, (*shape[:at], *shape[at + 1 :]), origin)

    def _sum_of_product(self, op: str, args: tuple[Arg, ...], out: TensorSpec, origin: Origin) -> Ref:
        """b + x @ y is one op, as it is where no `vmap` takes it apart."""
        if op == "add" and args[2] == 1:
            for product, bias in ((args[0], args[1]), (args[1], args[0])):
                made = self._made_by(product, "mm")
                if made is not None and isinstance(bias, Ref) and isinstance(product, Ref):
                    spec = self._draft.spec(bias)
                    if self._draft.spec(product) == out and spec.dtype == out.dtype:
                        return self._draft.emit("addmm", (bias, *made[1], 1, 1), origin)[0]
        return self._draft.emit(op, args, origin)[0]

    def _made_by(self, ref: object, *ops: str) -> tuple[str, tuple[Arg, ...]] | None:
        made = self._draft.maker(ref) if isinstance(ref, Ref) else None
        return made if made is not None and made[0] in ops else None

    def view(self, x: Ref, shape: tuple[int, ...], origin: Origin) -> Ref:
        """x in another shape. A view of a view is one view; a sum whose kept dimensions are lost keeps none."""
        made = self._made_by(x, "view", "sum")
        if made is not None and made[0] == "view" and isinstance(made[1][0], Ref):
            x = made[1][0]
        elif made is not None and made[0] == "sum" and made[1][2] is True:
            dropped = self._draft.infer("sum", (*made[1][:2], False))
            if dropped.shape == shape:
                return self._emit("sum", (*made[1][:2], False), origin)
        return x if self._draft.spec(x).shape == shape else self._emit("view", (x, shape), origin)

    def permute(self, x: Ref, dims: tuple[int, ...], origin: Origin) -> Ref:
        """x with its dimensions in another order. If only dimensions of size 1 move, no element does: a view."""
        rank = self._draft.spec(x).rank
        order = tuple(dim % rank for dim in dims) if rank else ()
        made = self._made_by(x, "permute")
        if made is not None and isinstance(made[1][0], Ref) and isinstance(made[1][1], tuple):
            inner = [dim for dim in made[1][1] if isinstance(dim, int)]  # all of them, by the op's schema
            x, order = made[1][0], tuple(inner[dim] for dim in order)
        shape = self._draft.spec(x).shape
        if order == tuple(range(rank)):
            return x
        moving = [dim for dim in order if shape[dim] != 1]
        if moving == sorted(moving):
            return self.view(x, tuple(shape[dim] for dim in order), origin)
        return self._emit("permute", (x, order), origin)

    def expand(self, x: Ref, shape: tuple[int, ...], origin: Origin) -> Ref:
        return x if self._draft.spec(x).shape == shape else self._emit("expand", (x, shape), origin)

    def product_of(self, op: str, left: Operand, right: Operand, out: TensorSpec, origin: Origin) -> Ref:
        """mul, div, pow, comparisons. Floats only: x / c is x · (1/c), (xa)b is x · (ab), x · 1 is x, x² is x · x."""
        floating = out.dtype in FLOATS
        if op == "pow" and isinstance(left, Ref) and floating and self._draft.spec(left) == out and _is_number(right):
            if right == 1:
                return left
            if right == 2:
                return self._emit("mul", (left, left), origin)
        if op == "div" and isinstance(left, Ref) and _is_number(right) and right != 0:
            # An integer divided by a number keeps its own rounding.
            op, right = ("mul", 1.0 / right) if self._draft.spec(left) == out else (op, right)
        if op == "mul" and _is_number(left):
            left, right = right, left
        if op == "mul" and floating and isinstance(left, Ref) and _is_number(right) and self._draft.spec(left) == out:
            base, factor = left, float(right)
            made = self._made_by(left, "mul")
            if made is not None and isinstance(made[1][0], Ref) and _is_number(made[1][1]):
                base, factor = made[1][0], float(made[1][1]) * factor
            if factor == 1 and self._draft.spec(base) == out:
                return base
            left, right = base, factor
        return self._emit(op, (left, right), origin)

    def sum_of(self, op: str, left: Operand, right: Operand, alpha: float, out: TensorSpec, origin: Origin) -> Ref:
        """left ± alpha · right. Floats only: x ± 0 is x."""
        if out.dtype in FLOATS and alpha == 1:
            if isinstance(left, Ref) and self._draft.spec(left) == out and _is_number(right) and right == 0:
                return left
            if op == "add" and isinstance(right, Ref) and self._draft.spec(right) == out and left == 0:
                return right
        return self._emit(op, (left, right, alpha), origin)
