"""Average pooling: a local sum over gathered windows; 1/count flows on as a coefficient."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sordino_common.plan.ops import pooling
from sordino_common.plan.ops.windows import Window, all_windows, padded, pair, window
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import Node
from sordino_common.spdz.lowering.lazy import Lazy, scaled, stepped, summed
from sordino_common.spdz.lowering.rules.base import Value, Walk, lifted, rule
from sordino_common.spdz.lowering.rules.elementwise import multiplied
from sordino_common.spdz.lowering.rules.shaping import placed


def _window(shape: tuple[int, ...], geometry: tuple[Any, ...]) -> Window:
    kernel, stride, padding, ceil_mode, _, _ = geometry
    size = pair(kernel, "kernel_size", 1)
    steps = pair(stride, "stride", 1) if stride else size
    return window((shape[-2], shape[-1]), size, steps, pair(padding, "padding", 0), (1, 1), ceil_mode=ceil_mode)


def _tiles(win: Window) -> bool:
    """Windows that tile the image: no gather is needed."""
    return (
        win.kernel == win.stride
        and win.padding == (0, 0)
        and win.reach == win.image
        and all(count * size == image for count, size, image in zip(win.output, win.kernel, win.image, strict=True))
    )


def _divided(walk: Walk, value: Lazy, x: TensorSpec, geometry: tuple[Any, ...]) -> Lazy:
    """value / (entries in each window)."""
    divisors = np.asarray(pooling._divisors(TensorSpec("float64", x.shape), *geometry), np.float64)
    if divisors.ndim == 0:
        return scaled(value, 1.0 / float(divisors))
    return multiplied(walk, value, lifted(walk, 1.0 / divisors, value.shape))


def _average(walk: Walk, x: Lazy, win: Window) -> Lazy:
    """The sum over each window, [..., P, Q]."""
    lead = x.shape[:-2]
    rank = len(lead)
    if _tiles(win):
        shape = (*lead, win.output[0], win.kernel[0], win.output[1], win.kernel[1])
        return summed(walk.sketch, stepped(walk.sketch, x, "view", shape), (rank + 1, rank + 3))
    planes = int(np.prod(lead))
    count = planes * win.image[0] * win.image[1]
    numbered = np.arange(1, count + 1, dtype=np.int64).reshape(planes, 1, *win.image)
    spread = all_windows(padded(numbered, win, 0), win)  # [planes, 1, K, L, P, Q]
    index = np.where(spread == 0, count, spread - 1).reshape(*lead, *win.kernel, *win.output)
    return summed(walk.sketch, placed(walk, x, index), (rank, rank + 1))


def _spread(walk: Walk, grad: Lazy, win: Window) -> Lazy:
    """Each pixel's sum over the windows that it is in, [..., H, W]."""
    lead = grad.shape[:-2]
    rank = len(lead)
    rows, columns = (_windows_of(win, axis) for axis in range(2))  # [K, H], [L, W]
    planes = int(np.prod(lead))
    count = planes * win.output[0] * win.output[1]
    plane = np.arange(planes).reshape(-1, 1, 1, 1, 1)
    p, q = rows[None, :, None, :, None], columns[None, None, :, None, :]
    index = np.where((p < 0) | (q < 0), count, (plane * win.output[0] + p) * win.output[1] + q)
    if _tiles(win):  # every pixel is in one window: no sum
        index = index.min(axis=(1, 2)).reshape(*lead, *win.image)
        return placed(walk, grad, index)
    shape = (*lead, rows.shape[0], columns.shape[0], *win.image)
    return summed(walk.sketch, placed(walk, grad, index.reshape(shape)), (rank, rank + 1))


def _windows_of(win: Window, axis: int) -> npt.NDArray[np.int64]:
    """[kernel, image]: the window in which a pixel is that element, or -1."""
    k = np.arange(win.kernel[axis]).reshape(-1, 1)
    offset = np.arange(win.image[axis]).reshape(1, -1) + win.padding[axis] - k
    place = offset // win.stride[axis]
    inside = (offset % win.stride[axis] == 0) & (place >= 0) & (place < win.output[axis])
    return np.where(inside, place, -1)


@rule("avg_pool2d")
def _pool(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    x, *geometry = args
    win = _window(x.shape, tuple(geometry))
    return [_divided(walk, _average(walk, x, win), TensorSpec(node.outs[0].dtype, x.shape), tuple(geometry))]


@rule("avg_pool2d_backward")
def _pool_backward(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    grad, _x, *geometry = args
    spec = node.outs[0]
    win = _window(spec.shape, tuple(geometry))
    value = grad if isinstance(grad, Lazy) else lifted(walk, grad, np.shape(grad))
    return [_spread(walk, _divided(walk, value, spec, tuple(geometry)), win)]


def _equal_windows(walk: Walk, image: tuple[int, ...], output: tuple[int, ...]) -> Window:
    if any(size % count for size, count in zip(image, output, strict=True)):
        walk.refuse(
            f"adaptive pooling of {list(image)} to {list(output)} has windows of different sizes; use AvgPool2d"
        )
    kernel = (image[0] // output[0], image[1] // output[1])
    return window((image[0], image[1]), kernel, kernel, (0, 0), (1, 1))


@rule("adaptive_avg_pool2d")
def _adaptive(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    x = args[0]
    win = _equal_windows(walk, x.shape[-2:], node.outs[0].shape[-2:])
    return [scaled(_average(walk, x, win), 1.0 / (win.kernel[0] * win.kernel[1]))]


@rule("adaptive_avg_pool2d_backward")
def _adaptive_backward(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    grad = args[0]
    win = _equal_windows(walk, node.outs[0].shape[-2:], grad.shape[-2:])
    return [scaled(_spread(walk, grad, win), 1.0 / (win.kernel[0] * win.kernel[1]))]
