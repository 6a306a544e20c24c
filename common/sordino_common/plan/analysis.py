"""What a Plan costs, known before it runs: liveness of every value, peak memory, operations.

Model of memory. Inputs and constants are there all the time (the caller holds the former). A node's results come into
being while its arguments are still alive, together with the op's own scratch memory. Tables that a program is prepared
with are there all the time too. After the node, every value that
no later node and no output uses is freed. A view (permute, expand, ...) keeps the storage of its base alive. Outputs
stay to the end; an output that might share storage with an input or with another output is copied for the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sordino_common.plan.ops import OPS, resolve
from sordino_common.plan.values import Plan, refs

# NumPy's own casting and reduction buffers (np.getbufsize() elements per operand, a few operands) and the array
# objects of the plan's values (about 200 bytes each); BLAS's packing buffers belong to the process, not to a Plan.
BUFFER_BYTES: Final = 256 * 1024
OBJECT_BYTES: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCost:
    """Upper bound on bytes alive at any time, number of arithmetic operations, and what they are made of.

    `last_use[v]` is the index of the last node that needs the storage of value v: len(nodes) if it is an output, and
    the node that makes it if nobody uses it (-1 for an unused input). `dead_after[i]` lists the node results whose
    storage nobody needs after node i. `copied[k]` says that output k is copied before it is handed out."""

    peak_bytes: int
    flops: int
    last_use: tuple[int, ...]
    dead_after: tuple[tuple[int, ...], ...]
    node_flops: tuple[int, ...]
    node_scratch: tuple[int, ...]
    copied: tuple[bool, ...]


def analyse(plan: Plan) -> PlanCost:
    """The cost of a Plan whose nodes' shapes are already known to be right."""
    specs = plan.specs()
    first = plan.first_node_value()
    end = len(plan.nodes)

    starts: list[int] = []  # number of each node's first result
    roots = list(range(len(specs)))  # the value whose storage a view may share
    made_by = [-1] * first
    value = first
    for index, node in enumerate(plan.nodes):
        starts.append(value)
        for _ in node.outs:
            if OPS[node.op].view:
                roots[value] = roots[next(iter(refs(node.args)))]
            made_by.append(index)
            value += 1

    last_use = list(made_by)
    for index, node in enumerate(plan.nodes):
        for used in refs(node.args):
            last_use[used] = index
    for entry in plan.outputs:
        last_use[entry.value] = end
    for number in range(len(specs) - 1, first - 1, -1):  # a view is needed as long as what is made of it
        base = roots[number]
        last_use[base] = max(last_use[base], last_use[number])

    dead_after: list[list[int]] = [[] for _ in plan.nodes]
    for number in range(first, len(specs)):
        if last_use[number] < end:
            dead_after[last_use[number]].append(number)

    flops, scratch = [], []
    held = sum(spec.nbytes for spec in specs[:first])
    held += sum(OPS[node.op].held(node.outs, *resolve(node.args, specs)) for node in plan.nodes)
    peak = held
    live = held
    own = [0] * len(specs)
    for index, node in enumerate(plan.nodes):
        op, args = OPS[node.op], resolve(node.args, specs)
        flops.append(op.flops(node.outs, *args))
        scratch.append(op.scratch(node.outs, *args))
        if not op.view or op.may_copy:
            for offset, out in enumerate(node.outs):
                own[starts[index] + offset] = out.nbytes
                live += out.nbytes
        peak = max(peak, live + scratch[-1])
        live -= sum(own[number] for number in dead_after[index])

    copied = _copied_outputs(plan, roots, first)
    peak = max(
        peak, live + sum(specs[entry.value].nbytes for entry, copy in zip(plan.outputs, copied, strict=True) if copy)
    )
    return PlanCost(
        peak_bytes=peak + BUFFER_BYTES + OBJECT_BYTES * len(specs),
        flops=sum(flops),
        last_use=tuple(last_use),
        dead_after=tuple(map(tuple, dead_after)),
        node_flops=tuple(flops),
        node_scratch=tuple(scratch),
        copied=tuple(copied),
    )


def _copied_outputs(plan: Plan, roots: list[int], first: int) -> list[bool]:
    taken: set[int] = set()
    copied = []
    for entry in plan.outputs:
        root = roots[entry.value]
        # A view is copied too: handing out a slice would keep the whole base alive, or be read-only (expand).
        copied.append(root < first or root != entry.value or root in taken)
        taken.add(root)
    return copied
