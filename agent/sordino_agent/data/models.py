"""Models that this device may provide to a session on shares: files of parameters, and their first masked state.

A model is a .npz file without pickles, one array per parameter. What the Plan asks for is compared name by name before
anything is masked: tensor, dtype, shape, range.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sordino_agent.errors import ModelFileError, ModelMismatch, UnknownModel
from sordino_agent.models import ModelFile
from sordino_common.plan.spec import TensorSpec
from sordino_common.ring.fixed import encode_fixed
from sordino_common.spdz.errors import OutOfRange
from sordino_common.spdz.lowering.settings import Settings
from sordino_common.spdz.spec import SessionSpec

I64 = npt.NDArray[np.int64]
Tensors = Mapping[str, npt.NDArray[Any]]


class Models(Protocol):
    """Where a worker finds the models that may be asked for."""

    def tensors(self, name: str) -> Tensors:
        """Raises `UnknownModel` for a name that is not there, `ModelFileError` if its file can't be used."""
        ...


class MemoryModels:
    """Files that are already there: name -> bytes of an .npz file."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files

    def tensors(self, name: str) -> Tensors:
        data = _look_up(self._files, name)
        return read_model(io.BytesIO(data), name=name, where=f"model {name}", max_bytes=len(data) + (64 << 20))


class FileModels:
    """Files on disk, read when they are asked for: a session takes them once."""

    def __init__(self, specs: Sequence[ModelFile], *, max_bytes: int) -> None:
        self._paths = {spec.name: Path(spec.path) for spec in specs}
        self._max_bytes = max_bytes

    def tensors(self, name: str) -> Tensors:
        path = _look_up(self._paths, name)
        try:
            with path.open("rb") as file:
                return read_model(file, name=name, where=str(path), max_bytes=self._max_bytes)
        except OSError as error:
            raise ModelFileError(f"{path}: can't be read: {error.strerror or error}", model=name) from None


def read_model(file: Any, *, name: str, where: str, max_bytes: int) -> Tensors:
    """Parameter name -> array. `file`: binary, seekable. Raises `ModelFileError`, also for what unpacks to more."""
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > max_bytes:  # compressed zeros can be a thousand times larger than the file
            raise ModelFileError(
                f"{where}: {unpacked} bytes when unpacked; limits.memory_bytes allows {max_bytes}", model=name
            )
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, zipfile.BadZipFile, EOFError, KeyError, NotImplementedError) as error:
        raise ModelFileError(f"{where}: not a readable NPZ file without pickles: {error}", model=name) from None


def first_state(
    name: str, tensors: Tensors, *, wanted: Mapping[str, TensorSpec], spec: SessionSpec, settings: Settings
) -> dict[str, I64]:
    """The session's first state, fixed point: the model's parameters, zeros for the optimizer's state.

    `wanted`: dtype and shape of the Plan's parameters by name; `settings`: their ranges. Raises `ModelMismatch` naming
    the first tensor that is missing, too many, or another than the Plan's; `OutOfRange` for one beyond the range that
    the job states. No value is shown."""
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise ModelMismatch(
            f"model {name!r} has no tensor {missing[0]!r}, which the Plan takes; it has {_some(tensors)}"
        )
    more = [key for key in tensors if key not in wanted]
    if more:
        raise ModelMismatch(f"model {name!r} has a tensor {more[0][:80]!r}, the Plan takes {_some(wanted)} only")
    state: dict[str, I64] = {}
    for entry in spec.state_inputs:
        if entry.role != "param":
            state[entry.name] = np.zeros(entry.wire.shape, dtype=np.int64)
            continue
        value, expected = tensors[entry.name], wanted[entry.name]
        if value.dtype != np.dtype(expected.dtype) or value.shape != expected.shape:
            raise ModelMismatch(
                f"model {name!r}, tensor {entry.name!r}: expected {expected.dtype}{list(expected.shape)}, found "
                f"{value.dtype}{list(value.shape)}"
            )
        if not bool(np.isfinite(value).all()):
            raise OutOfRange(f"model {name!r}, tensor {entry.name!r}: NaN or infinite")
        stated = settings.of_input("param", entry.name)
        if value.size and float(np.abs(value).max()) > stated:
            raise OutOfRange(
                f"model {name!r}, tensor {entry.name!r}: a value is beyond the {stated:g} that the job "
                "states (spdz.ranges.params); raise the range"
            )
        state[entry.name] = encode_fixed(value.astype(np.float64), entry.wire.fraction_bits)
    return state


def _some(names: Mapping[str, Any], most: int = 20) -> str:
    listed = [name[:80] for name in list(names)[:most]]
    return (", ".join(listed) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")


def _look_up(things: Mapping[str, Any], name: str) -> Any:
    try:
        return things[name]
    except KeyError:
        raise UnknownModel(f"no model {name!r} here; there are: {', '.join(things) or 'none'}") from None
