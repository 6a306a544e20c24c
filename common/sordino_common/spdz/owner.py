"""What an owner of values does: mask them for the committee.

The owner expands r from a seed that it shares with the dealer, opens D = (x << t) + r to every member, and that is all:
m = D >> t, λ = r >> t, and x = m - λ exactly, since the lower t bits of x << t are zero. r is uniform and used once, so
D says nothing about x. Who gets D learns nothing; the dealer, who knows r, must never see D.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError
from sordino_common.ring.prg import Seed, expand_ring
from sordino_common.spdz.arithmetic import at_edge
from sordino_common.spdz.circuit import CircuitInput
from sordino_common.spdz.errors import OutOfRange, StateAtEdge
from sordino_common.spdz.spec import SessionSpec, stream

I64 = npt.NDArray[np.int64]


def row_mask(spec: SessionSpec, seed: Seed, entry: CircuitInput, step: int, attempt: int, rows: int) -> I64:
    """r for an owner's `rows` rows of input `entry`, [rows, ...]. The dealer computes the same."""
    info = stream(spec, "input", step, attempt, entry.role, entry.name)
    return expand_ring(seed, info, (rows, *entry.wire.shape[1:]))


def state_mask(spec: SessionSpec, seed: Seed, entry: CircuitInput) -> I64:
    """r for a state input of the first step, in the input's shape."""
    return expand_ring(seed, stream(spec, "state", 0, 0, entry.role, entry.name), entry.wire.shape)


def given_mask(spec: SessionSpec, seed: Seed, entry: CircuitInput, step: int) -> I64:
    """r for an input that is given to one step of a stepwise session, in the input's shape."""
    return expand_ring(seed, stream(spec, "given", step, 0, entry.role, entry.name), entry.wire.shape)


def mask(x: I64, r: I64, entry: CircuitInput) -> I64:
    """D = (x << t) + r mod 2^64. Raises `OutOfRange` if |x << t| is not below the bound that the circuit counts on."""
    if x.dtype != np.int64 or x.shape != r.shape:
        raise LocalError(f"mask {entry.name}: expected int64{list(r.shape)}, got {x.dtype}{list(x.shape)}")
    limit = 1 << (entry.bound_bits - entry.shift)
    if x.size and (np.maximum.reduce(x, axis=None) >= limit or np.minimum.reduce(x, axis=None) <= -limit):
        stated = f"{entry.wire.magnitude:g} that the job states for {entry.role} (spdz.ranges)"
        raise OutOfRange(
            f"input {entry.name}: a value is not within the {stated}; raise the range, or scale or clip the data"
        )
    masked: I64 = np.asarray(np.add(np.left_shift(x, np.int64(entry.shift)), r))
    return masked


class InputOwner:
    """One owner of rows in one session."""

    def __init__(self, spec: SessionSpec, name: str, seed: Seed) -> None:
        self._spec = spec
        self.name = name
        self._seed = seed

    def masked(self, step: int, attempt: int, values: Mapping[str, I64]) -> dict[str, I64]:
        """Input name -> D for this owner's rows of the step's batch, in the order of its `Slice`.

        `values`: fixed point, [rows, ...] for every row input.
        Call it once per (step, attempt): one mask for one value."""
        expected = {entry.name for entry in self._spec.row_inputs}
        if set(values) != expected:
            raise LocalError(f"owner {self.name}: expected inputs {sorted(expected)}, got {sorted(values)}")
        result = {}
        for entry in self._spec.row_inputs:
            x = values[entry.name]
            result[entry.name] = mask(x, row_mask(self._spec, self._seed, entry, step, attempt, x.shape[0]), entry)
        return result


def mask_state(spec: SessionSpec, seed: Seed, values: Mapping[str, I64]) -> dict[str, I64]:
    """State input name -> D, for the first step's parameters and optimizer state. Raises `StateAtEdge` if some D is
    where it may have wrapped: a chance of 2^(bound_bits - 63) an element."""
    expected = {entry.name for entry in spec.state_inputs}
    if set(values) != expected:
        raise LocalError(f"state: expected {sorted(expected)}, got {sorted(values)}")
    masked = {entry.name: mask(values[entry.name], state_mask(spec, seed, entry), entry) for entry in spec.state_inputs}
    for entry in spec.state_inputs:
        if at_edge(masked[entry.name], entry.bound_bits):
            raise StateAtEdge(f"the mask of {entry.name} came near the edge of the ring; a new session draws another")
    return masked


def mask_given(spec: SessionSpec, seed: Seed, step: int, values: Mapping[str, I64]) -> dict[str, I64]:
    """Input name -> D of what one giver puts into a step. Call it once per step: one mask for one value.

    Raises `OutOfRange`, and `StateAtEdge` as `mask_state` does."""
    entries = {entry.name: entry for entry in spec.state_inputs}
    unknown = sorted(set(values) - entries.keys())
    if unknown:
        raise LocalError(f"given: the circuit has no input {unknown[0]!r}")
    masked = {}
    for name, value in values.items():
        masked[name] = mask(value, given_mask(spec, seed, entries[name], step), entries[name])
        if at_edge(masked[name], entries[name].bound_bits):
            raise StateAtEdge(f"the mask of {name} came near the edge of the ring; a new session draws another")
    return masked
