"""How far what a committee computes may be from the reals: derived for each step from its circuit, not chosen.

`Analysis` looks on while steps run and follows every kept value by its id: integers as they come out where every gate
rounds down, and a bound that holds whichever way the gates of the run itself have rounded
(`sordino_common.spdz.reference.error_bounds`):

    what is shared        half a unit of 2^-f, by rounding to fixed point
    a gate                one unit in the last place of its result for the truncation, whatever its masks are; the
                          relative error of its coefficients (`GateNote.error`: a coefficient of the program is a
                          whole number times a power of two in the circuit) times the size of what they multiply; and
                          |α| d + e |β| + e d for operands that are off by e and d
    sums and views        what the operands bring
    opening               nothing

A step's outputs are the next step's inputs, with the bounds that they came with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sordino_common.spdz.reference import error_bounds, trace
from sordino_server.tensors.shared.committee import Committee, Run
from sordino_server.tensors.shared.session import StepDone

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass
class Analysis:
    """`opened`: of what was opened last, the bound on its distance from the reals, element by element."""

    opened: Floats = field(default_factory=lambda: np.zeros(()))
    kept: dict[bytes, tuple[Ints, Floats]] = field(default_factory=dict)

    def step(self, run: Run, done: StepDone) -> None:
        lowered = run.program.lowered
        values: dict[tuple[str, str], Ints] = {}
        bounds: dict[tuple[str, str], Floats] = {}
        for entry in lowered.circuit.inputs:
            key = (entry.name, entry.role)
            if entry.name in run.kept:
                values[key], bounds[key] = self.kept[run.kept[entry.name]]
                continue
            integers = run.given[entry.name].integers
            assert integers is not None, "of what an agent shares nothing is known here"
            values[key] = integers
            bounds[key] = np.full(integers.shape, 2.0 ** -(entry.wire.fraction_bits + 1))
        found = trace(lowered.circuit, values)
        off = error_bounds(lowered, found, bounds)
        for output in lowered.circuit.outputs:
            result = (found[output.wire], off[output.wire])
            if output.name in run.keep:
                self.kept[run.keep[output.name]] = result
            if output.name in run.opened:
                self.opened = result[1]
                # Opened and traced are two runs of one circuit: each is so near to the reals.
                apart = (
                    np.abs(done.opened[output.name] - result[0])
                    * 2.0 ** -lowered.circuit.wire(output.wire).fraction_bits
                )
                assert (apart <= 2 * result[1]).all()


@contextmanager
def analysed() -> Iterator[Analysis]:
    """Look on at all committees."""
    analysis = Analysis()
    run_step: Any = Committee._run

    def run(committee: Committee, run: Run) -> StepDone:
        done: StepDone = run_step(committee, run)
        analysis.step(run, done)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Committee, "_run", run)
        yield analysis
