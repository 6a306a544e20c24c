"""1-d and 2-d convolution and its gradients, by im2col and batched GEMM; groups are one more batch dimension.

`vmap` over per-example gradients turns a batch of B into B groups, so groups are as fast as images. Letters as in
windows.py; G groups, O output channels per group, I input channels per group, M = I·K·L. The columns are made for a
few images (or, if one image is large, groups) at a time: about `_CHUNK_BYTES` of scratch, in cache, whatever the batch.
Sums are over M (forward) or over N·P·Q (weights) in float32 BLAS. Transposed convolution is not in the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from sordino_common.plan.ops.base import Kernel, Outs, register
from sordino_common.plan.ops.rules import need, need_float
from sordino_common.plan.ops.windows import Window, all_windows, padded, pair, window
from sordino_common.plan.spec import TensorSpec

_CHUNK_BYTES: Final = 2 * 1024 * 1024  # columns that stay in a core's share of the cache


def _geometry(
    x: TensorSpec,
    weight: TensorSpec,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    transposed: bool,
    output_padding: tuple[int, ...],
    groups: int,
) -> Window:
    need(not transposed and not any(output_padding), "transposed convolution is not supported")
    need(x.rank in (3, 4) and weight.rank == x.rank, "takes input [N, C, (H,) W] and weight [O, I, (K,) L]")
    need(all(len(v) in (1, x.rank - 2) for v in (stride, padding, dilation)), "one entry per image dimension")
    need(groups >= 1 and x.shape[1] == weight.shape[1] * groups, f"{x.shape[1]} channels are not {groups} groups")
    need(weight.shape[0] % groups == 0, f"{weight.shape[0]} output channels do not make {groups} groups")
    need(0 not in weight.shape[1:], "the kernel is empty")
    need(x.numel == 0 or weight.shape[0] > 0, "no output channels")
    if x.rank == 4:
        image, kernel = (x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3])
        return window(
            image, kernel, pair(stride, "stride", 1), pair(padding, "padding", 0), pair(dilation, "dilation", 1)
        )
    s, p, d = pair(stride, "stride", 1)[1], pair(padding, "padding", 0)[1], pair(dilation, "dilation", 1)[1]
    return window((1, x.shape[2]), (1, weight.shape[2]), (1, s), (0, p), (1, d))


def _out_spec(x: TensorSpec, weight: TensorSpec, win: Window) -> TensorSpec:
    return TensorSpec(x.dtype, (x.shape[0], weight.shape[0], *(win.output if x.rank == 4 else win.output[1:])))


def _infer(x: TensorSpec, weight: TensorSpec, bias: TensorSpec | None, *rest: Any) -> Outs:
    need_float(x, weight, bias)
    need(bias is None or bias.shape == weight.shape[:1], f"the bias is [{weight.shape[0]}]")
    return (_out_spec(x, weight, _geometry(x, weight, *rest)),)


class _Shape:
    """Sizes of one convolution, and how it is cut into chunks."""

    def __init__(self, x: TensorSpec, weight: TensorSpec, win: Window, groups: int) -> None:
        self.win = win
        self.dtype = np.dtype(x.dtype)
        self.n, self.g = x.shape[0], groups
        self.i, self.o = weight.shape[1], weight.shape[0] // groups
        self.k, self.l = win.kernel
        self.p, self.q = win.output
        self.m, self.pq = self.i * self.k * self.l, self.p * self.q
        self.one = self.m * self.pq * self.dtype.itemsize  # columns of one image and group
        self.pointwise = win.kernel == (1, 1) and win.stride == (1, 1) and win.reach == win.image

    def step(self) -> tuple[int, int]:
        """(images, groups) to a chunk, each at least 1."""
        fit = max(1, _CHUNK_BYTES // max(1, self.one))
        groups = min(self.g, fit)
        return (max(1, min(self.n, fit // groups)) if groups == self.g else 1), max(1, groups)

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        images, groups = self.step()
        for n in range(0, self.n, images):
            for g in range(0, self.g, groups):
                yield slice(n, min(n + images, self.n)), slice(g, min(g + groups, self.g))

    def column_bytes(self) -> int:
        images, groups = self.step()
        return images * groups * self.one

    def columns(self, x: Any, at: tuple[slice, slice]) -> Any:
        """Columns [n, g, M, P·Q] of the chunk `at` of a padded x [N, G·I, H', W']."""
        images, groups = at
        part = x[images, groups.start * self.i : groups.stop * self.i]
        n, g = images.stop - images.start, groups.stop - groups.start
        if self.pointwise:
            return part.reshape(n, g, self.m, self.pq)
        base = np.ascontiguousarray(part) if part.size and not part.flags.c_contiguous else part
        columns = np.empty((n, g * self.i, self.k, self.l, self.p, self.q), self.dtype)
        columns[...] = all_windows(base, self.win)
        return columns.reshape(n, g, self.m, self.pq)


def _as_images(a: Any) -> Any:
    """[N, C, W] as [N, C, 1, W]."""
    return a if a.ndim == 4 else a[:, :, None, :]


def _kernel(outs: Outs, x: TensorSpec, weight: TensorSpec, bias: TensorSpec | None, *rest: Any) -> Kernel:
    shape = _Shape(x, weight, _geometry(x, weight, *rest), rest[-1])
    final = outs[0].shape

    def kernel(a: Any, w: Any, b: Any = None) -> Any:
        """out[n, g] = W[g] · columns[n, g]."""
        source = padded(_as_images(a), shape.win, 0.0)
        matrix = w.reshape(1, shape.g, shape.o, shape.m)
        out = np.empty((shape.n, shape.g, shape.o, shape.pq), shape.dtype)
        for at in shape.chunks():
            np.matmul(matrix[:, at[1]], shape.columns(source, at), out=out[at])
        if b is not None:
            out += b.reshape(shape.g, shape.o, 1)
        return out.reshape(final)

    return kernel


# --- gradients ---------------------------------------------------------------------------------------------------


def _infer_backward(
    grad: TensorSpec, x: TensorSpec, weight: TensorSpec, bias: tuple[int, ...] | None, *rest: Any
) -> Outs:
    *geometry, mask = rest
    need_float(grad, x, weight)
    need(grad == _out_spec(x, weight, _geometry(x, weight, *geometry)), "the gradient is not of the output's shape")
    need(len(mask) == 3 and any(mask), "output_mask has three entries, one of them true")
    need(bias is None or bias == weight.shape[:1], f"bias_sizes is [{weight.shape[0]}]")
    every = (x, weight, TensorSpec(x.dtype, weight.shape[:1]))
    return tuple(out for out, wanted in zip(every, mask, strict=True) if wanted)


def _backward_kernel(
    _outs: Outs, _grad: TensorSpec, x: TensorSpec, weight: TensorSpec, _bias: Any, *rest: Any
) -> Kernel:
    *geometry, mask = rest
    shape = _Shape(x, weight, _geometry(x, weight, *geometry), geometry[-1])
    want_x, want_w, want_b = mask
    x_shape, w_shape = x.shape, weight.shape
    single = sum(mask) == 1

    def kernel(grad: Any, a: Any, w: Any) -> Any:
        y = np.ascontiguousarray(grad).reshape(shape.n, shape.g, shape.o, shape.pq)
        results = []
        if want_x:
            results.append(_grad_input(shape, y, w).reshape(x_shape))
        if want_w:
            results.append(_grad_weight(shape, y, padded(_as_images(a), shape.win, 0.0)).reshape(w_shape))
        if want_b:
            results.append(np.add.reduce(y, axis=(0, 3)).reshape(-1))
        return results[0] if single else tuple(results)

    return kernel


def _grad_input(shape: _Shape, y: Any, w: Any) -> Any:
    """columns' gradient = Wᵀ·y, added back to the pixels that each column came from."""
    win = shape.win
    matrix = w.reshape(1, shape.g, shape.o, shape.m).swapaxes(-1, -2)
    full = np.zeros((shape.n, shape.g * shape.i, *win.reach), shape.dtype)
    for at in shape.chunks():
        columns = np.matmul(matrix[:, at[1]], y[at])
        images, groups = at
        part = full[images, groups.start * shape.i : groups.stop * shape.i]
        columns = columns.reshape(*part.shape[:2], shape.k, shape.l, shape.p, shape.q)
        if shape.pq:
            for k in range(shape.k):
                for l in range(shape.l):  # noqa: E741
                    part[(..., *win.at(k, l))] += columns[:, :, k, l]
    (h, w_), (top, left) = win.image, win.padding
    inner = full[..., top : top + h, left : left + w_]
    return inner if win.reach == win.image else np.ascontiguousarray(inner)


def _grad_weight(shape: _Shape, y: Any, source: Any) -> Any:
    """Σ_n y[n, g] · columns[n, g]ᵀ."""
    out = np.zeros((shape.g, shape.o, shape.m), shape.dtype)
    for at in shape.chunks():
        products = np.matmul(y[at], shape.columns(source, at).swapaxes(-1, -2))
        out[at[1]] += np.add.reduce(products, axis=0)
    return out


# --- costs -------------------------------------------------------------------------------------------------------


def _work(shape: _Shape) -> int:
    return 2 * shape.n * shape.g * shape.o * shape.m * shape.pq


def _flops(_outs: Outs, x: TensorSpec, weight: TensorSpec, _bias: Any, *rest: Any) -> int:
    return _work(_Shape(x, weight, _geometry(x, weight, *rest), rest[-1]))


def _padded_bytes(x: TensorSpec, shape: _Shape) -> int:
    """A padded copy of the input, or a contiguous one."""
    h, w = shape.win.reach
    return max(x.nbytes, shape.n * shape.g * shape.i * h * w * shape.dtype.itemsize)


def _scratch(_outs: Outs, x: TensorSpec, weight: TensorSpec, _bias: Any, *rest: Any) -> int:
    shape = _Shape(x, weight, _geometry(x, weight, *rest), rest[-1])
    # Columns, the contiguous part they are made from (not larger than the padded input), a contiguous weight.
    return 2 * _padded_bytes(x, shape) + shape.column_bytes() + weight.nbytes


def _backward_flops(_outs: Outs, _grad: Any, x: TensorSpec, weight: TensorSpec, _bias: Any, *rest: Any) -> int:
    *geometry, mask = rest
    shape = _Shape(x, weight, _geometry(x, weight, *geometry), geometry[-1])
    return int(mask[0] + mask[1]) * _work(shape) + shape.n * shape.g * shape.o * shape.pq


def _backward_scratch(_outs: Outs, grad: TensorSpec, x: TensorSpec, weight: TensorSpec, _bias: Any, *rest: Any) -> int:
    *geometry, _mask = rest
    shape = _Shape(x, weight, _geometry(x, weight, *geometry), geometry[-1])
    images, groups = shape.step()
    products = 2 * images * groups * shape.o * shape.m * shape.dtype.itemsize
    return 2 * _padded_bytes(x, shape) + shape.column_bytes() + products + grad.nbytes + weight.nbytes


_GEOMETRY: Final = "ints stride, ints padding, ints dilation, bool transposed, ints output_padding, int groups"
register(f"convolution(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY})", infer=_infer, kernel=_kernel,
         flops=_flops, scratch=_scratch)  # fmt: skip
# The results are those that output_mask asks for, in the order input, weight, bias.
register(
    f"convolution_backward(Tensor grad_output, Tensor input, Tensor weight, ints? bias_sizes, {_GEOMETRY},"
    " bools output_mask)",
    infer=_infer_backward,
    kernel=_backward_kernel,
    flops=_backward_flops,
    scratch=_backward_scratch,
)
