"""The workshop: a task is first prepared (validated, priced), then run. Used by the worker process and, in the
simulator, in this process. Holds what is worth keeping between tasks: tables, prepared rows, programs.

What only private training, secure sums or shares need is imported where such a task is prepared: those modules, and the
cryptography under them, take memory that a device which only trains and evaluates should not pay for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from numpy.typing import NDArray

from sordino_agent import compute
from sordino_agent.aggregate.tasks import (
    ShareTask,
    SumFacts,
    SumGradientTask,
    SumMetricsTask,
    SumStatisticsTask,
    SumUpdateTask,
)
from sordino_agent.batches import feature_rows, joined_columns, row_stream, step_count, target_rows
from sordino_agent.compute import Check, Layout
from sordino_agent.costs import private_steps
from sordino_agent.data.catalogue import Catalogue
from sordino_agent.data.table import Table
from sordino_agent.errors import BadCommand, Cancelled
from sordino_agent.models import ModelFile
from sordino_agent.spdz.tasks import SpdzEndTask, SpdzOpenTask, SpdzTask
from sordino_agent.store import ByteCache
from sordino_agent.tasks import (
    DescribeTask,
    EvaluateFacts,
    EvaluateTask,
    Facts,
    LoadTask,
    MomentsFacts,
    MomentsTask,
    PlanFacts,
    PlanTask,
    RunFacts,
    RunTask,
    Task,
    TaskCost,
    TrainFacts,
    TrainTask,
)
from sordino_common.errors import LimitExceeded, LocalError
from sordino_common.messages import Array, DataRef, Evaluate, RecordTerms, SumTerms, Train
from sordino_common.plan.arrays import from_numpy, to_numpy
from sordino_common.plan.executors import Program, load_program
from sordino_common.plan.plan import decode_plan, plan_id
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import Plan, PlanLimits
from sordino_common.privacy.mechanism import FULL_SAMPLING

if TYPE_CHECKING:
    from sordino_agent.private_step import GradientLayout
    from sordino_agent.spdz.bench import Bench

ExecutorName = Literal["numpy", "torch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPlan:
    """A validated Plan with its price, ready to run."""

    plan: Plan
    encoded_bytes: int
    facts: PlanFacts
    program: Program

    def cost(self, kind: str, runs: int) -> TaskCost:
        return TaskCost(kind=kind, nodes=len(self.plan.nodes), flops=self.facts.flops, runs=runs)


class Programs:
    """Plans by SHA-256, decoded and made ready once. May be shared by the workshops of one process."""

    def __init__(self, *, executor: ExecutorName, limits: PlanLimits, cache_bytes: int = 64 << 20) -> None:
        self._executor = executor
        self._limits = limits
        # A program takes a small multiple of its Plan's encoding; 8 was seen for the example models.
        self._cache: ByteCache[bytes, LoadedPlan] = ByteCache(
            budget_bytes=cache_bytes, size_of=lambda loaded: 8 * loaded.encoded_bytes
        )
        self._layouts: ByteCache[bytes, GradientLayout] = ByteCache(
            budget_bytes=cache_bytes, size_of=lambda layout: 512 * (1 + len(layout.gradients.blocks))
        )

    def load(self, data: bytes) -> LoadedPlan:
        """Raises `PlanError` or `CodecError` on a Plan that may not run here."""
        key = plan_id(data)
        loaded = self._cache.get(key)
        if loaded is None:
            plan = decode_plan(data, self._limits)
            program = load_program(plan, self._executor)
            cost = program.cost
            loaded = LoadedPlan(
                plan=plan,
                encoded_bytes=len(data),
                facts=PlanFacts(plan_id=key, peak_bytes=cost.peak_bytes, flops=cost.flops),
                program=program,
            )
            self._cache.put(key, loaded)
        return loaded

    def gradients(self, loaded: LoadedPlan) -> GradientLayout:
        """What a gradient Plan takes and gives, once it is proven and tried out that its rows are separate. Raises
        `PlanError`, `BadCommand`."""
        key = loaded.facts.plan_id
        layout = self._layouts.get(key)
        if layout is None:
            from sordino_agent import private_step
            from sordino_agent.private_apart import require_apart

            layout = private_step.gradient_layout(loaded.plan)
            require_apart(loaded.program, layout)
            self._layouts.put(key, layout)
        return layout


def plan_limits(memory_bytes: int) -> PlanLimits:
    """The bounds of a device whose tasks may take `memory_bytes`."""
    return PlanLimits(value_bytes=memory_bytes, peak_bytes=memory_bytes)


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A task that may run: its cost, and the function that runs it."""

    cost: TaskCost
    run: Callable[[Check | None], Facts]


class Workshop:
    """Turns tasks into facts, within `memory_bytes` for rows, parameters and a Plan's peak. `random`: where masks,
    samples and noise come from."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        programs: Programs,
        memory_bytes: int,
        models: Sequence[ModelFile] = (),
        bench: Bench | None = None,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._random = random
        self._made_bench = bench
        self._models = models
        self._catalogue = catalogue
        self._programs = programs
        self._memory_bytes = memory_bytes
        self._rows: ByteCache[tuple[str, bool, DataRef, TensorSpec], NDArray[Any]] = ByteCache(
            budget_bytes=memory_bytes // 4, size_of=lambda rows: rows.nbytes
        )

    def prepare(self, task: Task) -> Prepared:
        """Check everything that can be checked before running. Raises a `SordinoError` that says what does not fit."""
        match task:
            case DescribeTask():
                return Prepared(cost=TaskCost(kind=task.kind), run=lambda _: self._catalogue.describe())
            case PlanTask():
                facts = self._programs.load(task.plan).facts
                return Prepared(cost=TaskCost(kind=task.kind), run=lambda _: facts)
            case MomentsTask():
                return self._moments(task)
            case TrainTask():
                return self._train(task)
            case EvaluateTask():
                return self._evaluate(task)
            case RunTask():
                return self._run(task)
            case LoadTask():
                return self._load(task)
            case SpdzOpenTask() | SpdzTask() | SpdzEndTask():
                return self._shares(task)
            case SumUpdateTask():
                return self._sum_update(task)
            case SumGradientTask():
                return self._sum_gradient(task)
            case SumMetricsTask():
                return self._sum_metrics(task)
            case SumStatisticsTask():
                return self._sum_statistics(task)
            case ShareTask():
                return self._share(task)

    def catch_up(self) -> None:
        """Do what tasks put off until their outcomes are on their way."""
        if self._made_bench is not None:
            self._made_bench.catch_up()

    @property
    def _bench(self) -> Bench:
        """Made when it is first needed: its modules take memory that other tasks should not pay for."""
        if self._made_bench is None:
            from sordino_agent.data.models import FileModels
            from sordino_agent.spdz.bench import Bench

            programs = self._programs
            self._made_bench = Bench(
                catalogue=self._catalogue,
                models=FileModels(self._models, max_bytes=self._memory_bytes // 4),
                plan_of=lambda data: programs.load(data).plan,
            )
        return self._made_bench

    def _shares(self, task: SpdzOpenTask | SpdzTask | SpdzEndTask) -> Prepared:
        bench = self._bench
        cost = bench.cost_of(task)
        match task:
            case SpdzTask():
                return Prepared(cost=cost, run=partial(bench.run, task))
            case SpdzOpenTask():
                return Prepared(cost=cost, run=partial(bench.open, task))
            case SpdzEndTask():
                return Prepared(cost=cost, run=partial(bench.end, task))

    def _moments(self, task: MomentsTask) -> Prepared:
        command = task.command
        table = self._catalogue.table(command.dataset)
        compute.require_rows(len(table.train), task.min_rows, dataset=table.name, what="moments")
        return Prepared(
            cost=TaskCost(kind=task.kind, flops=3 * len(table.train) * len(command.columns), runs=1),
            run=lambda _: MomentsFacts(result=compute.moments(table, command.columns)),
        )

    def _train(self, task: TrainTask, *, strict: bool = True) -> Prepared:
        """`strict`: as in `feature_rows`; not for an update that is clipped, whatever the rows hold."""
        command = task.command
        if command.privacy is not None:
            return self._train_private(task, command.privacy)
        loaded = self._programs.load(task.plan)
        layout = compute.training_layout(loaded.plan)
        self._check_batch(loaded.plan, layout, command.batch_rows)
        compute.check_params(loaded.plan, layout, command.params)
        if command.data.split != "train":
            raise BadCommand("train: the rows of the split `test` are for evaluation only")
        table = self._catalogue.table(command.data.dataset)
        rows = len(table.train)
        compute.require_rows(rows, task.min_rows, dataset=table.name, what="training")
        self._require_memory(loaded, table, rows, layout, command.params)
        x, y = self._feeds(table, command.data, loaded.plan, layout, strict=strict)
        steps = step_count(steps=command.steps, epochs=command.epochs, rows=rows, batch_rows=command.batch_rows)
        # A pass meets every row once, so this many different rows go into the update.
        met = min(rows, steps * command.batch_rows)
        compute.require_rows(met, task.min_rows, dataset=table.name, what=f"an update of {steps} steps")
        batches = row_stream(
            rows, batch_rows=command.batch_rows, seed=command.seed, round=command.round, name=task.agent
        )

        def run(check: Check | None) -> TrainFacts:
            assert y is not None
            update, loss_sum = compute.train(
                loaded.plan,
                loaded.program,
                layout,
                x=x,
                y=y,
                params=command.params,
                batches=batches,
                steps=steps,
                check=check,
            )
            return TrainFacts(rows=rows, steps=steps, update=update, loss_sum=loss_sum)

        return Prepared(cost=loaded.cost(task.kind, steps), run=run)

    def _train_private(self, task: TrainTask, terms: RecordTerms) -> Prepared:
        from sordino_agent import private_step
        from sordino_agent.private_sum import expected_batches

        command = task.command
        if task.apply is None:
            raise LocalError("private training without the Plan that applies gradients")
        loaded, apply = self._programs.load(task.plan), self._programs.load(task.apply)
        table, layout, x, y = self._private_rows(loaded, command.data, command.params, command.batch_rows)
        compute.require_rows(len(x), task.min_rows, dataset=table.name, what="private training")
        applier = private_step.Applier(apply.program, loaded.plan, layout)
        sums = private_step.PrivateSums(
            loaded.program,
            layout,
            x=x,
            y=y,
            clip_norm=terms.clip_norm,
            grid_bits=terms.grid_bits,
            threshold=terms.sampling_threshold,
            random=self._random,
        )
        steps = private_steps(steps=command.steps, epochs=command.epochs, threshold=terms.sampling_threshold)
        expected_rows = terms.sampling_threshold / FULL_SAMPLING * len(x)

        def run(check: Check | None) -> TrainFacts:
            update, mechanism = private_step.train_private(
                sums,
                applier,
                params=[to_numpy(array) for array in command.params],
                steps=steps,
                sigma_squared=terms.sigma_squared,
                unit=terms.clip_norm / 2**terms.grid_bits,
                expected_rows=expected_rows,
                random=self._random,
                check=check,
            )
            arrays = tuple(from_numpy(value) for value in update)
            return TrainFacts(rows=len(x), steps=steps, update=arrays, loss_sum=0.0, mechanism=mechanism)

        # As many batches as are expected: the time of a simulated device must not tell the size of a sample.
        batches = expected_batches(len(x), command.batch_rows, terms.sampling_threshold)
        return Prepared(cost=loaded.cost(task.kind, steps * batches), run=run)

    def _private_rows(
        self, loaded: LoadedPlan, data: DataRef, params: tuple[Array, ...], batch_rows: int
    ) -> tuple[Table, GradientLayout, NDArray[Any], NDArray[Any]]:
        """The train rows as a gradient Plan takes them, after all checks. Raises what does not fit."""
        from sordino_agent import private_step

        plan = loaded.plan
        layout = private_step.gradient_layout(plan)
        if layout.gradients.rows != batch_rows:
            raise BadCommand(
                f"Plan {plan.name!r} takes batches of {layout.gradients.rows} rows, the command says {batch_rows}"
            )
        if len(params) != len(layout.params):
            raise BadCommand(f"Plan {plan.name!r} takes {len(layout.params)} parameters, the command has {len(params)}")
        for index, array in zip(layout.params, params, strict=True):
            compute.check_spec(plan, index, array)
        if data.split != "train":
            raise BadCommand("private training: the rows of the split `test` are for evaluation only")
        table = self._catalogue.table(data.dataset)
        places = Layout(params=layout.params, states=(), x=layout.x, y=layout.y, carry=(), loss=None, rows=())
        self._require_memory(loaded, table, len(table.train), places, params, clipping=True)
        layout = self._programs.gradients(loaded)  # it runs, so after what it takes is known to fit
        x, y = self._feeds(table, data, plan, places, strict=False)
        assert y is not None
        return table, layout, x, y

    def _evaluate(self, task: EvaluateTask) -> Prepared:
        command = task.command
        loaded = self._programs.load(task.plan)
        layout = compute.evaluation_layout(loaded.plan)
        self._check_batch(loaded.plan, layout, command.batch_rows)
        compute.check_params(loaded.plan, layout, command.params)
        table = self._catalogue.table(command.data.dataset)
        rows = len(table.rows(command.data.split))
        compute.require_rows(rows, task.min_rows, dataset=table.name, what="evaluation")
        self._require_memory(loaded, table, rows, layout, command.params)
        x, y = self._feeds(table, command.data, loaded.plan, layout)

        def run(check: Check | None) -> EvaluateFacts:
            names, sums = compute.evaluate(
                loaded.plan, loaded.program, layout, x=x, y=y, params=command.params, check=check
            )
            return EvaluateFacts(rows=rows, names=names, sums=sums)

        return Prepared(cost=loaded.cost(task.kind, -(-rows // command.batch_rows)), run=run)

    def _sum_update(self, task: SumUpdateTask) -> Prepared:
        from sordino_agent.aggregate import work

        command = task.command
        train = Train(
            run=command.terms.run,
            round=command.round,
            attempt=command.attempt,
            plan_id=command.plan_id,
            data=command.data,
            params=command.params,
            batch_rows=command.batch_rows,
            steps=command.steps,
            epochs=command.epochs,
            seed=command.seed,
            privacy=command.privacy,
        )
        self._require_words(command.terms, held=3)
        if command.clip is not None:
            work.require_clip(command)
        prepared = self._train(
            TrainTask(command=train, plan=task.plan, agent=task.agent, min_rows=task.min_rows, apply=task.apply),
            strict=command.clip is None,
        )

        def run(check: Check | None) -> SumFacts:
            try:
                facts = prepared.run(check)
            except (Cancelled, MemoryError):
                raise
            except Exception:  # whatever it is: it may be for what a row holds
                if command.clip is None or command.privacy is not None:
                    raise
                facts = work.nothing(command)  # a refusal would tell something of the data; zeros are within the clip
            assert isinstance(facts, TrainFacts)
            if command.privacy is not None and not work.fits(command, facts):
                # The noise is drawn: a refusal would tell something that nobody paid for.
                facts = msgspec.structs.replace(work.nothing(command), mechanism=facts.mechanism)
            vector, device = work.update_vector(command, facts, random=self._random)
            mechanisms = tuple(one for one in (facts.mechanism, device) if one is not None)
            return work.masked_facts(
                vector, command.terms, agent=task.agent, mechanisms=mechanisms, random=self._random
            )

        return Prepared(cost=prepared.cost, run=run)

    def _sum_gradient(self, task: SumGradientTask) -> Prepared:
        from sordino_agent import private_step
        from sordino_agent.aggregate import work
        from sordino_agent.private_sum import expected_batches

        command = task.command
        terms = command.terms
        self._require_words(terms, held=4)
        loaded = self._programs.load(task.plan)
        table, layout, x, y = self._private_rows(loaded, command.data, command.params, command.batch_rows)
        compute.require_rows(len(x), task.min_rows, dataset=table.name, what="a private gradient")
        sums = private_step.PrivateSums(
            loaded.program,
            layout,
            x=x,
            y=y,
            clip_norm=command.clip_norm,
            grid_bits=command.grid_bits,
            threshold=command.sampling_threshold,
            random=self._random,
        )
        work.require_gradient(command, length=sums.length, rows=len(x))

        def run(check: Check | None) -> SumFacts:
            assert terms.noise is not None
            vector = sums.draw([to_numpy(array) for array in command.params], check)
            cost = sums.mechanism(terms.noise.sigma_squared)
            return work.masked_facts(vector, terms, agent=task.agent, mechanisms=(cost,), random=self._random)

        batches = expected_batches(len(x), command.batch_rows, command.sampling_threshold)
        return Prepared(cost=loaded.cost(task.kind, batches), run=run)

    def _sum_metrics(self, task: SumMetricsTask) -> Prepared:
        from sordino_agent.aggregate import work

        command = task.command
        evaluate = Evaluate(
            run=command.terms.run,
            round=command.round,
            plan_id=command.plan_id,
            data=command.data,
            params=command.params,
            batch_rows=command.batch_rows,
        )
        prepared = self._evaluate(EvaluateTask(command=evaluate, plan=task.plan, min_rows=task.min_rows))

        def run(check: Check | None) -> SumFacts:
            facts = prepared.run(check)
            assert isinstance(facts, EvaluateFacts)
            vector = work.metrics_vector(command, facts)
            return work.masked_facts(vector, command.terms, agent=task.agent, random=self._random)

        return Prepared(cost=prepared.cost, run=run)

    def _sum_statistics(self, task: SumStatisticsTask) -> Prepared:
        from sordino_agent.aggregate import work

        command = task.command
        self._require_words(command.terms, held=4)
        table = self._catalogue.table(command.dataset)
        rows = len(table.train)
        compute.require_rows(rows, task.min_rows, dataset=table.name, what="statistics")
        work.require_statistics(command, rows)
        values = {column.name: table.column(column.name) for column in command.columns}
        for name, column in values.items():
            if column.ndim != 1:
                raise BadCommand(
                    f"dataset {table.name!r}: column {name!r} has not one number a row, as statistics need"
                )

        def run(check: Check | None) -> SumFacts:
            if check is not None:
                check()
            train = {name: column[table.train] for name, column in values.items()}
            return work.statistics_facts(command, train, agent=task.agent, random=self._random)

        flops = rows * command.terms.length
        return Prepared(cost=TaskCost(kind=task.kind, flops=flops, runs=1), run=run)

    def _share(self, task: ShareTask) -> Prepared:
        from sordino_agent.aggregate import work

        self._require_words(task.terms, held=2)
        flops = len(task.members) * task.terms.length * task.terms.word_bytes  # bytes of masks, about an operation each

        def run(check: Check | None) -> Facts:
            return work.share_facts(task, random=self._random, check=check)

        return Prepared(cost=TaskCost(kind=task.kind, flops=flops, runs=1), run=run)

    def _require_words(self, terms: SumTerms, *, held: int) -> None:
        """`held` vectors of 64-bit numbers at a time."""
        needed = 8 * held * terms.length
        if needed > self._memory_bytes:
            raise LimitExceeded(
                f"a sum of {terms.length} entries needs {needed} bytes here; limits.memory_bytes on the device is "
                f"{self._memory_bytes}"
            )

    def _run(self, task: RunTask) -> Prepared:
        loaded = self._programs.load(task.plan)
        self._require_memory(loaded, None, 0, None, task.inputs)
        return Prepared(
            cost=loaded.cost(task.kind, 1),
            run=lambda check: RunFacts(outputs=compute.run_plan(loaded.plan, loaded.program, task.inputs, check=check)),
        )

    def _load(self, task: LoadTask) -> Prepared:
        command = task.command
        table = self._catalogue.table(command.dataset)
        compute.require_rows(len(table.rows(command.split)), task.min_rows, dataset=table.name, what="a load")
        columns = joined_columns(table, command.split, command.columns)
        return Prepared(
            cost=TaskCost(kind=task.kind, flops=columns.size, runs=1),
            run=lambda _: RunFacts(outputs=(from_numpy(compute.as_dtype(columns, command.dtype, table.name)),)),
        )

    def _feeds(
        self, table: Table, data: DataRef, plan: Plan, layout: Layout, *, strict: bool = True
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """x and y of all rows; `strict` as in `feature_rows`."""
        x = self._prepared("x", feature_rows, table, data, plan.inputs[layout.x].spec, strict=strict)
        if layout.y is None:
            return x, None
        return x, self._prepared("y", target_rows, table, data, plan.inputs[layout.y].spec, strict=strict)

    def _prepared(
        self,
        role: str,
        make: Callable[..., NDArray[Any]],
        table: Table,
        data: DataRef,
        spec: TensorSpec,
        *,
        strict: bool,
    ) -> NDArray[Any]:
        key = (role, strict, data, TensorSpec(spec.dtype, spec.shape[1:]))
        rows = self._rows.get(key)
        if rows is None:
            rows = make(table, data, spec, strict=strict)
            self._rows.put(key, rows)
        return rows

    def _require_memory(
        self,
        loaded: LoadedPlan,
        table: Table | None,
        rows: int,
        layout: Layout | None,
        params: tuple[Array, ...],
        *,
        clipping: bool = False,
    ) -> None:
        """Before anything of size is made: the table, its prepared rows, parameters and the Plan's peak must fit; with
        `clipping` also what the outputs take as float64, and sum, noise and gradient of 8 bytes an entry."""
        held = table.nbytes if table is not None else 0
        if clipping:
            specs = loaded.plan.specs()
            held += sum(16 * specs[output.value].numel for output in loaded.plan.outputs)
            held += sum(6 * array.nbytes for array in params)
        if layout is not None:
            for index in (layout.x, *(() if layout.y is None else (layout.y,))):
                spec = loaded.plan.inputs[index].spec
                entry = TensorSpec(spec.dtype, spec.shape[1:])
                held += rows * (entry.nbytes + 16 * entry.numel)  # the result, and two float64 steps on the way
        # The command's parameters and the answer of the same size are there beside the Plan's own peak.
        needed = loaded.facts.peak_bytes + held + 2 * sum(array.nbytes for array in params)
        if needed > self._memory_bytes:
            raise LimitExceeded(
                f"Plan {loaded.plan.name!r} needs {needed} bytes here (peak {loaded.facts.peak_bytes}, rows {held}); "
                f"limits.memory_bytes on the device is {self._memory_bytes}; a smaller batch needs less"
            )

    @staticmethod
    def _check_batch(plan: Plan, layout: Layout, batch_rows: int) -> None:
        traced = plan.inputs[layout.x].spec.shape[0]
        if traced != batch_rows:
            raise BadCommand(f"Plan {plan.name!r} takes batches of {traced} rows, the command says {batch_rows}")
