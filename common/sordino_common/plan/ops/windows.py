"""Windows over images: output sizes, padding, and views of all windows, shared by convolution and pooling.

Letters: N images, C channels, H W rows and columns, K L the kernel's, P Q the output's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sordino_common.plan.ops.rules import need

MAX_WINDOW: Final = 4096  # elements of a kernel; kernels are walked in a Python loop


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Geometry of a 2-d window op. `output` is [P, Q]; `reach` the padded image's size that all windows need."""

    image: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    output: tuple[int, int]

    @property
    def reach(self) -> tuple[int, int]:
        return (
            max(self.image[0] + 2 * self.padding[0], self._end(0)),
            max(self.image[1] + 2 * self.padding[1], self._end(1)),
        )

    def _end(self, axis: int) -> int:
        if self.output[axis] == 0:
            return 0
        return (self.output[axis] - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis] + 1

    def at(self, k: int, l: int) -> tuple[slice, slice]:  # noqa: E741  the letters of the legend
        """Where in the padded image element (k, l) of every window lies."""
        (p, q), (s, t) = self.output, self.stride
        top, left = k * self.dilation[0], l * self.dilation[1]
        return slice(top, top + s * (p - 1) + 1, s), slice(left, left + t * (q - 1) + 1, t)


def pair(values: tuple[int, ...], what: str, least: int) -> tuple[int, int]:
    """A list of one or two integers as a pair. The upper bound keeps all arithmetic on them small."""
    need(1 <= len(values) <= 2, f"{what} has one or two entries")
    need(all(least <= value <= 1 << 20 for value in values), f"{what} is at least {least}, got {list(values)}")
    return values[0], values[-1]


def window(
    image: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    *,
    ceil_mode: bool = False,
) -> Window:
    """The geometry; `PlanError` where torch would refuse: a kernel larger than the padded image."""
    need(kernel[0] * kernel[1] <= MAX_WINDOW, f"a kernel has at most {MAX_WINDOW} elements, got {list(kernel)}")
    output = []
    for axis in range(2):
        room = image[axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1
        need(room >= 0, f"kernel {list(kernel)} with dilation {list(dilation)} is larger than the padded image")
        count = (room + (stride[axis] - 1 if ceil_mode else 0)) // stride[axis] + 1
        if ceil_mode and (count - 1) * stride[axis] >= image[axis] + padding[axis]:
            count -= 1  # a window must start inside the image or its left padding
        output.append(count)
    return Window(
        image=image,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        output=(output[0], output[1]),
    )


def padded(x: Any, win: Window, fill: float) -> Any:
    """x as [..., H', W'], padded with `fill` to the windows' reach; x itself, C-contiguous, if nothing is missing."""
    if win.reach == win.image:
        return np.ascontiguousarray(x)
    (h, w), (top, left) = win.image, win.padding
    out = (
        np.full((*x.shape[:-2], *win.reach), fill, x.dtype) if fill else np.zeros((*x.shape[:-2], *win.reach), x.dtype)
    )
    out[..., top : top + h, left : left + w] = x
    return out


def all_windows(x: Any, win: Window) -> Any:
    """View of a padded, C-contiguous x [N, C, H', W'] as [N, C, K, L, P, Q]. np.ndarray checks the bounds."""
    n, c, h, w = x.strides
    (s, t), (d, e) = win.stride, win.dilation
    shape = (*x.shape[:2], *win.kernel, *win.output)
    return np.ndarray(shape, x.dtype, buffer=x, strides=(n, c, h * d, w * e, h * s, w * t))
