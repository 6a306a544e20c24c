"""`sordino plan show JOB`: what a job will cost and how safely it computes, before anything runs.

On secret shares: gates by kind, rounds, bytes opened and dealt, the largest bound with the model's line behind it, how
often a step must be run again, memory, the activations' fit. Federated: nodes, peak memory and operations of each Plan.
Nothing here needs a fleet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from torch import nn

from sordino_common.plan.analysis import analyse
from sordino_common.plan.plan import decode_plan, plan_id
from sordino_common.spdz.circuit import Circuit, Gate
from sordino_common.spdz.layout import layout_of
from sordino_common.spdz.lowering import GateNote
from sordino_common.spdz.party import PREPARED_BYTES
from sordino_server.job import Job
from sordino_server.model import Traced, make_model, trace_job
from sordino_server.model_private import trace_private
from sordino_server.model_spdz import SharedModel, SharedProgram, trace_spdz
from sordino_server.progress import number, size
from sordino_server.rounds.spdz import steps_ahead
from sordino_server.trace.activations import Fit

_BYTES: Final = 8  # of a ring element; a tag has twice as many


def describe(job: Job, *, gates: bool = False) -> dict[str, Any]:
    """The report as plain values, for `--json` and `render`. `gates`: every gate, not only sums."""
    model = make_model(job)
    if not job.spec.on_shares:
        traced, programs = _in_the_clear(job, model)
        return {
            "job": job.spec.job,
            "mode": job.spec.mode,
            "security": "plain",
            "parameters": traced.parameters,
            "plans": {name: _clear(data) for name, data in programs.items()},
        }
    shared = trace_spdz(job, model)
    return {
        "job": job.spec.job,
        "mode": job.spec.mode,
        "security": job.spec.shares.security,
        "compute_agents": job.spec.shares.committee,
        "parameters": shared.parameters,
        "activations": [_fit(fit) for fit in (shared.fits.sigmoid, shared.fits.tanh) if fit.name in shared.activations],
        "plans": {
            **{name: _on_shares(job, program, gates=gates) for name, program in _programs(shared)},
            "evaluate": _clear(shared.evaluate.data),
        },
    }


def plans_of(job: Job, model: nn.Module) -> tuple[int, int, dict[str, tuple[str, int]]]:
    """(parameters, tensors, {Plan: (SHA-256, bytes)}): what a device's owner allows."""
    if not job.spec.on_shares:
        traced, plans = _in_the_clear(job, model)
        parameters, names = traced.parameters, traced.names
    else:
        shared = trace_spdz(job, model)
        plans = {name: program.plan for name, program in _programs(shared)} | {"evaluate": shared.evaluate.data}
        parameters, names = shared.parameters, shared.names
    return parameters, len(names), {name: (plan_id(data).hex(), len(data)) for name, data in plans.items()}


def _in_the_clear(job: Job, model: nn.Module) -> tuple[Traced, dict[str, bytes]]:
    """What was traced, and every Plan that devices run."""
    private = None if job.spec.privacy is None else trace_private(job, model)
    traced = trace_job(job, model) if private is None else private.traced
    plans = {"train": traced.programs.train.plan, "evaluate": traced.programs.evaluate.plan}
    if private is not None and private.apply is not None:
        plans["apply"] = private.apply.plan
    return traced, plans


def _programs(shared: SharedModel) -> Iterator[tuple[str, SharedProgram]]:
    for name, program in (("train", shared.train), ("score", shared.score), ("predict", shared.predict)):
        if program is not None:
            yield name, program


def _clear(data: bytes) -> dict[str, Any]:
    """A Plan that runs in the clear."""
    plan = decode_plan(data)
    cost = analyse(plan)
    return {
        "runs": "in the clear",
        "sha256": plan_id(data).hex(),
        "bytes": len(data),
        "nodes": len(plan.nodes),
        "peak_bytes": cost.peak_bytes,
        "operations": cost.flops,
    }


def _on_shares(job: Job, program: SharedProgram, *, gates: bool) -> dict[str, Any]:
    lowered, circuit = program.lowered, program.lowered.circuit
    shares = job.spec.shares
    active = shares.security == "active"
    notes = lowered.notes
    largest = max(notes, key=lambda note: (note.bound_bits, note.elements), default=None)
    coarsest = max(notes, key=lambda note: note.error, default=None)
    report: dict[str, Any] = {
        "runs": "on shares",
        "sha256": program.plan_id.hex(),
        "circuit": lowered.digest.hex(),
        "nodes": len(program.traced.plan.nodes),
        "rounds": len(circuit.rounds),
        "gates": kinds(circuit),
        "opened_elements": circuit.gate_elements,
        "opened_elements_by_round": list(circuit.opened_elements),
        "opened_bytes_per_step_per_party": _BYTES * circuit.gate_elements,
        "input_bytes_per_step": _BYTES * sum(e.wire.numel for e in circuit.inputs if e.role in ("x", "y")),
        "preprocessing_bytes_per_step": layout_of(circuit).preprocessing_bytes(active=active),
        "preprocessing_bytes_active": layout_of(circuit).preprocessing_bytes(active=True),
        "preprocessing_bytes_passive": layout_of(circuit).preprocessing_bytes(active=False),
        "steps_dealt_ahead": steps_ahead(shares, circuit, check_every=shares.check_every),
        "preprocessing": shares.preprocessing,
        "retry_chance_per_step": lowered.retry_chance,
        "memory_bytes": memory_bytes(circuit, active=active, steps=shares.check_every),
        "max_steps": lowered.max_steps,
        "largest_bound": None if largest is None else _gate(program, largest),
        "coarsest_coefficient": None if coarsest is None or not coarsest.error else _gate(program, coarsest),
    }
    if gates:
        report["all_gates"] = [_gate(program, note) for note in sorted(notes, key=lambda note: note.round)]
    return report


def _gate(program: SharedProgram, note: GateNote) -> dict[str, Any]:
    return {
        "round": note.round,
        "node": note.node,
        "op": note.op,
        "form": note.text,
        "elements": note.elements,
        "bound_bits": note.bound_bits,
        "shift": note.shift,
        "fraction_bits": program.lowered.circuit.wire(note.wire).fraction_bits,
        "magnitude": note.magnitude,
        "coefficient_error": note.error,
        "output": note.output,
        "line": program.line(note.node),
    }


def _fit(fit: Fit) -> dict[str, Any]:
    return {
        "name": fit.name,
        "formula": fit.formula,
        "interval": fit.interval,
        "largest_error": fit.largest_error,
        "rms_error": fit.rms_error,
    }


def kinds(circuit: Circuit) -> dict[str, int]:
    """Gates by the kind of their products; `linear`: a gate without one, for a coefficient or a fresh mask."""
    counts: dict[str, int] = {}
    for wire in circuit.gates:
        gate = circuit.node(wire)
        assert isinstance(gate, Gate)
        kind = "+".join(sorted({product.kind for product in gate.products})) or "linear"
        counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items()))


def memory_bytes(circuit: Circuit, *, active: bool, steps: int) -> int:
    """About what one compute agent holds: the values of a step and its shares, twice if the next step is prepared; with
    the MAC check also what waits for it, for `steps` steps: operands, openings, and two words for each tag."""
    layout = layout_of(circuit)
    values = sum(circuit.wire(number).numel for number in range(len(circuit.inputs) + len(circuit.nodes)))
    dealt = circuit.root_elements + circuit.gate_elements
    kept = (values + circuit.gate_elements + 2 * layout.tagging.tags) * steps if active else 0
    sets = 2 if _BYTES * dealt <= PREPARED_BYTES else 1
    return _BYTES * (sets * (values + dealt) + kept)


# --- for people ----------------------------------------------------------------------------------------------------


def render(report: Mapping[str, Any], console: Console, *, base: Path | None = None) -> None:
    """Tables of what `describe` found. `base`: lines of the model are shown relative to it."""
    shares = report["mode"] == "spdz"
    committee = f", {report['compute_agents']} compute agents" if shares else ""
    console.print(f"[bold]{report['job']}[/]  mode {report['mode']}, security {report['security']}{committee}, "
                  f"{report['parameters']} parameters", highlight=False)  # fmt: skip
    if report["security"] == "passive":
        console.print("[bold red]security: passive[/] - a cheating compute agent goes unnoticed", highlight=False)
    for name, plan in report["plans"].items():
        console.print()
        console.print(f"[bold]{name}[/]  {plan['runs']}  Plan {plan['sha256'][:16]}", highlight=False)
        console.print(_summary(_shared_rows(plan, base) if plan["runs"] == "on shares" else _clear_rows(plan)))
        if "all_gates" in plan:
            console.print(_gates(plan["all_gates"], base))
    for fit in report.get("activations", ()):
        console.print()
        console.print(f"[bold]{fit['name']}[/] on [-{fit['interval']:g}, {fit['interval']:g}]: {fit['formula']}",
                      highlight=False)  # fmt: skip
        console.print(
            f"  error at most {fit['largest_error']:.3g}, in the mean {fit['rms_error']:.3g}", highlight=False
        )


def _summary(rows: list[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(f"  {key}", value)
    return table


def _clear_rows(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("nodes", str(plan["nodes"])),
        ("peak memory", size(plan["peak_bytes"])),
        ("operations", f"{plan['operations']:,}"),
        ("on the wire", size(plan["bytes"])),
    ]


def _shared_rows(plan: Mapping[str, Any], base: Path | None) -> list[tuple[str, str]]:
    gates = ", ".join(f"{count} {kind}" for kind, count in plan["gates"].items())
    opened = f"{plan['opened_elements']:,} elements, {_kept(plan, 'opened_bytes_per_step_per_party')}"
    dealt, bare = _kept(plan, "preprocessing_bytes_active"), _kept(plan, "preprocessing_bytes_passive")
    chance = plan["retry_chance_per_step"]
    rows = [
        ("circuit", plan["circuit"][:16]),
        ("rounds per step", str(plan["rounds"])),
        ("gates", gates),
        ("opened per step and party", opened),
        ("masked inputs per step", _kept(plan, "input_bytes_per_step")),
        ("preprocessing per step", f"{dealt} with tags, {bare} without"),
        ("preprocessing ahead", _ahead(plan)),
        ("retry", f"one step in {1 / chance:,.0f}" if chance else "never"),
        ("memory of a compute agent", f"about {_kept(plan, 'memory_bytes')}"),
        ("steps that fit", f"{plan['max_steps']:,}"),
    ]
    largest, coarsest = plan["largest_bound"], plan["coarsest_coefficient"]
    if largest is not None:
        reach = f"2^{largest['bound_bits']}: |value| <= {number(largest['magnitude'])}"
        rows.append(("largest bound", f"{reach} at {_place(largest, base)}"))
    if coarsest is not None:
        rows.append(("coarsest coefficient", f"{coarsest['coefficient_error']:.2%} off at {_place(coarsest, base)}"))
    return rows


def _ahead(plan: Mapping[str, Any]) -> str:
    """What may be dealt before it is needed, and when it is."""
    steps = plan["steps_dealt_ahead"]
    when = "before the first step" if plan["preprocessing"] == "first" else "beside the steps"
    return f"{steps} steps, {size(steps * plan['preprocessing_bytes_per_step'])}, {when}"


def _kept(plan: Mapping[str, Any], key: str) -> str:
    return size(plan[key])


def _place(gate: Mapping[str, Any], base: Path | None) -> str:
    line = _line(gate, base)
    return f"node {gate['node']} ({gate['op']})" + (f", {line}" if line else "")


def _line(gate: Mapping[str, Any], base: Path | None) -> str:
    """What the gate is for: an output by name, else the model's line."""
    if gate["output"]:
        return str(gate["output"])
    line = str(gate["line"])
    return line if base is None else line.removeprefix(f"{base}/")


def _gates(gates: list[Mapping[str, Any]], base: Path | None) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("round", "node", "form", "elements", "bound", "bits", "|value|", "off", "for"):
        table.add_column(column, overflow="fold", justify="left" if column in ("form", "for") else "right")
    for gate in gates:
        table.add_row(
            str(gate["round"]),
            str(gate["node"]),
            gate["form"],
            f"{gate['elements']:,}",
            f"2^{gate['bound_bits']}",
            str(gate["fraction_bits"]),
            number(gate["magnitude"]),
            f"{gate['coefficient_error']:.2%}",
            _line(gate, base),
        )
    return table
