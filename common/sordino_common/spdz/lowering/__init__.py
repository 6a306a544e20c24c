"""Lowering: Plan -> circuit.

lower.py        lower: the way through the other modules
settings.py     Settings, Ranges; Lowered, GateNote; LoweringError
walk.py         Plan -> sketch, op by op           rules/: a rule per op, a family a module
lazy.py         Σ c (wire | pending product) + constant
sketch.py       structure with real coefficients
magnitudes.py   how large values get
scales.py       fraction bits, scales, integers for coefficients
emit.py         sketch -> circuit: bounds, mask room, rounds
codec.py        canonical bytes and digest of a circuit
"""

from sordino_common.spdz.lowering.codec import circuit_digest, encode_circuit
from sordino_common.spdz.lowering.lower import lower
from sordino_common.spdz.lowering.settings import GateNote, Lowered, LoweringError, Ranges, Settings

__all__ = [
    "GateNote",
    "Lowered",
    "LoweringError",
    "Ranges",
    "Settings",
    "circuit_digest",
    "encode_circuit",
    "lower",
]
