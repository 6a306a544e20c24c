"""Reading and writing at indices that come with the data: gather, scatter, index, index_put, embedding.

Indices are checked when they are used: one outside its dimension is a `PlanError`, never memory that is not ours.
gather, scatter and embedding take [0, n); index and index_put take [-n, n), as torch does. Boolean masks are not
taken: the shape of their result would depend on the data. If several sources are written to one place, the last in
memory order stays (torch leaves that open).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sordino_common.errors import PlanError
from sordino_common.plan.ops.base import Kernel, Outs, register
from sordino_common.plan.ops.rules import broadcast, check_indices, check_scalar, dim_of, need, need_index, scalar_of
from sordino_common.plan.spec import TensorSpec

_INDEX_BYTES = 8


# --- gather and scatter ------------------------------------------------------------------------------------------


def _along(x: TensorSpec, dim: int, index: TensorSpec) -> int:
    """Check the index of a gather or scatter; returns the dimension, from the front."""
    need(index.dtype == "int64", f"the index is int64, got {index.dtype}")
    need(x.rank == index.rank, "tensor and index differ in rank")
    at = dim_of(dim, x.rank)
    fits = all(index.shape[d] <= x.shape[d] for d in range(x.rank) if d != at)
    # torch lets an empty index have any shape.
    need(fits or index.numel == 0, f"the index is larger than the tensor outside dimension {dim}")
    return at


def _grid(index: TensorSpec, at: int) -> list[Any]:
    """Open grid over the index's shape: entry d counts along dimension d; the one at `at` is to be replaced."""
    return [
        np.arange(size).reshape([-1 if other == d else 1 for other in range(index.rank)])
        for d, size in enumerate(index.shape)
    ]


def _infer_gather(x: TensorSpec, dim: int, index: TensorSpec) -> Outs:
    _along(x, dim, index)
    return (TensorSpec(x.dtype, index.shape),)


def _grid_held(_outs: Outs, _x: TensorSpec, _dim: int, index: TensorSpec, *_: Any) -> int:
    return 2 * _INDEX_BYTES * sum(index.shape)


def _gather_kernel(_outs: Outs, x: TensorSpec, dim: int, index: TensorSpec) -> Kernel:
    at = _along(x, dim, index)
    size = x.shape[at] if x.rank else 1
    if x.rank == 0:

        def single(a: Any, idx: Any) -> Any:
            check_indices(idx, 1, "gather")
            return np.array(a)

        return single
    before, after = _grid(index, at)[:at], _grid(index, at)[at + 1 :]

    def kernel(a: Any, idx: Any) -> Any:
        check_indices(idx, size, "gather")
        return a[(*before, idx, *after)]

    return kernel


def _infer_scatter(x: TensorSpec, dim: int, index: TensorSpec, src: Any) -> Outs:
    _along(x, dim, index)
    if isinstance(src, TensorSpec):
        need(src.dtype == x.dtype, "source and tensor differ in dtype")
        need(src.rank == x.rank, "source and tensor differ in rank")
        fits = all(have >= want for have, want in zip(src.shape, index.shape, strict=True))
        need(fits or index.numel == 0, "the index is larger than the source")
    else:
        check_scalar(src, x.dtype)
    return (x,)


def _scatter_kernel(_outs: Outs, x: TensorSpec, dim: int, index: TensorSpec, src: Any) -> Kernel:
    at = _along(x, dim, index)
    size = x.shape[at] if x.rank else 1
    grid = _grid(index, at)
    part = tuple(slice(0, count) for count in index.shape)
    constant = None if isinstance(src, TensorSpec) else scalar_of(src, x.dtype)

    def kernel(a: Any, idx: Any, values: Any = None) -> Any:
        check_indices(idx, size, "scatter")
        out = np.array(a, order="C")
        if not idx.size:
            return out
        key = (*grid[:at], idx, *grid[at + 1 :]) if grid else ()
        out[key] = values[part] if constant is None else constant
        return out

    return kernel


def _offset_held(_outs: Outs, x: TensorSpec, dim: int, index: TensorSpec, *_: Any) -> int:
    """The offsets of all dimensions but `dim`, once more while they are summed up."""
    at = dim_of(dim, x.rank)
    return 2 * _INDEX_BYTES * (sum(index.shape) + math.prod(max(1, n) for d, n in enumerate(index.shape) if d != at))


def _scatter_add_kernel(_outs: Outs, x: TensorSpec, dim: int, index: TensorSpec, _src: TensorSpec) -> Kernel:
    at = _along(x, dim, index)
    size = x.shape[at] if x.rank else 1
    strides = [math.prod(x.shape[d + 1 :]) for d in range(x.rank)]
    offset = sum((g * strides[d] for d, g in enumerate(_grid(index, at)) if d != at), start=np.zeros((), np.int64))
    part = tuple(slice(0, count) for count in index.shape)
    stride = strides[at] if x.rank else 1

    def kernel(a: Any, idx: Any, values: Any) -> Any:
        check_indices(idx, size, "scatter_add")
        out = np.array(a, order="C")
        if idx.size:
            flat = np.multiply(idx, stride)
            flat = flat + offset
            np.add.at(out.reshape(-1), flat.reshape(-1), values[part].reshape(-1))
        return out

    return kernel


register("gather(Tensor self, int dim, Tensor index)", infer=_infer_gather, kernel=_gather_kernel,
         held=_grid_held, scratch=lambda outs, *_: _INDEX_BYTES * outs[0].numel)  # fmt: skip
register("scatter(Tensor self, int dim, Tensor index, Num src)", infer=_infer_scatter, kernel=_scatter_kernel,
         held=_grid_held, scratch=lambda _outs, _x, _dim, index, _src: 2 * _INDEX_BYTES * index.numel)  # fmt: skip
# The offsets of the other dimensions (the whole grid at most), two arrays of flat indices, the source made flat.
register("scatter_add(Tensor self, int dim, Tensor index, Tensor src)", infer=_infer_scatter,
         kernel=_scatter_add_kernel, held=_offset_held, flops=lambda _outs, _x, _dim, index, _src: index.numel,
         scratch=lambda _outs, _x, _dim, index, _src: 4 * _INDEX_BYTES * index.numel)  # fmt: skip


# --- index and index_put -----------------------------------------------------------------------------------------


def _indexed(x: TensorSpec, indices: tuple[TensorSpec | None, ...]) -> tuple[int, ...]:
    """Shape of x[indices]: the indices broadcast; their shape stands where they stood if they are neighbours, else
    in front."""
    need(0 < len(indices) <= x.rank, f"takes 1 to {x.rank} indices")
    places = [place for place, index in enumerate(indices) if index is not None]
    need(bool(places), "all indices are null")
    for index in indices:
        if index is not None:
            need_index(index)
    common = broadcast(*(index.shape for index in indices if index is not None))
    for place in places:
        need(x.shape[place] > 0 or math.prod(common) == 0, f"dimension {place} is empty: nothing can be indexed")
    rest = [size for d, size in enumerate(x.shape) if d not in places]
    adjacent = places[-1] - places[0] + 1 == len(places)
    front = places[0] if adjacent else 0
    return (*rest[:front], *common, *rest[front:])


def _infer_index(x: TensorSpec, indices: tuple[TensorSpec | None, ...]) -> Outs:
    return (TensorSpec(x.dtype, _indexed(x, indices)),)


def _key(x: TensorSpec, indices: tuple[TensorSpec | None, ...], arrays: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    """The key for NumPy: checked, negative indices counted from the end."""
    given = iter(arrays)
    key: list[Any] = []
    for size, index in zip(x.shape, indices, strict=False):
        if index is None:
            key.append(slice(None))
            continue
        idx = next(given)
        if idx.size and (int(idx.min()) < -size or int(idx.max()) >= size):
            raise PlanError(f"{what}: an index is outside [-{size}, {size})")
        key.append(idx)
    return tuple(key)


def _index_kernel(outs: Outs, x: TensorSpec, indices: tuple[TensorSpec | None, ...]) -> Kernel:
    shape = outs[0].shape

    def kernel(a: Any, *arrays: Any) -> Any:
        found = a[_key(x, indices, arrays, "index")]
        # Indices of rank 0 only make a basic index, hence a view, which would keep `a` alive.
        return np.array(found).reshape(shape) if found.base is not None else found

    return kernel


def _infer_index_put(x: TensorSpec, indices: tuple[TensorSpec | None, ...], values: TensorSpec, _add: bool) -> Outs:
    shape = _indexed(x, indices)
    need(values.dtype == x.dtype, "values and tensor differ in dtype")
    need(broadcast(values.shape, shape) == shape, f"values do not broadcast to {list(shape)}")
    return (x,)


def _index_put_kernel(
    _outs: Outs, x: TensorSpec, indices: tuple[TensorSpec | None, ...], _values: TensorSpec, accumulate: bool
) -> Kernel:
    leading = [index for index in indices if index is not None]
    count, shape = len(leading), _indexed(x, indices)
    only_leading = all(index is not None for index in indices[:count])
    inner = math.prod(x.shape[count:])
    columns = np.arange(inner)
    dims = x.shape[:count]

    def kernel(a: Any, *arrays: Any) -> Any:
        *given, values = arrays
        key = _key(x, indices, tuple(given), "index_put")
        out = np.array(a, order="C")
        if not accumulate:
            out[key] = values
        elif only_leading:
            # np.add.at is fast on one dimension only: rows become flat positions.
            rows = np.zeros((), np.int64)
            for idx, size in zip(key, dims, strict=False):
                rows = rows * size + np.where(idx < 0, idx + size, idx)
            flat = rows[..., None] * inner + columns
            np.add.at(out.reshape(-1), flat.reshape(-1), np.broadcast_to(values, shape).reshape(-1))
        else:
            np.add.at(out, key, values)
        return out

    return kernel


def _columns_held(_outs: Outs, x: TensorSpec, indices: tuple[TensorSpec | None, ...], *_: Any) -> int:
    return _INDEX_BYTES * math.prod(x.shape[sum(index is not None for index in indices) :])


def _put_scratch(_outs: Outs, x: TensorSpec, indices: tuple[TensorSpec | None, ...], *_: Any) -> int:
    return 4 * _INDEX_BYTES * math.prod(_indexed(x, indices)) + x.nbytes


register("index(Tensor self, Tensors? indices)", infer=_infer_index, kernel=_index_kernel,
         scratch=lambda outs, *_: outs[0].nbytes + _INDEX_BYTES * outs[0].numel)  # fmt: skip
register("index_put(Tensor self, Tensors? indices, Tensor values, bool accumulate=False)", infer=_infer_index_put,
         kernel=_index_put_kernel, held=_columns_held, scratch=_put_scratch)  # fmt: skip


# --- embedding ---------------------------------------------------------------------------------------------------


def _infer_embedding(weight: TensorSpec, indices: TensorSpec) -> Outs:
    need(weight.rank == 2, "the weight is a matrix")
    need_index(indices)
    return (TensorSpec(weight.dtype, (*indices.shape, weight.shape[1])),)


def _embedding_kernel(_outs: Outs, weight: TensorSpec, _indices: TensorSpec) -> Kernel:
    size = weight.shape[0]

    def kernel(a: Any, idx: Any) -> Any:
        check_indices(idx, size, "embedding")
        return a.take(idx, axis=0, mode="clip")  # in range, as just checked

    return kernel


register("embedding(Tensor weight, Tensor indices)", infer=_infer_embedding, kernel=_embedding_kernel,
         scratch=lambda _outs, weight, indices: weight.nbytes + _INDEX_BYTES * indices.numel)  # fmt: skip
