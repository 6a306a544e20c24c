"""2-d pooling over [N, C, H, W] or [C, H, W]: maximum (with indices), average, adaptive average; and the gradients.

The window's elements are walked in a Python loop of K·L steps, each a vectorised pass over all windows: no im2col, and
scratch of the output's size only. Indices of max pooling are flat positions in the image, as in torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sordino_common.plan.ops.base import Kernel, Outs, register
from sordino_common.plan.ops.rules import check_indices, need, need_float
from sordino_common.plan.ops.windows import Window, padded, pair, window
from sordino_common.plan.spec import TensorSpec


def _geometry(
    x: TensorSpec,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: bool,
) -> Window:
    need_float(x)
    need(x.rank in (3, 4), "takes [N, C, H, W] or [C, H, W]")
    need(0 not in x.shape[-3:], "channels, height and width are at least 1")
    size, pads = pair(kernel, "kernel_size", 1), pair(padding, "padding", 0)
    steps = pair(stride, "stride", 1) if stride else size
    need(2 * pads[0] <= size[0] and 2 * pads[1] <= size[1], "padding is at most half of the kernel")
    return window((x.shape[-2], x.shape[-1]), size, steps, pads, pair(dilation, "dilation", 1), ceil_mode=ceil_mode)


def _pooled(x: TensorSpec, win: Window, dtype: str) -> TensorSpec:
    return TensorSpec(dtype, (*x.shape[:-2], *win.output))


def _elements(win: Window) -> int:
    return win.kernel[0] * win.kernel[1]


def _padded_bytes(x: TensorSpec, win: Window) -> int:
    """A padded or contiguous copy of x, or a gradient of the padded image's size."""
    return max(x.nbytes, x.nbytes // max(1, win.image[0] * win.image[1]) * win.reach[0] * win.reach[1])


def _tables_bytes(win: Window) -> int:
    """Tables over the output's positions and over the kernel's elements (tuples of slices), and their making."""
    return 40 * win.output[0] * win.output[1] + 512 * _elements(win)


# --- maximum -----------------------------------------------------------------------------------------------------


def _infer_max(x: TensorSpec, *geometry: Any) -> Outs:
    win = _geometry(x, *geometry)
    return _pooled(x, win, x.dtype), _pooled(x, win, "int64")


def _max_kernel(outs: Outs, x: TensorSpec, *geometry: Any) -> Kernel:
    """Maximum and the number of the window's element that it is, then that element's place in the image.

    As in torch the first of equal elements counts, and a NaN beats all. Since a better element always has a higher
    number than the ones before it, the number is a running maximum too: no branches, which random data would mislead.
    """
    win = _geometry(x, *geometry)
    shape, dtype = outs[0].shape, np.dtype(x.dtype)
    elements = [(k, l) for k in range(win.kernel[0]) for l in range(win.kernel[1])]  # noqa: E741
    offsets = np.array([k * win.dilation[0] * win.image[1] + l * win.dilation[1] for k, l in elements])  # noqa: E741
    corners = [np.arange(win.output[axis]) * win.stride[axis] - win.padding[axis] for axis in range(2)]
    corner = corners[0][:, None] * win.image[1] + corners[1][None, :]
    # The window's first row and column inside the image: what counts if all of it is -inf.
    inside = [(np.maximum(-corners[axis], 0) + win.dilation[axis] - 1) // win.dilation[axis] for axis in range(2)]
    first = (inside[0][:, None] * win.kernel[1] + inside[1][None, :]).astype(np.int16)

    def kernel(a: Any) -> tuple[Any, Any]:
        source = padded(a, win, -np.inf)
        best = np.full(shape, -np.inf, dtype)
        number = np.empty(shape, np.int16)
        number[...] = first
        better, ranked = np.empty(shape, np.bool_), np.empty(shape, np.int16)
        for rank, (k, l) in enumerate(elements):  # noqa: E741
            candidate = source[(..., *win.at(k, l))]
            np.greater(candidate, best, out=better)
            np.maximum(candidate, best, out=best)
            np.maximum(number, np.multiply(better, np.int16(rank), out=ranked), out=number)
        lost = np.isnan(best)
        if lost.any():
            for rank, (k, l) in enumerate(elements):  # noqa: E741
                np.copyto(number, np.int16(rank), where=np.isnan(source[(..., *win.at(k, l))]))
        where = offsets.take(number)
        where += corner
        return best, where

    return kernel


def _max_scratch(outs: Outs, x: TensorSpec, *geometry: Any) -> int:
    return _padded_bytes(x, _geometry(x, *geometry)) + (2 + 2 + 1 + 1 + 8) * outs[0].numel


def _infer_max_backward(grad: TensorSpec, x: TensorSpec, *rest: Any) -> Outs:
    *geometry, indices = rest
    win = _geometry(x, *geometry)
    need(grad == _pooled(x, win, x.dtype), "the gradient is not of the output's shape")
    need(indices == _pooled(x, win, "int64"), "the indices are not of the output's shape")
    return (x,)


def _max_backward_kernel(_outs: Outs, _grad: TensorSpec, x: TensorSpec, *_: Any) -> Kernel:
    area = x.shape[-2] * x.shape[-1]
    planes = x.numel // area
    base = np.arange(planes)[:, None] * area
    shape = x.shape

    def kernel(grad: Any, _a: Any, indices: Any) -> Any:
        check_indices(indices, area, "max_pool2d_with_indices_backward")
        out = np.zeros(planes * area, grad.dtype)
        if planes:
            flat = indices.reshape(planes, -1) + base
            np.add.at(out, flat.reshape(-1), grad.reshape(-1))
        return out.reshape(shape)

    return kernel


_MAX = "ints kernel_size, ints stride, ints padding, ints dilation, bool ceil_mode"
register(
    f"max_pool2d_with_indices(Tensor self, {_MAX})",
    infer=_infer_max,
    kernel=_max_kernel,
    held=lambda _outs, x, *geometry: _tables_bytes(_geometry(x, *geometry)),
    flops=lambda outs, x, *geometry: 3 * outs[0].numel * _elements(_geometry(x, *geometry)),
    scratch=_max_scratch,
)
register(
    f"max_pool2d_with_indices_backward(Tensor grad_output, Tensor self, {_MAX}, Tensor indices)",
    infer=_infer_max_backward,
    kernel=_max_backward_kernel,
    held=lambda _outs, _grad, x, *_: 8 * x.numel // max(1, x.shape[-2] * x.shape[-1]),
    flops=lambda outs, *_: 2 * outs[0].numel,
    scratch=lambda _outs, grad, *_: 3 * 8 * grad.numel,
)


# --- average -----------------------------------------------------------------------------------------------------


def _average(x: TensorSpec, *geometry: Any) -> Window:
    kernel, stride, padding, ceil_mode, _include_pad, divisor = geometry
    need(divisor is None or 0 < abs(divisor) < 1 << 31, "divisor_override is not 0")
    return _geometry(x, kernel, stride, padding, (1,), ceil_mode)


def _divisors(x: TensorSpec, *geometry: Any) -> Any:
    """What each window's sum is divided by: [P, Q], or a scalar if all are the same."""
    win = _average(x, *geometry)
    include_pad, divisor = geometry[-2:]
    if divisor is not None:
        return np.dtype(x.dtype).type(divisor)
    counts = []
    for axis in range(2):
        size, pad = win.image[axis], win.padding[axis]
        start = np.arange(win.output[axis]) * win.stride[axis] - pad
        # The part of a window beyond the right padding (ceil_mode) never counts.
        end = np.minimum(start + win.kernel[axis], size + pad)
        if not include_pad:
            start, end = np.maximum(start, 0), np.minimum(end, size)
        counts.append(end - start)
    table = (counts[0][:, None] * counts[1][None, :]).astype(x.dtype)
    return table.flat[0] if table.size and (table == table.flat[0]).all() else table


def _infer_average(x: TensorSpec, *geometry: Any) -> Outs:
    return (_pooled(x, _average(x, *geometry), x.dtype),)


def _average_kernel(outs: Outs, x: TensorSpec, *geometry: Any) -> Kernel:
    win, divisors = _average(x, *geometry), _divisors(x, *geometry)
    places = [win.at(k, l) for k in range(win.kernel[0]) for l in range(win.kernel[1])]  # noqa: E741
    shape, dtype = outs[0].shape, np.dtype(x.dtype)

    def kernel(a: Any) -> Any:
        source = padded(a, win, 0.0)
        out = np.zeros(shape, dtype)
        for place in places:
            out += source[(..., *place)]
        out /= divisors
        return out

    return kernel


def _infer_average_backward(grad: TensorSpec, x: TensorSpec, *geometry: Any) -> Outs:
    need(grad == _pooled(x, _average(x, *geometry), x.dtype), "the gradient is not of the output's shape")
    return (x,)


def _average_backward_kernel(_outs: Outs, _grad: TensorSpec, x: TensorSpec, *geometry: Any) -> Kernel:
    win, divisors = _average(x, *geometry), _divisors(x, *geometry)
    places = [win.at(k, l) for k in range(win.kernel[0]) for l in range(win.kernel[1])]  # noqa: E741
    (h, w), (top, left) = win.image, win.padding
    shape, dtype = (*x.shape[:-2], *win.reach), np.dtype(x.dtype)

    def kernel(grad: Any, _a: Any) -> Any:
        share = np.divide(grad, divisors)
        out = np.zeros(shape, dtype)
        for place in places:
            out[(..., *place)] += share
        return out if win.reach == win.image else np.ascontiguousarray(out[..., top : top + h, left : left + w])

    return kernel


_AVERAGE = "ints kernel_size, ints stride, ints padding, bool ceil_mode, bool count_include_pad, int? divisor_override"
register(
    f"avg_pool2d(Tensor self, {_AVERAGE})",
    infer=_infer_average,
    kernel=_average_kernel,
    held=lambda _outs, x, *geometry: _tables_bytes(_average(x, *geometry)),
    flops=lambda outs, x, *geometry: outs[0].numel * (1 + _elements(_average(x, *geometry))),
    scratch=lambda _outs, x, *geometry: _padded_bytes(x, _average(x, *geometry)),
)
register(
    f"avg_pool2d_backward(Tensor grad_output, Tensor self, {_AVERAGE})",
    infer=_infer_average_backward,
    kernel=_average_backward_kernel,
    held=lambda _outs, _grad, x, *geometry: _tables_bytes(_average(x, *geometry)),
    flops=lambda _outs, grad, x, *geometry: grad.numel * (1 + _elements(_average(x, *geometry))),
    scratch=lambda _outs, grad, x, *geometry: grad.nbytes + _padded_bytes(x, _average(x, *geometry)),
)


# --- adaptive average --------------------------------------------------------------------------------------------


def _bins(size: int, count: int) -> Any:
    """Averaging matrix [count, size]: bin i is the mean of floor(i·size/count) .. ceil((i+1)·size/count)."""
    matrix = np.zeros((count, size))
    for i in range(count):
        start, end = i * size // count, -(-(i + 1) * size // count)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def _infer_adaptive(x: TensorSpec, size: tuple[int, ...]) -> Outs:
    need_float(x)
    need(x.rank in (3, 4) and 0 not in x.shape[-3:], "takes [N, C, H, W] or [C, H, W], at least 1 each")
    need(len(size) == 2 and all(0 < count <= 1 << 12 for count in size), "output_size is a pair, 1 to 4096 each")
    need(max(x.shape[-2:]) <= 1 << 12, "an image has at most 4096 rows and columns")
    return (TensorSpec(x.dtype, (*x.shape[:-2], *size)),)


def _infer_adaptive_backward(grad: TensorSpec, x: TensorSpec) -> Outs:
    need(grad.rank == x.rank, "gradient and input differ in rank")
    need((grad,) == _infer_adaptive(x, grad.shape[-2:]), "the gradient is not of the output's shape")
    return (x,)


def _adaptive_kernel(_outs: Outs, x: TensorSpec, size: tuple[int, ...]) -> Kernel:
    """rows · x · columnsᵀ."""
    rows, columns = (_bins(x.shape[-2 + axis], size[axis]).astype(x.dtype) for axis in range(2))
    return lambda a: np.matmul(np.matmul(rows, a), columns.T)


def _adaptive_backward_kernel(_outs: Outs, grad: TensorSpec, x: TensorSpec) -> Kernel:
    rows, columns = (_bins(x.shape[-2 + axis], grad.shape[-2 + axis]).astype(x.dtype) for axis in range(2))
    return lambda g, _a: np.matmul(np.matmul(rows.T, g), columns)


def _adaptive_flops(outs: Outs, x: TensorSpec, *_: Any) -> int:
    return 2 * (x.numel + outs[0].numel) * (x.shape[-1] + outs[0].shape[-1] + x.shape[-2] + outs[0].shape[-2])


def _adaptive_held(outs: Outs, *args: Any) -> int:
    """The two averaging matrices, and the float64 ones that they are made from."""
    x: TensorSpec = args[-1] if isinstance(args[-1], TensorSpec) else args[0]
    other = args[0] if x is args[-1] else outs[0]
    return 24 * (x.shape[-2] * other.shape[-2] + x.shape[-1] * other.shape[-1])


def _adaptive_scratch(outs: Outs, x: TensorSpec, *_: Any) -> int:
    """The product of two of the three factors: [new rows, old columns]; operands made contiguous."""
    planes = x.numel // (x.shape[-2] * x.shape[-1])
    return x.nbytes + 2 * outs[0].nbytes + 8 * planes * outs[0].shape[-2] * x.shape[-1]


register("adaptive_avg_pool2d(Tensor self, ints output_size)", infer=_infer_adaptive, kernel=_adaptive_kernel,
         flops=_adaptive_flops, held=_adaptive_held, scratch=_adaptive_scratch)  # fmt: skip
register("adaptive_avg_pool2d_backward(Tensor grad_output, Tensor self)", infer=_infer_adaptive_backward,
         kernel=_adaptive_backward_kernel, flops=_adaptive_flops, held=_adaptive_held,
         scratch=_adaptive_scratch)  # fmt: skip
