"""`Array`: a tensor as it travels, without NumPy.

The idle agent does not import NumPy (about 13 MB of its 45 MB budget), so a message holds dtype, shape and the raw
little-endian bytes in C order. `sordino_common.plan.arrays` turns it into an ndarray without a copy and back.
"""

from __future__ import annotations

from typing import Final, NoReturn

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

    __slots__ = ("data", "dtype", "shape")

    dtype: str
    shape: tuple[int, ...]
    data: bytes

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
        _PUT_DTYPE(self, dtype)
        _PUT_SHAPE(self, shape)
        _PUT_DATA(self, data)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"Array: {name} can't be set: it is immutable")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"Array: {name} can't be deleted: it is immutable")

    def __reduce__(self) -> tuple[type[Array], tuple[str, tuple[int, ...], bytes]]:  # copied by way of its checks
        return Array, (self.dtype, self.shape, self.data)

    @classmethod
    def from_wire(cls, dtype: str, shape: tuple[int, ...], data: bytes) -> Array:
        """As the constructor, but for bytes from a peer: raises `CodecError`."""
        try:
            return cls(dtype, shape, data)
        except LocalError as error:
            raise CodecError(str(error)) from None

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        return (self.dtype, self.shape, self.data) == (other.dtype, other.shape, other.data)

    def __hash__(self) -> int:
        return hash((self.dtype, self.shape, self.data))

    def __repr__(self) -> str:
        return f"Array({self.dtype}{list(self.shape)})"


# The slots' own setters: reading a slot costs no call, unlike a property, and nobody else sets one.
_PUT_DTYPE: Final = Array.__dict__["dtype"].__set__
_PUT_SHAPE: Final = Array.__dict__["shape"].__set__
_PUT_DATA: Final = Array.__dict__["data"].__set__
