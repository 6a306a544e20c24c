"""A circuit as canonical bytes: two agents that lowered the same Plan compare digests."""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np

from sordino_common.errors import LocalError
from sordino_common.messages.codec import encode
from sordino_common.plan.arrays import from_numpy
from sordino_common.spdz.circuit import Cat, Circuit, Gate, Linear, Node, Sum, View, Wire

FORMAT: Final = "sordino-circuit"
VERSION: Final = 1


def encode_circuit(circuit: Circuit) -> bytes:
    """["sordino-circuit", 1, plan id, inputs, nodes, outputs, tables, constants] in canonical CBOR."""
    return encode(
        [
            FORMAT,
            VERSION,
            circuit.plan_id,
            [[entry.name, entry.role, _wire(entry.wire), entry.shift, entry.bound_bits] for entry in circuit.inputs],
            [_node(node) for node in circuit.nodes],
            [[entry.name, entry.role, entry.wire] for entry in circuit.outputs],
            [from_numpy(np.array(table, np.int64)) for table in circuit.tables],
            [[shape, from_numpy(np.array(values, np.int64))] for shape, values in circuit.constants],
        ]
    )


def circuit_digest(circuit: Circuit) -> bytes:
    """SHA-256 of the encoding."""
    return hashlib.sha256(encode_circuit(circuit)).digest()


def _wire(wire: Wire) -> list[object]:
    return [wire.shape, wire.fraction_bits, wire.magnitude, wire.room]


def _node(node: Node) -> list[object]:
    match node:
        case View():
            return ["view", node.op, node.operand, node.args, _wire(node.wire)]
        case Linear():
            return ["linear", node.terms, node.constant, node.table, _wire(node.wire)]
        case Sum():
            return ["sum", node.operand, node.dims, node.keepdim, _wire(node.wire)]
        case Cat():
            return ["cat", node.operands, node.dim, _wire(node.wire)]
        case Gate():
            products = [[p.kind, p.a, p.b, p.coefficient, p.reduce] for p in node.products]
            terms = [[term.operand, term.coefficient] for term in node.terms]
            rest = [node.addend, node.shift, node.bound_bits, node.round, node.node, _wire(node.wire)]
            return ["gate", products, terms, *rest]
    raise LocalError(f"a circuit has no {type(node).__name__}")
