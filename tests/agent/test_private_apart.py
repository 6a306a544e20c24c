"""One row moves a sum by its own clipped gradient and by nothing else, to the last integer, whatever the library."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from helpers_agent import OPEN_POLICY, bench, small_table
from helpers_private import APPLY_PLAN, GRADIENT_PLAN, linear_gradient_plan, private_command
from sordino_agent.data.catalogue import MemoryCatalogue
from sordino_agent.errors import BadCommand
from sordino_agent.executor import InlineExecutor
from sordino_agent.private_apart import require_apart
from sordino_agent.private_step import gradient_layout
from sordino_agent.private_sum import RowSum, batches_of
from sordino_agent.workshop import LoadedPlan, Programs, Workshop, plan_limits
from sordino_common import messages as m
from sordino_common.clock import VirtualLoop
from sordino_common.plan.executors import Program, load_program
from sordino_common.plan.plan import plan_id
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import Plan

EXAMPLES = Path(__file__).parents[2] / "examples"
Spoil = Callable[[list[NDArray[Any]]], None]


@dataclass
class Spoiled:
    """A program whose outputs are tampered with as a library would: by place."""

    program: Program
    spoil: Spoil

    @property
    def plan(self) -> Plan:
        return self.program.plan

    @property
    def cost(self) -> object:
        return self.program.cost

    def run(self, inputs: Sequence[NDArray[Any]], **more: Any) -> list[NDArray[Any]]:
        outs = [np.array(out) for out in self.program.run(inputs, **more)]
        self.spoil(outs)
        return outs


def last_digit(outs: list[NDArray[Any]], place: int) -> None:
    outs[0][place] = np.nextafter(outs[0][place], np.float32(np.inf))


def by_place(outs: list[NDArray[Any]]) -> None:
    """Every other row has other last digits: what OpenBLAS does."""
    for place in range(1, len(outs[0]), 2):
        last_digit(outs, place)


def by_company(outs: list[NDArray[Any]]) -> None:
    """The last row feels what the first one holds."""
    if zlib.crc32(outs[0][0].tobytes()) % 2:
        last_digit(outs, -1)


def test_what_goes_by_place_alone_is_taken() -> None:
    plan = linear_gradient_plan()
    program = load_program(plan)
    require_apart(program, gradient_layout(plan))
    require_apart(Spoiled(program, by_place), gradient_layout(plan))  # type: ignore[arg-type]


def test_one_last_digit_that_depends_on_another_row_is_seen() -> None:
    plan = linear_gradient_plan()
    with pytest.raises(BadCommand, match=r"differs in its last digits by what the other rows .* executor: numpy"):
        require_apart(Spoiled(load_program(plan), by_company), gradient_layout(plan))  # type: ignore[arg-type]


def test_a_device_that_can_t_give_it_refuses_before_anything_is_drawn_or_charged() -> None:
    loop, programs = VirtualLoop(), Programs(executor="numpy", limits=plan_limits(64 << 20))
    workshop = Workshop(catalogue=MemoryCatalogue([small_table()]), programs=programs, memory_bytes=64 << 20)
    made = bench(
        loop=loop, policy=OPEN_POLICY, executor=InlineExecutor(loop, workshop=workshop, seconds_of=lambda cost: 1.0)
    )
    for plan in (GRADIENT_PLAN, APPLY_PLAN):
        made.ask(m.PlanPut(plan=plan))
    loaded = programs.load(GRADIENT_PLAN)
    spoiled = LoadedPlan(
        plan=loaded.plan,
        encoded_bytes=loaded.encoded_bytes,
        facts=loaded.facts,
        program=Spoiled(loaded.program, by_company),  # type: ignore[arg-type]
    )
    programs._cache.put(plan_id(GRADIENT_PLAN), spoiled)
    refused = made.ask(private_command())
    assert isinstance(refused, m.Refused) and refused.code == "command"
    assert "no bound holds exactly" in refused.reason
    assert list(made.core._ledger.entries()) == []
    programs._cache.put(plan_id(GRADIENT_PLAN), loaded)
    assert isinstance(made.ask(private_command()), m.Trained)


MODELS = {"boston-dp": 64, "boston-fedavg": 33, "mnist-dp": 128}


@pytest.mark.parametrize(("name", "batch"), [*MODELS.items()])
def test_one_row_moves_a_sum_by_itself_and_by_nothing_else(name: str, batch: int) -> None:
    """The example's own Plan, NumPy's own BLAS: f(S) - f(S without b) is f({b}), integer by integer, wherever b stands
    and whoever is in its batches then."""
    plan = traced(name, batch)
    layout, program = gradient_layout(plan), load_program(plan)
    require_apart(program, layout)
    draw = np.random.default_rng(3)
    count = batch + 9
    params = [draw.normal(0, 0.3, plan.inputs[at].spec.shape).astype(np.float32) for at in layout.params]
    x = draw.normal(size=(count, *plan.inputs[layout.x].spec.shape[1:])).astype(np.float32)
    y_spec = plan.inputs[layout.y].spec
    y = draw.integers(0, 2, size=(count, *y_spec.shape[1:])).astype(y_spec.dtype)
    total = RowSum(layout.gradients, clip_norm=0.5, grid_bits=16, most_rows=count)

    everybody = np.arange(count)

    def fine(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Before the shift to the grid: what is added up."""
        feeds: list[NDArray[Any]] = [np.empty(0)] * len(plan.inputs)
        for at, value in zip(layout.params, params, strict=True):
            feeds[at] = value
        total.clear()
        for part, counted in batches_of(rows, batch, count):
            feeds[layout.x], feeds[layout.y] = x[part], y[part]
            with np.errstate(all="ignore"):
                total.add(program.run(feeds, own=False), counted)
        total._settle()
        return total._total.copy()

    whole = fine(everybody)
    for row in (0, 1, batch // 2, batch - 1, batch, count - 1):
        without = fine(np.delete(everybody, row))
        np.testing.assert_array_equal(whole - without, fine(np.array([row])))


def traced(name: str, batch: int) -> Plan:
    from sordino_server.job import load_job
    from sordino_server.model import make_model
    from sordino_server.trace.row_gradients import gradient_plan

    job = load_job(EXAMPLES / f"{name}.yaml")
    spec = job.spec
    x = TensorSpec(dtype="float32", shape=spec.data.x_shape)
    y = TensorSpec(dtype="int64" if spec.loss == "cross_entropy" else "float32", shape=())
    return gradient_plan(make_model(job), loss=spec.loss, x=x, y=y, batch_rows=batch).plan
