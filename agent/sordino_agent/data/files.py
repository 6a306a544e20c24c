"""CSV, NPZ and NPY files into columns. Every error names file, line and column; none shows a cell's contents."""

from __future__ import annotations

import csv
import io
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sordino_agent.data.table import Table, table_of
from sordino_agent.datasets import DatasetSpec
from sordino_agent.errors import DatasetError

Columns = dict[str, NDArray[Any]]


def load_table(spec: DatasetSpec, *, max_bytes: int) -> Table:
    """The dataset that `spec` describes. Raises `DatasetError`; also if the files are larger than `max_bytes`."""
    columns = _load_columns(spec, Path(spec.path), max_bytes)
    test = _load_columns(spec, Path(spec.test_path), max_bytes) if spec.test_path is not None else None
    return table_of(
        spec.name,
        columns,
        tags=spec.tags,
        test_fraction=spec.test_fraction,
        split_seed=spec.split_seed,
        test_rows=spec.test_rows,
        test_columns=test,
    )


def _load_columns(spec: DatasetSpec, path: Path, max_bytes: int) -> Columns:
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise DatasetError(
                f"{path}: {size} bytes; limits.memory_bytes allows {max_bytes}. Raise the limit or split the file.",
                dataset=spec.name,
            )
        if spec.file_format == "csv":
            return _read_csv(path, spec)
        return _read_npz(path, spec, max_bytes) if spec.file_format == "npz" else _read_npy(path, spec)
    except OSError as error:
        raise DatasetError(f"{path}: can't be read: {error.strerror or error}", dataset=spec.name) from None


def _read_csv(path: Path, spec: DatasetSpec) -> Columns:
    """Header row, then one float64 per cell. Blank lines are skipped; `nan` and `inf` are refused like text."""

    def fail(line: int, text: str) -> DatasetError:
        return DatasetError(f"{path}:{line}: {text}", dataset=spec.name)

    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [cell.strip() for cell in next(reader, [])]
            if not header or not all(header):
                raise fail(1, "a header row with a name for every column is expected")
            if len(set(header)) != len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise fail(1, f"the column {twice!r} is there twice")
            for name in spec.offered or ():
                if name not in header:
                    raise fail(1, f"no column {name!r}; the file has {', '.join(header)}")
            names = list(spec.offered or header)
            places = [header.index(name) for name in names]
            cells = [array("d") for _ in places]
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise fail(reader.line_num, f"{len(row)} cells, the header has {len(header)}")
                for place, column in zip(places, cells, strict=True):
                    try:
                        number = float(row[place])
                    except ValueError:
                        number = float("nan")
                    if number - number != 0.0:  # NaN or infinite
                        what = "is empty" if not row[place].strip() else "is not a finite number"
                        text = f"column {place + 1} ({header[place]}): the cell {what}"
                        raise fail(reader.line_num, f"{text}; mend the row, or leave the column out of `columns`")
                    column.append(number)
        except csv.Error as error:
            raise fail(reader.line_num, f"not valid CSV: {error}") from None
        except UnicodeDecodeError:
            raise fail(reader.line_num + 1, "not UTF-8") from None
    return {name: np.frombuffer(column, dtype=np.float64) for name, column in zip(names, cells, strict=True)}


def _read_npz(path: Path, spec: DatasetSpec, max_bytes: int) -> Columns:
    import zipfile  # here, for it brings compressors that a worker without such a file should not hold

    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > max_bytes:  # compressed zeros can be a thousand times larger than the file
            raise DatasetError(
                f"{path}: {unpacked} bytes when unpacked; limits.memory_bytes allows {max_bytes}", dataset=spec.name
            )
        with np.load(path, allow_pickle=False) as archive:
            there = list(archive.files)
            missing = [name for name in spec.offered or () if name not in there]
            if missing:
                raise DatasetError(f"{path}: no array {missing[0]!r}; it has {', '.join(there)}", dataset=spec.name)
            columns = {name: archive[name] for name in spec.offered or there}
    except (ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
        raise DatasetError(f"{path}: not a readable NPZ file without pickles: {error}", dataset=spec.name) from None
    return {name: _checked(path, spec, name, column) for name, column in columns.items()}


def _read_npy(path: Path, spec: DatasetSpec) -> Columns:
    try:
        values = np.lib.format.read_array(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DatasetError(f"{path}: not a readable NPY file without pickles: {error}", dataset=spec.name) from None
    names = spec.offered
    if names is None:
        raise DatasetError(f"{path}: an NPY file has no column names; give `columns`", dataset=spec.name)
    if len(names) == 1:
        return {names[0]: _checked(path, spec, names[0], values)}
    if values.ndim != 2 or values.shape[1] != len(names):
        raise DatasetError(
            f"{path}: shape {list(values.shape)}; with {len(names)} columns [rows, {len(names)}] is expected",
            dataset=spec.name,
        )
    return {name: _checked(path, spec, name, values[:, index]) for index, name in enumerate(names)}


def _checked(path: Path, spec: DatasetSpec, name: str, column: NDArray[Any]) -> NDArray[Any]:
    """Little-endian, C order, finite; the row of the first value that is not finite is named."""
    if column.dtype.kind not in "iufb" or column.ndim == 0:
        raise DatasetError(
            f"{path}: array {name!r} is {column.dtype}{list(column.shape)}; numbers with rows first are expected",
            dataset=spec.name,
        )
    if column.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(column.reshape(len(column), -1)).all(axis=1))
        if len(bad):
            raise DatasetError(f"{path}: array {name!r}, row {int(bad[0])}: NaN or infinite", dataset=spec.name)
    return np.ascontiguousarray(column, dtype=column.dtype.newbyteorder("<"))
