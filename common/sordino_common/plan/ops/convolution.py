"""1-d and 2-d convolution and its gradients, by im2col and batched GEMM; groups are one more batch dimension.

`vmap` over per-example gradients turns a batch of B into B groups, so groups are as fast as images. Letters as in
windows.py; G groups, O output channels per group, I input channels per group, M = I·K·L. The columns are made for a
few images (or, if one image is large, groups) at a time: about `_CHUNK_BYTES` of scratch, in cache, whatever the batch.
Sums are over M (forward) or over N·P·Q (weights) in float32 BLAS. Transposed convolution is not in the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
    win = _geometry(x, weight, *rest)
    need(bias is None or bias.shape == weight.shape[:1], f"the bias is [{weight.shape[0]}]")
    return (_out_spec(x, weight, win),)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """Sizes of one convolution in the legend's letters, and how it is cut into chunks."""

    win: Window
    dtype: np.dtype[Any]
    n: int
    g: int
    i: int
    o: int

    @property
    def m(self) -> int:
        return self.i * self.win.kernel[0] * self.win.kernel[1]

    @property
    def pq(self) -> int:
        return self.win.output[0] * self.win.output[1]

    @property
    def one(self) -> int:
        """Bytes of the columns of one image and group."""
        return self.m * self.pq * self.dtype.itemsize

    @property
    def pointwise(self) -> bool:
        """A 1x1 convolution's columns are its image."""
        win = self.win
        return win.kernel == (1, 1) and win.stride == (1, 1) and win.reach == win.image == win.output

    @property
    def padded_bytes(self) -> int:
        h, w = self.win.reach
        return self.n * self.g * self.i * h * w * self.dtype.itemsize

    def transposed(self) -> _Shape | None:
        """The convolution that gives the input's gradient from the output's: the kernel flipped, input and output
        channels exchanged. None for strides, and for padding wider than the kernel: those scatter instead."""
        win = self.win
        edges = [(size - 1) * step for size, step in zip(win.kernel, win.dilation, strict=True)]
        padding = (edges[0] - win.padding[0], edges[1] - win.padding[1])
        if win.stride != (1, 1) or min(padding) < 0:
            return None
        back = Window(
            image=win.output,
            kernel=win.kernel,
            stride=(1, 1),
            padding=padding,
            dilation=win.dilation,
            output=win.image,
        )
        return _Shape(win=back, dtype=self.dtype, n=self.n, g=self.g, i=self.o, o=self.i)

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
        columns = np.empty((n, g * self.i, *self.win.kernel, *self.win.output), self.dtype)
        columns[...] = all_windows(base, self.win)
        return columns.reshape(n, g, self.m, self.pq)


def _shape(x: TensorSpec, weight: TensorSpec, *geometry: Any) -> _Shape:
    groups = geometry[-1]
    return _Shape(
        win=_geometry(x, weight, *geometry),
        dtype=np.dtype(x.dtype),
        n=x.shape[0],
        g=groups,
        i=weight.shape[1],
        o=weight.shape[0] // groups,
    )


def _correlate(shape: _Shape, source: Any, matrix: Any) -> Any:
    """out[n, g] = matrix[g] · columns[n, g]: [N, G, O, P·Q] of a padded source and a matrix [1, G, O, M]."""
    out = np.empty((shape.n, shape.g, shape.o, shape.pq), shape.dtype)
    for at in shape.chunks():
        np.matmul(matrix[:, at[1]], shape.columns(source, at), out=out[at])
    return out


def _as_images(a: Any) -> Any:
    """[N, C, W] as [N, C, 1, W]."""
    return a if a.ndim == 4 else a[:, :, None, :]


def _kernel(outs: Outs, x: TensorSpec, weight: TensorSpec, bias: TensorSpec | None, *rest: Any) -> Kernel:
    shape = _shape(x, weight, *rest)
    final = outs[0].shape

    def kernel(a: Any, w: Any, b: Any = None) -> Any:
        source = padded(_as_images(a), shape.win, 0.0)
        out = _correlate(shape, source, w.reshape(1, shape.g, shape.o, shape.m))
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
    shape = _shape(x, weight, *geometry)
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
    """Σ over the windows that a pixel is in: a convolution of y with the flipped kernel where there is one."""
    kernel = w.reshape(shape.g, shape.o, shape.i, *shape.win.kernel)
    back = shape.transposed()
    if back is None:
        return _scatter_columns(shape, y, kernel)
    flipped = kernel[..., ::-1, ::-1].swapaxes(1, 2).reshape(1, back.g, back.o, back.m)
    return _correlate(back, padded(y.reshape(shape.n, shape.g * shape.o, *shape.win.output), back.win, 0.0), flipped)


def _scatter_columns(shape: _Shape, y: Any, kernel: Any) -> Any:
    """The columns' gradient Wᵀ·y, added back to the pixels that each column came from."""
    win = shape.win
    matrix = kernel.reshape(1, shape.g, shape.o, shape.m).swapaxes(-1, -2)
    full = np.zeros((shape.n, shape.g * shape.i, *win.reach), shape.dtype)
    for at in shape.chunks():
        columns = np.matmul(matrix[:, at[1]], y[at])
        images, groups = at
        part = full[images, groups.start * shape.i : groups.stop * shape.i]
        columns = columns.reshape(*part.shape[:2], *win.kernel, *win.output)
        for k in range(win.kernel[0]):
            for l in range(win.kernel[1]):  # noqa: E741
                part[(..., *win.at(k, l))] += columns[:, :, k, l]
    (h, w), (top, left) = win.image, win.padding
    return np.ascontiguousarray(full[..., top : top + h, left : left + w])


def _grad_weight(shape: _Shape, y: Any, source: Any) -> Any:
    """Σ_n y[n, g] · columns[n, g]ᵀ, as the transpose of columns · yᵀ: the form that BLAS is faster at."""
    out = np.zeros((shape.g, shape.o, shape.m), shape.dtype)
    for at in shape.chunks():
        products = np.matmul(shape.columns(source, at), y[at].swapaxes(-1, -2))
        out[at[1]] += np.add.reduce(products, axis=0).swapaxes(-1, -2)
    return out


# --- costs -------------------------------------------------------------------------------------------------------


def _work(shape: _Shape) -> int:
    return 2 * shape.n * shape.g * shape.o * shape.m * shape.pq


def _flops(_outs: Outs, x: TensorSpec, weight: TensorSpec, _bias: Any, *rest: Any) -> int:
    return _work(_shape(x, weight, *rest))


def _columns_scratch(shape: _Shape) -> int:
    """A padded source, the contiguous part of it that a chunk is made from, the columns."""
    return 2 * shape.padded_bytes + shape.column_bytes()


def _scratch(_outs: Outs, x: TensorSpec, weight: TensorSpec, _bias: Any, *rest: Any) -> int:
    # A contiguous copy of the input and of the weight, should they be views.
    return _columns_scratch(_shape(x, weight, *rest)) + x.nbytes + weight.nbytes


def _backward_flops(_outs: Outs, _grad: Any, x: TensorSpec, weight: TensorSpec, _bias: Any, *rest: Any) -> int:
    *geometry, mask = rest
    shape = _shape(x, weight, *geometry)
    return int(mask[0] + mask[1]) * _work(shape) + shape.n * shape.g * shape.o * shape.pq


def _backward_scratch(_outs: Outs, grad: TensorSpec, x: TensorSpec, weight: TensorSpec, _bias: Any, *rest: Any) -> int:
    *geometry, mask = rest
    shape = _shape(x, weight, *geometry)
    images, groups = shape.step()
    products = 2 * images * groups * shape.o * shape.m * shape.dtype.itemsize
    forward = _columns_scratch(shape) + products
    back = shape.transposed()
    backward = _columns_scratch(back) if back is not None else forward
    work = max(forward if mask[1] else 0, backward if mask[0] else 0)
    return work + x.nbytes + grad.nbytes + 2 * weight.nbytes


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
