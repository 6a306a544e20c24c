"""Federated averaging, round by round.

    once            describe the agents, give them the Plans, measure the columns (unless the job states the scaling)
    every round     newcomers join; every chosen agent trains from the same parameters; the mean of the updates,
                    weighted by rows, is applied; every so often the agents evaluate on their held-out rows (sums only);
                    a checkpoint is on disk before the next round begins

Messages per round and agent: one command and one reply, two of each where it is evaluated. Security: the server sees
each agent's update; this is the baseline that the private modes are measured against.

A round that misses its quorum is repeated under a new attempt number, for those who are missing only: an update that
is already here was computed from the same parameters and stays good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sordino_common.errors import ConfigError, RemoteError
from sordino_common.messages import Cancel, DataRef, Evaluate, Evaluated, Message, Train, Trained
from sordino_common.plan.arrays import from_numpy
from sordino_server.job import JobSpec, TrainSpec, metrics_of
from sordino_server.rounds.average import LARGEST, MOST_ROWS, averaged, check_update
from sordino_server.rounds.effects import (
    Ask,
    Checkpoint,
    Effect,
    Metered,
    Params,
    Result,
    Scaling,
    ask,
    meter,
    report,
)
from sordino_server.rounds.events import Note, Outcome, RoundStarted, Share
from sordino_server.rounds.every_round import Played, enough, every_round, nothing_yet, recorded
from sordino_server.rounds.releases import LocalNoise, plans_of, retries_of, used_up
from sordino_server.rounds.roll import Names, Program, Roll, shortage
from sordino_server.rounds.scaling import measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """The run's two Plans. `train` takes and gives `params` tensors first; `evaluate` has `row_names` as outputs."""

    train: Program
    evaluate: Program
    evaluate_rows: int
    row_names: tuple[str, ...]


def federated_averaging(
    spec: JobSpec,
    *,
    run: str,
    programs: Programs,
    params: Params,
    resumed: Checkpoint | None = None,
    private: LocalNoise | None = None,
) -> Generator[Effect, Result, Checkpoint]:
    """Train until `spec.train` says enough; returns the last checkpoint. `resumed`: where to go on instead of
    `params`. `private`: devices add noise to their steps; no loss is told. Raises `shortage`."""
    counted = yield from meter()
    roll = Roll(data=spec.data, train=spec.train, programs=plans_of((programs.train, programs.evaluate), private))
    state = resumed
    if state is None:
        scaling = yield from measure(spec.data, spec.train, roll, 1)
        state = Checkpoint(params=params, scaling=scaling, steps=0, record=nothing_yet())

    def play(number: int, state: Checkpoint, counted: Metered) -> Played:
        this = _Round(spec=spec, run=run, programs=programs, roll=roll, number=number, private=private)
        return this.play(state, counted)

    return (yield from every_round(spec, state, counted, play, releases=private))


def held_out_metrics(
    spec: JobSpec, *, run: str, programs: Programs, roll: Roll, state: Checkpoint
) -> Generator[Effect, Result, tuple[dict[str, float], int]]:
    """The job's metrics of the last parameters over the agents' held-out rows, and how many rows those are."""
    number = spec.train.rounds
    return _Round(spec=spec, run=run, programs=programs, roll=roll, number=number).metrics(state)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    spec: JobSpec
    run: str
    programs: Programs
    roll: Roll
    number: int
    private: LocalNoise | None = None

    def play(self, state: Checkpoint, counted: Metered) -> Played:
        """The state after the round."""
        begin_s = (yield from meter()).now_s
        replies, shares, attempts = yield from self._train(state)
        params = averaged(state.params, replies)
        if not all(np.isfinite(param).all() for param in params):
            raise ConfigError(
                f"round {self.number}: the averaged parameters are not finite: the training diverges. "
                "Lower optimizer.lr, or standardize the data. The last checkpoint is kept."
            )
        steps = sum(reply.steps for reply in replies.values())
        after = replace(state, params=params, steps=state.steps + steps)
        metrics, test_rows = yield from self.metrics(after)
        rows = sum(reply.rows for reply in replies.values())
        loss = math.fsum(replies[name].loss_sum / replies[name].steps * replies[name].rows for name in sorted(replies))
        return (
            yield from recorded(
                after,
                counted,
                number=self.number,
                begin_s=begin_s,
                loss=loss / rows if self.private is None else None,
                metrics=metrics,
                test_rows=test_rows,
                shares=shares,
                steps=steps,
                attempts=attempts,
            )
        )

    def _train(self, state: Checkpoint) -> Generator[Effect, Result, tuple[dict[str, Trained], dict[str, Share], int]]:
        train = self.spec.train
        arrays = tuple(from_numpy(param) for param in state.params)
        replies: dict[str, Trained] = {}
        shares: dict[str, Share] = {}
        forbidden: frozenset[str] = frozenset()
        unaffordable: frozenset[str] = frozenset()
        lacking = 1
        tries = retries_of(train, self.private) + 1
        for attempt in range(tries):
            names, need = yield from self.roll.assemble(self.number, done=frozenset(replies))
            names = chosen(train, names, self.number, attempt, have=len(replies))
            yield from report(RoundStarted(round=self.number, attempt=attempt, asked=names))
            command = Train(
                run=self.run,
                round=self.number,
                attempt=attempt,
                plan_id=self.programs.train.plan_id,
                data=data_ref(self.spec, state.scaling, "train"),
                params=arrays,
                batch_rows=train.batch_rows,
                steps=train.local_steps or 0,
                epochs=train.local_epochs or 0.0,
                seed=train.seed,
                privacy=None if self.private is None else self.private.record,
            )
            answers = yield from ask(
                Ask(
                    purpose=f"round {self.number}: training",
                    messages=dict.fromkeys(names, command),
                    expects=Trained,
                    quorum=need,
                    deadline_s=train.round_deadline_s,
                    straggler_s=train.straggler_s,
                    check=self._check(command, state.params),
                    cancel=Cancel(run=self.run, round=self.number),
                )
            )
            for name, reply in answers.replies.items():
                assert isinstance(reply, Trained)
                replies[name] = reply
                shares[name] = _share_of(reply, told=self.private is None)
            again = answers.missing.keys() | answers.refusals.keys()
            forbidden = (forbidden - again) | answers.forbidden
            unaffordable = (unaffordable - again) | answers.unaffordable
            lacking = need - len(answers.replies)
            for outcome, reasons in (("refused", answers.refusals), ("missing", answers.missing)):
                yield from self._excuse(outcome, reasons, shares)
            if len(answers.replies) >= need:
                return replies, shares, attempt + 1
            left = f"{tries - 1 - attempt} attempts left" if attempt < tries - 1 else "no attempt left"
            paid = "" if self.private is None else f"; {self.private.releases.told}"
            text = f"round {self.number}: {len(answers.replies)} answers, {need} are needed; {left}{paid}"
            yield from report(Note(text=text, level="warning"))
        missing = {name: share.note for name, share in sorted(shares.items()) if share.outcome != "answered"}
        detail = ", ".join(f"{name} ({note})" for name, note in missing.items())
        raise shortage(
            f"round {self.number}: quorum missed in {tries} attempts; missing: {detail}. "
            "The last checkpoint is kept: go on with --resume.",
            missing=missing.keys(),
            forbidden=forbidden,
            unaffordable=unaffordable,
            lacking=lacking,
        )

    def _excuse(
        self, outcome: str, reasons: Mapping[str, str], shares: dict[str, Share]
    ) -> Generator[Effect, Result, None]:
        kind: Outcome = "refused" if outcome == "refused" else "missing"
        for name, why in sorted(reasons.items()):
            shares[name] = Share(outcome=kind, note=why)
            if kind == "refused":
                self.roll.forget(name)
            yield from report(Note(text=f"round {self.number}: without {name}: {why}", level="warning"))

    def _check(self, command: Train, params: Params) -> Callable[[str, Message], None]:
        limits = self.spec.limits

        def check(_: str, reply: Message) -> None:
            assert isinstance(reply, Trained)
            if (reply.run, reply.round, reply.attempt) != (command.run, command.round, command.attempt):
                raise RemoteError(f"answers {reply.run} round {reply.round} attempt {reply.attempt}")
            check_update(reply, params, norm_limit=limits.update_norm, row_limit=limits.rows_per_agent)

        return check

    def metrics(self, state: Checkpoint) -> Generator[Effect, Result, tuple[dict[str, float], int]]:
        """The job's metrics over the held-out rows of whoever is ready, and how many rows those are; ({}, 0) if it is
        not this round's turn."""
        train, every = self.spec.train, self.spec.train.evaluate_every
        final = (
            self.number == train.rounds
            or enough(self.spec, state)
            or used_up(None if self.private is None else self.private.releases)
        )
        if not final and (every == 0 or self.number % every != 0):
            return {}, 0
        params = tuple(from_numpy(param) for param in state.params)
        replies: dict[str, Evaluated] = {}
        for _ in range(train.retries + 1 if final else 1):
            names, need = yield from self.roll.assemble(self.number, done=frozenset(replies))
            holders = [name for name in names if self.roll.able[name].data.test_rows > 0]
            if not holders:
                break
            command = Evaluate(
                run=self.run,
                round=self.number,
                plan_id=self.programs.evaluate.plan_id,
                data=data_ref(self.spec, state.scaling, "test"),
                params=params,
                batch_rows=self.programs.evaluate_rows,
            )
            need = min(need, len(holders))
            answers = yield from ask(
                Ask(
                    purpose=f"round {self.number}: evaluation",
                    messages=dict.fromkeys(holders, command),
                    expects=Evaluated,
                    quorum=need,
                    deadline_s=train.round_deadline_s,
                    straggler_s=train.straggler_s,
                    check=self._check_sums,
                    cancel=Cancel(run=self.run, round=self.number),
                )
            )
            for name, reply in answers.replies.items():
                assert isinstance(reply, Evaluated)
                replies[name] = reply
            for name, why in sorted({**answers.refusals, **answers.missing}.items()):
                yield from report(Note(text=f"round {self.number}: evaluation without {name}: {why}", level="warning"))
            if len(answers.replies) >= need:
                break
        if not replies:
            yield from report(Note(text=f"round {self.number}: no agent has evaluated", level="warning"))
            return {}, 0
        metrics = metrics_from_sums(self.spec, self.programs.row_names, state.scaling, replies)
        return metrics, sum(reply.rows for reply in replies.values())

    def _check_sums(self, _: str, reply: Message) -> None:
        assert isinstance(reply, Evaluated)
        if (reply.run, reply.round) != (self.run, self.number):
            raise RemoteError(f"answers {reply.run} round {reply.round}")
        if reply.names != self.programs.row_names or len(reply.sums) != len(reply.names):
            raise RemoteError(f"its sums are named {list(reply.names)}, expected {list(self.programs.row_names)}")
        if reply.rows < 1 or not all(math.isfinite(number) for number in reply.sums):
            raise RemoteError("its sums are not finite, or of no rows")
        if reply.rows > MOST_ROWS or any(abs(number) > LARGEST for number in reply.sums):
            raise RemoteError(f"claims {reply.rows} rows, at most {MOST_ROWS}; or a sum above {LARGEST:g}")


def chosen(train: TrainSpec, names: Names, number: int, attempt: int, *, have: int = 0) -> Names:
    """All, or so many drawn by a generator that depends on job, round and attempt only."""
    wanted = train.agents
    if wanted == "all" or len(names) <= wanted - have:
        return names
    picked = np.random.Generator(np.random.PCG64([train.seed, number, attempt])).permutation(len(names))
    return tuple(names[k] for k in sorted(picked[: wanted - have].tolist()))


def data_ref(spec: JobSpec, scaling: Scaling, split: str) -> DataRef:
    data = spec.data
    return DataRef(
        dataset=data.dataset,
        features=data.features,
        target=data.target,
        split="train" if split == "train" else "test",
        offset=scaling.offset,
        scale=scaling.scale,
        target_offset=scaling.target_offset,
        target_scale=scaling.target_scale,
    )


def metrics_from_sums(
    spec: JobSpec, row_names: Sequence[str], scaling: Scaling, replies: Mapping[str, Evaluated]
) -> dict[str, float]:
    """`test_<metric>` for each of the job's metrics; squared errors in the target's own unit."""
    rows = sum(reply.rows for reply in replies.values())
    means = {
        row: math.fsum(replies[name].sums[k] for name in sorted(replies)) / rows for k, row in enumerate(row_names)
    }
    return test_metrics(spec, scaling, means)


def test_metrics(spec: JobSpec, scaling: Scaling, means: Mapping[str, float]) -> dict[str, float]:
    """From mean row outputs (`loss`, `correct`) to the job's named metrics."""
    mse = means["loss"] * scaling.target_scale**2
    known = {"loss": means["loss"], "mse": mse, "rmse": math.sqrt(max(mse, 0.0)), "accuracy": means.get("correct")}
    result = {}
    for metric in metrics_of(spec):
        value = known[metric]
        if value is not None:
            result[f"test_{metric}"] = value
    return result


def _share_of(reply: Trained, *, told: bool) -> Share:
    return Share(
        outcome="answered",
        rows=reply.rows,
        steps=reply.steps,
        loss=reply.loss_sum / reply.steps if told else None,
        seconds=reply.seconds,
    )
