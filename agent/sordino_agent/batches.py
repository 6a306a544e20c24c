"""Rows into what a Plan is fed: scaled features and targets, and the stream of batches.

Legend: R rows of the split, B rows of a batch, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sordino_agent.data.table import Rows, Split, Table
from sordino_agent.errors import BadCommand
from sordino_agent.pcg64 import Pcg64
from sordino_common.messages import DataRef, encode
from sordino_common.plan.spec import TensorSpec


def row_stream(rows: int, *, batch_rows: int, seed: int, round: int, name: str) -> Iterator[Rows]:
    """Batches of B row numbers in [0, rows), for ever: shuffled passes end to end, cut into pieces of B.

    Pass after pass is a permutation from one generator, seeded by SHA-256 of canonical CBOR of
    ["sordino/rows", seed, round, name]: the same arguments give the same stream on every device, and two devices
    never shuffle alike. An epoch's leftover rows begin the next batch; with rows < B one batch spans passes.
    The permutation is the order of 64-bit draws of PCG64 (those of NumPy's bit generator, which NEP 19 keeps, unlike
    `Generator.permutation`); ties, of chance rows²/2^65, keep their order."""
    if rows < 1 or batch_rows < 1:
        raise BadCommand(f"row stream: {rows} rows in batches of {batch_rows}; both must be at least 1")
    digest = hashlib.sha256(encode(["sordino/rows", seed, round, name])).digest()
    source = Pcg64(int.from_bytes(digest, "big"))
    left = np.empty(0, dtype=np.int64)
    while True:
        parts, have = [left], len(left)
        while have < batch_rows:
            fresh = np.argsort(source.random_raw(rows), kind="stable")
            parts.append(fresh)
            have += rows
        pool = parts[0] if len(parts) == 1 else np.concatenate(parts)
        for start in range(0, have - batch_rows + 1, batch_rows):
            yield pool[start : start + batch_rows]
        left = pool[have - have % batch_rows :]


def step_count(*, steps: int, epochs: float, rows: int, batch_rows: int) -> int:
    """Local steps of a `Train`: `steps`, or if that is 0, max(1, round(epochs * rows / batch_rows))."""
    return steps or max(1, round(epochs * rows / batch_rows))


def joined_columns(table: Table, split: Split, names: Sequence[str]) -> NDArray[Any]:
    """Columns of the split: one as it is [R, ...], several joined along the last axis [R, D]. Raises `BadCommand`."""
    rows = table.rows(split)
    columns = [table.column(name) for name in names]
    if len(columns) == 1:
        return columns[0][rows]
    if all(column.ndim <= 2 for column in columns):
        return np.concatenate([column[rows].reshape(len(rows), -1) for column in columns], axis=1)
    raise BadCommand(f"dataset {table.name!r}: features of more than one dimension can't be joined; name one of them")


def feature_rows(table: Table, data: DataRef, spec: TensorSpec, *, strict: bool = True) -> NDArray[Any]:
    """x [R, *spec.shape[1:]] of the split, scaled as (x - offset) / scale in float64, then in the Plan's dtype.

    Raises `BadCommand` for what does not fit; with `strict` also for rows whose values do not. A command that is paid
    for by a privacy budget must not be strict: the server chooses the scaling, and a refusal because one row's value
    overflows would tell of that row without noise. Its values become infinite, or whatever the cast makes of them."""
    rows = table.rows(data.split)
    columns = [table.column(name) for name in data.features]
    raw = joined_columns(table, data.split, data.features)
    width = int(np.prod(raw.shape[1:], dtype=np.int64))
    return _fit(
        raw.reshape(len(rows), width),
        _vector(_spread(data.offset, columns, width), width, "offset"),
        _vector(_spread(data.scale, columns, width), width, "scale"),
        spec,
        f"dataset {table.name!r}: features {', '.join(data.features[:8])}{' ...' if len(data.features) > 8 else ''}",
        strict=strict,
    )


def target_rows(table: Table, data: DataRef, spec: TensorSpec, *, strict: bool = True) -> NDArray[Any]:
    """y [R, *spec.shape[1:]] of the split, scaled as (y - target_offset) / target_scale, in the Plan's dtype.
    `strict` as in `feature_rows`."""
    rows = table.rows(data.split)
    raw = table.column(data.target)[rows]
    if raw.ndim == 1 and len(spec.shape) == 2 and spec.shape[1] > 1:
        return _one_hot(raw, spec, f"dataset {table.name!r}: target {data.target}", strict=strict)
    scaled = data.target_offset != 0.0 or data.target_scale != 1.0
    return _fit(
        raw.reshape(len(rows), int(np.prod(raw.shape[1:], dtype=np.int64))),
        _vector((data.target_offset,), 1, "target_offset") if scaled else None,
        _vector((data.target_scale,), 1, "target_scale") if scaled else None,
        spec,
        f"dataset {table.name!r}: target {data.target}",
        strict=strict,
    )


def _one_hot(raw: NDArray[Any], spec: TensorSpec, what: str, *, strict: bool) -> NDArray[Any]:
    """Class numbers [R] as [R, C] of zeros and ones, where the Plan takes C numbers a row."""
    classes = spec.shape[1]
    with np.errstate(all="ignore"):
        numbers = raw.astype(np.int64)
    fits = np.array_equal(numbers, raw) and (not len(raw) or 0 <= numbers.min() <= numbers.max() < classes)
    if strict and not fits:
        raise BadCommand(f"{what}: expected class numbers from 0 to {classes - 1}")
    return np.ascontiguousarray(numbers[:, None] == np.arange(classes), dtype=spec.dtype)


def _spread(values: tuple[float, ...], columns: list[Any], width: int) -> tuple[float, ...]:
    """One entry stands for all elements of the one tensor-valued column: an image has 784, a command should not."""
    return values * width if len(values) == 1 and len(columns) == 1 else values


def _vector(values: tuple[float, ...], width: int, what: str) -> NDArray[np.float64] | None:
    if not values:
        return None
    if len(values) != width:
        raise BadCommand(f"data: {what} has {len(values)} entries, expected one per feature: {width}")
    vector = np.asarray(values, dtype=np.float64)
    if not np.isfinite(vector).all() or ("scale" in what and not vector.all()):
        raise BadCommand(f"data: {what} has an entry that is zero, NaN or infinite")
    return vector


def _fit(
    raw: NDArray[Any],
    offset: NDArray[np.float64] | None,
    scale: NDArray[np.float64] | None,
    spec: TensorSpec,
    what: str,
    *,
    strict: bool,
) -> NDArray[Any]:
    """`raw` [R, D] scaled, cast to the spec's dtype and shaped as its entries; `strict` refuses what would lose
    integers or is too large."""
    shape = tuple(spec.shape[1:])
    if int(np.prod(shape, dtype=np.int64)) != raw.shape[1] or not spec.shape:
        raise BadCommand(f"{what}: {raw.shape[1]} numbers a row, but the Plan takes {spec.dtype}{list(spec.shape)}")
    values = raw
    dtype = np.dtype(spec.dtype)
    with np.errstate(all="ignore"):  # what overflows is looked for below
        if offset is not None:
            values = values.astype(np.float64) - offset
        if scale is not None:
            values = values.astype(np.float64) / scale
        cast = np.ascontiguousarray(values, dtype=dtype)
    if strict and dtype.kind not in "f" and not np.array_equal(cast, values):
        raise BadCommand(f"{what}: not all are {spec.dtype}, which the Plan takes")
    if strict and dtype.kind == "f" and not np.isfinite(cast).all():
        raise BadCommand(f"{what}: some are too large for {spec.dtype} once they are scaled")
    return cast.reshape(len(raw), *shape)
