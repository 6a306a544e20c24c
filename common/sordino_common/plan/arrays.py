"""Between `messages.Array` (bytes) and `numpy.ndarray`."""

from __future__ import annotations

import sys
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError
from sordino_common.messages.array import DTYPES, Array

NdArray = npt.NDArray[Any]

_LITTLE: Final = {name: np.dtype(name).newbyteorder("<") for name in DTYPES}
_NAMES: Final = {np.dtype(name): name for name in DTYPES}


def to_numpy(array: Array) -> NdArray:
    """The array's data as an ndarray: no copy on a little-endian machine, and read-only."""
    values = np.frombuffer(array.data, dtype=_LITTLE[array.dtype]).reshape(array.shape)
    if sys.byteorder == "big":
        values = values.astype(array.dtype)
        values.setflags(write=False)
    return values


def from_numpy(values: NdArray) -> Array:
    """`values` as it travels: C order, little-endian. bool travels as uint8. Raises `LocalError` on other dtypes."""
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    name = _NAMES.get(values.dtype) or values.dtype.name  # by its name if it is of the other byte order
    if name not in DTYPES:
        raise LocalError(f"from_numpy: dtype {name} is not one of bool, {', '.join(DTYPES)}")
    data = values.astype(_LITTLE[name], order="C", copy=False).tobytes()
    return Array(name, values.shape, data)
