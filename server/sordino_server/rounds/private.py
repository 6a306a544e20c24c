"""Training with differential privacy over secure sums, round by round.

    record, noise aggregate   Σ over a Poisson sample of clipped gradients is one secure sum; helpers and server add
                              the noise inside it; the server takes the optimizer's step on what comes out
    device                    clipped updates are one secure sum, noised likewise; the server adds their mean. If the
                              job protects records too, every device's local steps have noise of their own

What a release is and how many there may be: `releases`, which wraps this generator; when the planned number is used
up, training ends with the rounds that it has. Divisors: `private_steps`. Of a single device the server learns that it
takes part, how many rows it states, and its time; no loss. Metrics are exact sums over held-out rows (`sum-metrics`),
which no epsilon covers: devices refuse them unless their own policy says `exact_evaluation`.

Jobs with noise from the devices alone are those of `fedavg` and `fedavg_secure`, with `RecordTerms` in the command.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace

from sordino_common.errors import LocalError
from sordino_common.messages import RecordTerms, SumClip, SumGradient, SumNoise, SumTerms, SumUpdate
from sordino_common.plan.arrays import from_numpy
from sordino_server.job import JobSpec
from sordino_server.rounds.effects import (
    Checkpoint,
    Effect,
    Metered,
    Params,
    PrivateState,
    Result,
    meter,
)
from sordino_server.rounds.every_round import Played, every_round, nothing_yet
from sordino_server.rounds.fedavg import Programs, chosen, data_ref
from sordino_server.rounds.fedavg_secure import SecureRound
from sordino_server.rounds.private_steps import ServerStep, mean_gradient, moved, require_finite
from sordino_server.rounds.releases import Releases
from sordino_server.rounds.roll import Program, Roll
from sordino_server.rounds.scaling import given_scaling
from sordino_server.rounds.secure_sum import SumRequest, SumResult, largest_device, secure_sum
from sordino_server.rounds.spdz import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """A round is one step on the noised sum of clipped gradients. `sigma_squared`: of each aggregator's noise."""

    clip_norm: float
    grid_bits: int
    sampling_threshold: int
    sigma_squared: int
    step: ServerStep

    @property
    def unit(self) -> float:
        """The real value of one integer."""
        return self.clip_norm / float(1 << self.grid_bits)

    @property
    def rate(self) -> float:
        """q, exactly as the sampler has it."""
        return self.sampling_threshold / float(1 << 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Updates:
    """A round is the noised mean of clipped updates. `record`: local steps are DP-SGD with noise of their own."""

    clip_norm: float
    grid_bits: int
    sigma_squared: int
    trainable: tuple[bool, ...]
    record: RecordTerms | None = None

    @property
    def unit(self) -> float:
        return self.clip_norm / float(1 << self.grid_bits)


Recipe = Gradients | Updates


def private_training(
    spec: JobSpec,
    *,
    run: str,
    programs: Programs,
    extra: tuple[Program, ...] = (),
    params: Params,
    recipe: Recipe,
    world: World,
    releases: Releases,
    resumed: Checkpoint | None = None,
) -> Generator[Effect, Result, Checkpoint]:
    """Train until `spec.train` says enough or the releases are used up; returns the last checkpoint. `extra`: Plans
    that devices need beside `programs`. Raises `shortage`: `BudgetRefused` if the quorum is missed for the devices'
    budgets. To be run as `releases.counted(private_training(...))`."""
    counted = yield from meter()
    secure = spec.secure
    if secure is None:
        raise LocalError("private_training: the job has no secure_aggregation")
    roll = Roll(
        data=spec.data, train=spec.train, programs=(programs.train, programs.evaluate, *extra), least=secure.minimum
    )
    state = resumed or Checkpoint(
        params=params,
        scaling=given_scaling(spec.data),
        steps=0,
        record=nothing_yet(),
        private=PrivateState(optimizer=recipe.step.start() if isinstance(recipe, Gradients) else ()),
    )

    def play(number: int, state: Checkpoint, counted: Metered) -> Played:
        base = SecureRound(
            spec=spec,
            secure=secure,
            run=run,
            programs=programs,
            roll=roll,
            number=number,
            world=world,
            releases=releases,
        )
        return _PrivateRound(base=base, recipe=recipe, releases=releases).play(state, counted)

    return (yield from every_round(spec, state, counted, play, releases=releases))


@dataclass(frozen=True, slots=True, kw_only=True)
class _PrivateRound:
    base: SecureRound
    recipe: Recipe
    releases: Releases

    def play(self, state: Checkpoint, counted: Metered) -> Played:
        """The state after the round, and what has been metered by then."""
        begin_s = (yield from meter()).now_s
        result = yield from self._sum(state)
        after = self._stepped(state, result)
        require_finite(after.params, self.base.number)
        return (yield from self.base.finish(after, counted, result, begin_s=begin_s, loss=None))

    def _stepped(self, state: Checkpoint, result: SumResult) -> Checkpoint:
        """Post-processing of the noised sum: see `private_steps`."""
        private = state.private or PrivateState()
        recipe = self.recipe
        if isinstance(recipe, Updates):
            members = len(result.members)
            params = moved(state.params, result.vector, step=recipe.unit, members=members, trainable=recipe.trainable)
            return replace(state, params=params)
        rows = sum(self.base.rows(name) for name in result.members)
        gradient = mean_gradient(result.vector, recipe.step.gradients, step=recipe.unit, rate=recipe.rate, rows=rows)
        params, optimizer = recipe.step(state.params, private.optimizer, gradient)
        return replace(state, params=params, private=replace(private, optimizer=optimizer))

    def _sum(self, state: Checkpoint) -> Generator[Effect, Result, SumResult]:
        base, recipe = self.base, self.recipe
        train, secure = base.spec.train, base.secure
        arrays = tuple(from_numpy(param) for param in state.params)
        data = data_ref(base.spec, state.scaling, "train")
        limit = base.row_limit

        def gradient(terms: SumTerms) -> SumGradient:
            assert isinstance(recipe, Gradients)
            return SumGradient(
                terms=terms,
                round=base.number,
                attempt=0,
                plan_id=base.programs.train.plan_id,
                data=data,
                params=arrays,
                batch_rows=train.batch_rows,
                clip_norm=recipe.clip_norm,
                grid_bits=recipe.grid_bits,
                sampling_threshold=recipe.sampling_threshold,
            )

        def update(terms: SumTerms) -> SumUpdate:
            assert isinstance(recipe, Updates)
            return SumUpdate(
                terms=terms,
                round=base.number,
                attempt=0,
                plan_id=base.programs.train.plan_id,
                data=data,
                params=arrays,
                batch_rows=train.batch_rows,
                steps=train.local_steps or 0,
                epochs=train.local_epochs or 0.0,
                seed=train.seed,
                weight="one",
                weight_unit=1,
                fraction_bits=0,
                clip=SumClip(norm=recipe.clip_norm, grid_bits=recipe.grid_bits),
                privacy=recipe.record,
            )

        # Who can be asked is described when the sum begins; by then the largest row count is known.
        yield from base.roll.assemble(base.number)
        most_rows = max((base.rows(name) for name in base.roll.able if base.rows(name) <= limit), default=1)
        whole = 1 << recipe.grid_bits
        request = SumRequest(
            purpose=f"{'gradient' if isinstance(recipe, Gradients) else 'update'} of round {base.number}",
            round=base.number,
            command=gradient if isinstance(recipe, Gradients) else update,
            length=recipe.step.length if isinstance(recipe, Gradients) else sum(p.size for p in state.params),
            # A row's entry is at most its norm; a clipped update's too, and rounding adds less than one.
            bound=whole * most_rows + 1 if isinstance(recipe, Gradients) else whole + 1,
            minimum=secure.minimum,
            helpers=secure.helpers,
            deadline_s=train.round_deadline_s,
            straggler_s=train.straggler_s,
            retries=min(train.retries, max(0, self.releases.left - 1)),  # every attempt is a release
            noise=SumNoise(sigma_squared=recipe.sigma_squared),
            bits=secure.bits,
            choose=lambda names, attempt: chosen(train, base.within(names, limit), base.number, attempt),
            announce=True,
            releases=self.releases,
            remedy=largest_device(most_rows) if isinstance(recipe, Gradients) else "",
        )
        return (yield from secure_sum(base.roll, request, run=base.run, world=base.world))
