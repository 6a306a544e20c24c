"""Convolutions as matrix products over unfolded images.

The columns of an image are a gather of it (padding is the zero entry), so whatever is unfolded, shares of its mask are
dealt once, for the image. The weights' gradient is a product with the very same columns; the input's gradient is a
convolution of the output's gradient: each pixel gathers the outputs whose windows it is in, with the weights that it
had there. So nothing is opened but the results. Letters as in `plan.ops.convolution`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sordino_common.plan.ops.windows import Window, all_windows, padded, pair, window
from sordino_common.plan.values import Node
from sordino_common.spdz.lowering.lazy import Lazy, added, stepped, summed
from sordino_common.spdz.lowering.rules.base import Value, Walk, lifted, rule
from sordino_common.spdz.lowering.rules.matmul import matrices
from sordino_common.spdz.lowering.rules.shaping import placed

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Sizes:
    win: Window
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


def _sizes(x_shape: tuple[int, ...], w_shape: tuple[int, ...], geometry: tuple[Any, ...]) -> _Sizes:
    stride, padding, dilation, _, _, groups = geometry
    s, p, d = pair(stride, "stride", 1), pair(padding, "padding", 0), pair(dilation, "dilation", 1)
    if len(x_shape) == 4:
        win = window((x_shape[2], x_shape[3]), (w_shape[2], w_shape[3]), s, p, d)
    else:
        win = window((1, x_shape[2]), (1, w_shape[2]), (1, s[1]), (0, p[1]), (1, d[1]))
    return _Sizes(win=win, n=x_shape[0], g=groups, i=w_shape[1], o=w_shape[0] // groups)


def _column_index(sizes: _Sizes) -> Index:
    """Positions in x of the columns [G, M, N·P·Q]; x's element count for the padding."""
    win = sizes.win
    channels = sizes.g * sizes.i
    count = sizes.n * channels * win.image[0] * win.image[1]
    numbered = np.arange(1, count + 1, dtype=np.int64).reshape(sizes.n, channels, *win.image)
    columns = all_windows(padded(numbered, win, 0), win)  # [N, G·I, K, L, P, Q]
    columns = columns.reshape(sizes.n, sizes.g, sizes.m, sizes.pq).transpose(1, 2, 0, 3)
    flat = columns.reshape(sizes.g, sizes.m, sizes.n * sizes.pq)
    return np.where(flat == 0, count, flat - 1)


def _back_index(sizes: _Sizes) -> Index:
    """Positions in y [N, G·O, P, Q] of what each pixel gathers: [G, O·K·L, N·H·W]; y's element count for nothing."""
    win = sizes.win
    rows, columns = (_sources(win, axis) for axis in range(2))  # [K, H] and [L, W], -1 for nothing
    count = sizes.n * sizes.g * sizes.o * sizes.pq
    n = np.arange(sizes.n).reshape(1, 1, 1, 1, -1, 1, 1)
    g = np.arange(sizes.g).reshape(-1, 1, 1, 1, 1, 1, 1)
    o = np.arange(sizes.o).reshape(1, -1, 1, 1, 1, 1, 1)
    p = rows.reshape(1, 1, rows.shape[0], 1, 1, rows.shape[1], 1)
    q = columns.reshape(1, 1, 1, columns.shape[0], 1, 1, columns.shape[1])
    flat = (((n * sizes.g + g) * sizes.o + o) * win.output[0] + p) * win.output[1] + q
    index = np.where((p < 0) | (q < 0), count, flat)
    return index.reshape(sizes.g, sizes.o * win.kernel[0] * win.kernel[1], -1)


def _sources(win: Window, axis: int) -> Index:
    """[kernel, image]: the window in which a pixel is under that element of the kernel, or -1."""
    k = np.arange(win.kernel[axis]).reshape(-1, 1)
    h = np.arange(win.image[axis]).reshape(1, -1)
    offset = h + win.padding[axis] - k * win.dilation[axis]
    place = offset // win.stride[axis]
    inside = (offset % win.stride[axis] == 0) & (place >= 0) & (place < win.output[axis])
    return np.where(inside, place, -1)


def _multiplied(walk: Walk, left: Lazy, right: Lazy) -> Lazy:
    """[G, A, B]·[G, B, C]; a plain matrix product if there is one group."""
    if left.shape[0] != 1:
        return matrices(walk, "bmm", left, right)
    flat = [stepped(walk.sketch, part, "view", part.shape[1:]) for part in (left, right)]
    return matrices(walk, "mm", flat[0], flat[1])


def _reshaped(walk: Walk, value: Lazy, shape: tuple[int, ...], dims: tuple[int, ...], final: tuple[int, ...]) -> Lazy:
    value = stepped(walk.sketch, value, "view", shape)
    return stepped(walk.sketch, stepped(walk.sketch, value, "permute", dims), "view", final)


def _as_lazy(walk: Walk, value: Any) -> Lazy:
    return value if isinstance(value, Lazy) else lifted(walk, value, np.shape(value))


@rule("convolution")
def _convolution(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    x, weight, bias, *geometry = args
    x, weight = _as_lazy(walk, x), _as_lazy(walk, weight)
    sizes = _sizes(x.shape, weight.shape, tuple(geometry))
    columns = placed(walk, x, _column_index(sizes))
    matrix = stepped(walk.sketch, weight, "view", (sizes.g, sizes.o, sizes.m))
    final = node.outs[0].shape
    product = _reshaped(
        walk, _multiplied(walk, matrix, columns), (sizes.g, sizes.o, sizes.n, sizes.pq), (2, 0, 1, 3), final
    )
    if bias is None:
        return [product]
    shape = (1, sizes.g * sizes.o, *([1] * (len(final) - 2)))
    spread = stepped(walk.sketch, _as_lazy(walk, bias), "view", shape)
    return [added([product, lifted(walk, spread, final)])]


@rule("convolution_backward")
def _backward(walk: Walk, node: Node, args: tuple[Any, ...]) -> list[Value]:
    grad, x, weight, _bias, *geometry, mask = args
    grad, x, weight = _as_lazy(walk, grad), _as_lazy(walk, x), _as_lazy(walk, weight)
    sizes = _sizes(x.shape, weight.shape, tuple(geometry))
    win = sizes.win
    y = stepped(walk.sketch, grad, "view", (sizes.n, sizes.g, sizes.o, sizes.pq))
    results: list[Value] = []
    if mask[0]:
        index = _back_index(sizes)
        flat = placed(walk, grad, index)
        kernel = stepped(walk.sketch, weight, "view", (sizes.g, sizes.o, sizes.i, *win.kernel))
        kernel = stepped(walk.sketch, kernel, "permute", (0, 2, 1, 3, 4))
        matrix = stepped(walk.sketch, kernel, "view", (sizes.g, sizes.i, index.shape[1]))
        product = _multiplied(walk, matrix, flat)
        pixels = win.image[0] * win.image[1]
        results.append(_reshaped(walk, product, (sizes.g, sizes.i, sizes.n, pixels), (2, 0, 1, 3), x.shape))
    if mask[1]:
        rows = stepped(walk.sketch, y, "permute", (1, 2, 0, 3))
        rows = stepped(walk.sketch, rows, "view", (sizes.g, sizes.o, sizes.n * sizes.pq))
        columns = placed(walk, x, _column_index(sizes))
        turned = stepped(walk.sketch, columns, "permute", (0, 2, 1))
        product = _multiplied(walk, rows, turned)
        results.append(stepped(walk.sketch, product, "view", weight.shape))
    if mask[2]:
        total = summed(walk.sketch, y, (0, 3))
        results.append(stepped(walk.sketch, total, "view", (sizes.g * sizes.o,)))
    return results
