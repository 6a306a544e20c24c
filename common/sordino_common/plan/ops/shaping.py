"""Shape ops: view, permute, expand, slice, select (no copies), cat, pad, flip, repeat and the scatters of slices.

`view` stands for every reshape, squeeze and unsqueeze; `permute` for every transposition. Sizes are explicit: no -1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sordino_common.errors import PlanError
from sordino_common.plan.ops.base import Kernel, Outs, register
from sordino_common.plan.ops.rules import cast_bytes, check_scalar, dim_of, dims_of, need, result_dtype, scalar_of
from sordino_common.plan.spec import TensorSpec

_NO_WORK = lambda *_: 0  # noqa: E731  moving data is no operation; views move none


# --- views -------------------------------------------------------------------------------------------------------


def _infer_view(x: TensorSpec, size: tuple[int, ...]) -> Outs:
    out = TensorSpec(x.dtype, size)
    need(out.numel == x.numel, f"{x.numel} elements can't be viewed as {list(size)}")
    return (out,)


def _view_kernel(_outs: Outs, _x: TensorSpec, size: tuple[int, ...]) -> Kernel:
    return lambda a: a.reshape(size)


def _infer_permute(x: TensorSpec, dims: tuple[int, ...]) -> Outs:
    order = [dim_of(dim, x.rank) for dim in dims]
    need(sorted(order) == list(range(x.rank)), f"{list(dims)} is no permutation of {x.rank} dimensions")
    return (TensorSpec(x.dtype, tuple(x.shape[dim] for dim in order)),)


def _permute_kernel(_outs: Outs, x: TensorSpec, dims: tuple[int, ...]) -> Kernel:
    order = tuple(dim_of(dim, x.rank) for dim in dims)
    if order == (1, 0):
        return lambda a: a.T
    return lambda a: a.transpose(order)


def _infer_expand(x: TensorSpec, size: tuple[int, ...]) -> Outs:
    out = TensorSpec(x.dtype, size)
    fits = len(size) >= x.rank and all(
        have in (1, want) for have, want in zip(reversed(x.shape), reversed(size), strict=False)
    )
    need(fits, f"{list(x.shape)} does not expand to {list(size)}")
    return (out,)


def _expand_kernel(_outs: Outs, x: TensorSpec, size: tuple[int, ...]) -> Kernel:
    if size == x.shape:
        return lambda a: a
    return lambda a: np.broadcast_to(a, size)


def slice_bounds(size: int, start: int | None, end: int | None, step: int) -> tuple[int, int]:
    """Start and end of a slice, as torch clamps them: 0 <= start <= end <= size."""
    need(step >= 1, f"the step of a slice is at least 1, got {step}")
    first, last, _ = slice(start, end).indices(size)
    return first, max(first, last)


def _sliced(x: TensorSpec, dim: int, start: int | None, end: int | None, step: int) -> tuple[Any, ...]:
    need(x.rank > 0, "a tensor of rank 0 has no slices")
    at = dim_of(dim, x.rank)
    first, last = slice_bounds(x.shape[at], start, end, step)
    return (*([slice(None)] * at), slice(first, last, step))


def _slice_shape(x: TensorSpec, key: tuple[Any, ...]) -> tuple[int, ...]:
    chosen = key[-1]
    count = len(range(chosen.start, chosen.stop, chosen.step))
    return (*x.shape[: len(key) - 1], count, *x.shape[len(key) :])


def _infer_slice(x: TensorSpec, dim: int, start: int | None, end: int | None, step: int) -> Outs:
    return (TensorSpec(x.dtype, _slice_shape(x, _sliced(x, dim, start, end, step))),)


def _slice_kernel(_outs: Outs, x: TensorSpec, dim: int, start: int | None, end: int | None, step: int) -> Kernel:
    key = _sliced(x, dim, start, end, step)
    return lambda a: a[key]


def _selected(x: TensorSpec, dim: int, index: int) -> tuple[Any, ...]:
    need(x.rank > 0, "a tensor of rank 0 has nothing to select from")
    at = dim_of(dim, x.rank)
    need(-x.shape[at] <= index < x.shape[at], f"index {index} is outside dimension {dim} of {list(x.shape)}")
    return (*([slice(None)] * at), index)


def _infer_select(x: TensorSpec, dim: int, index: int) -> Outs:
    at = len(_selected(x, dim, index)) - 1
    return (TensorSpec(x.dtype, (*x.shape[:at], *x.shape[at + 1 :])),)


def _select_kernel(_outs: Outs, x: TensorSpec, dim: int, index: int) -> Kernel:
    key = _selected(x, dim, index)
    return lambda a: a[key]


register("view(Tensor self, ints size)", infer=_infer_view, kernel=_view_kernel, flops=_NO_WORK, view=True,
         may_copy=True)  # fmt: skip
register("permute(Tensor self, ints dims)", infer=_infer_permute, kernel=_permute_kernel, flops=_NO_WORK, view=True)
register("expand(Tensor self, ints size)", infer=_infer_expand, kernel=_expand_kernel, flops=_NO_WORK, view=True)
register("slice(Tensor self, int dim, int? start=None, int? end=None, int step=1)", infer=_infer_slice,
         kernel=_slice_kernel, flops=_NO_WORK, view=True)  # fmt: skip
register("select(Tensor self, int dim, int index)", infer=_infer_select, kernel=_select_kernel, flops=_NO_WORK,
         view=True)  # fmt: skip


# --- copies ------------------------------------------------------------------------------------------------------


def _infer_cat(tensors: tuple[TensorSpec, ...], dim: int) -> Outs:
    if not tensors or tensors[0].rank == 0:
        raise PlanError("takes at least one tensor, of rank 1 or more")
    at = dim_of(dim, tensors[0].rank)
    rests = {(*x.shape[:at], *x.shape[at + 1 :]) for x in tensors}
    need(len(rests) == 1 and len({x.rank for x in tensors}) == 1, f"the shapes differ outside dimension {dim}")
    shape = list(tensors[0].shape)
    shape[at] = sum(x.shape[at] for x in tensors)
    return (TensorSpec(result_dtype(*tensors), tuple(shape)),)


def _cat_kernel(outs: Outs, tensors: tuple[TensorSpec, ...], dim: int) -> Kernel:
    at, dtype = dim_of(dim, tensors[0].rank), np.dtype(outs[0].dtype)
    return lambda *arrays: np.concatenate(arrays, axis=at, dtype=dtype)


def _pads(x: TensorSpec, pad: tuple[int, ...]) -> list[tuple[int, int]]:
    need(len(pad) % 2 == 0 and len(pad) <= 2 * x.rank, "pad is a list of pairs, from the last dimension on")
    need(all(width >= 0 for width in pad), "a pad is at least 0; use slice to cut")
    pairs = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]
    return [(0, 0)] * (x.rank - len(pairs)) + pairs[::-1]


def _infer_pad(x: TensorSpec, pad: tuple[int, ...], value: Any) -> Outs:
    check_scalar(value, x.dtype)
    pads = _pads(x, pad)
    return (TensorSpec(x.dtype, tuple(size + a + b for size, (a, b) in zip(x.shape, pads, strict=True))),)


def _pad_kernel(outs: Outs, x: TensorSpec, pad: tuple[int, ...], value: Any) -> Kernel:
    inner = tuple(slice(a, a + size) for size, (a, _) in zip(x.shape, _pads(x, pad), strict=True))
    shape, dtype, fill = outs[0].shape, np.dtype(x.dtype), scalar_of(value, x.dtype)

    def kernel(a: Any) -> Any:
        out = np.full(shape, fill, dtype)
        out[inner] = a
        return out

    return kernel


def _infer_flip(x: TensorSpec, dims: tuple[int, ...]) -> Outs:
    dims_of(dims, x.rank)
    return (x,)


def _flip_kernel(_outs: Outs, x: TensorSpec, dims: tuple[int, ...]) -> Kernel:
    axes = dims_of(dims, x.rank) if dims else ()
    return lambda a: np.array(np.flip(a, axes), order="C")


def _infer_repeat(x: TensorSpec, repeats: tuple[int, ...]) -> Outs:
    need(len(repeats) >= x.rank, f"takes at least {x.rank} repeats")
    need(all(0 <= count <= 1 << 40 for count in repeats), "a repeat is a natural number")
    shape = (*([1] * (len(repeats) - x.rank)), *x.shape)
    return (TensorSpec(x.dtype, tuple(size * count for size, count in zip(shape, repeats, strict=True))),)


def _repeat_kernel(outs: Outs, x: TensorSpec, repeats: tuple[int, ...]) -> Kernel:
    """[c0·s0, c1·s1, ...] is [c0, s0, c1, s1, ...] in memory: one broadcast copy, unlike np.tile."""
    shape = (*([1] * (len(repeats) - x.rank)), *x.shape)
    apart = [dim for size, count in zip(shape, repeats, strict=True) for dim in (count, size)]
    ones = [dim for size in shape for dim in (1, size)]
    final = outs[0].shape
    if 0 in final:  # NumPy refuses an empty array whose other dimensions are huge, and `apart` may have such
        return lambda a: np.empty(final, a.dtype)

    def kernel(a: Any) -> Any:
        out = np.empty(apart, a.dtype)
        out[...] = a.reshape(ones)
        return out.reshape(final)

    return kernel


def _infer_slice_scatter(x: TensorSpec, src: TensorSpec, dim: int, start: Any, end: Any, step: int) -> Outs:
    shape = _slice_shape(x, _sliced(x, dim, start, end, step))
    need(src == TensorSpec(x.dtype, shape), f"the slice is {x.dtype}{list(shape)}")
    return (x,)


def _slice_scatter_kernel(
    _outs: Outs, x: TensorSpec, _src: TensorSpec, dim: int, start: Any, end: Any, step: int
) -> Kernel:
    return _put_at(_sliced(x, dim, start, end, step))


def _infer_select_scatter(x: TensorSpec, src: TensorSpec, dim: int, index: int) -> Outs:
    need((src,) == _infer_select(x, dim, index), "the source is not of the selected part's shape and dtype")
    return (x,)


def _select_scatter_kernel(_outs: Outs, x: TensorSpec, _src: TensorSpec, dim: int, index: int) -> Kernel:
    return _put_at(_selected(x, dim, index))


def _put_at(key: tuple[Any, ...]) -> Kernel:
    def kernel(a: Any, src: Any) -> Any:
        out = np.array(a, order="C")
        out[key] = src
        return out

    return kernel


register("cat(Tensors tensors, int dim=0)", infer=_infer_cat, kernel=_cat_kernel, flops=_NO_WORK,
         scratch=lambda outs, tensors, _dim: cast_bytes(outs[0].dtype, *tensors))  # fmt: skip
register("pad(Tensor self, ints pad, Scalar value=0)", infer=_infer_pad, kernel=_pad_kernel, flops=_NO_WORK)
register("flip(Tensor self, ints dims)", infer=_infer_flip, kernel=_flip_kernel, flops=_NO_WORK)
register("repeat(Tensor self, ints repeats)", infer=_infer_repeat, kernel=_repeat_kernel, flops=_NO_WORK,
         scratch=lambda _outs, x, _repeats: x.nbytes)  # fmt: skip
register("slice_scatter(Tensor self, Tensor src, int dim, int? start=None, int? end=None, int step=1)",
         infer=_infer_slice_scatter, kernel=_slice_scatter_kernel, flops=_NO_WORK)  # fmt: skip
register("select_scatter(Tensor self, Tensor src, int dim, int index)", infer=_infer_select_scatter,
         kernel=_select_scatter_kernel, flops=_NO_WORK)  # fmt: skip
