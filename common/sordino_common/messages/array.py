"""`Array`: a tensor as it travels, without NumPy.

The idle agent does not import NumPy (about 13 MB of its 45 MB budget), so a message holds dtype, shape and the raw
little-endian bytes in C order. `sordino_common.plan.arrays` turns it into an ndarray without a copy and back.
"""

from __future__ import annotations

from typing import Final

from sordino_common.errors import CodecError, LocalError

# dtype name -> (bytes per element, RFC 8746 tag of a little-endian typed array). bool has no typed array in
# RFC 8746; it travels as uint8 with values 0 and 1 under tag 64 and is not in this table on purpose.
DTYPES: Final[dict[str, tuple[int, int]]] = {
    "uint8": (1, 64),
    "int32": (4, 78),
    "int64": (8, 79),
    "uint32": (4, 70),
    "uint64": (8, 71),
    "float32": (4, 85),
    "float64": (8, 86),
}
DTYPE_OF_TAG: Final[dict[int, str]] = {tag: name for name, (_, tag) in DTYPES.items()}
MAX_RANK: Final = 8  # as in Plans; nothing in the op table needs more


class Array:
    """A dense tensor: `dtype` (a key of `DTYPES`), `shape`, and `data` in C order, little-endian. Immutable.

    The repr shows dtype and shape only: what an array holds may be somebody's data.
    """

    __slots__ = ("_data", "_dtype", "_shape")

    def __init__(self, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
        if dtype not in DTYPES:
            raise LocalError(f"Array: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        expected, fits = DTYPES[dtype][0], len(shape) <= MAX_RANK
        for dim in shape[:MAX_RANK]:
            expected *= dim
            fits = fits and dim >= 0
        if not fits:
            raise LocalError(f"Array: shape {shape} has a negative dimension or more than {MAX_RANK} dimensions")
        if len(data) != expected:
            raise LocalError(f"Array: {dtype}{list(shape)} needs {expected} bytes, got {len(data)}")
        self._dtype, self._shape, self._data = dtype, shape, data

    @classmethod
    def from_wire(cls, dtype: str, shape: tuple[int, ...], data: bytes) -> Array:
        """As the constructor, but for bytes from a peer: raises `CodecError`."""
        try:
            return cls(dtype, shape, data)
        except LocalError as error:
            raise CodecError(str(error)) from None

    @property
    def dtype(self) -> str:
        return self._dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def data(self) -> bytes:
        return self._data

    @property
    def nbytes(self) -> int:
        return len(self._data)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        return (self._dtype, self._shape, self._data) == (other._dtype, other._shape, other._data)

    def __hash__(self) -> int:
        return hash((self._dtype, self._shape, self._data))

    def __repr__(self) -> str:
        return f"Array({self._dtype}{list(self._shape)})"
