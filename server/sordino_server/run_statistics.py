"""A statistics job's run: its noise, its one round, what the summary says, and the same regression without noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sordino_common.errors import BudgetRefused, LocalError
from sordino_common.messages import Message, SumNoise, SumStatistics
from sordino_common.privacy.mechanism import Mechanism
from sordino_common.privacy.row_queries import sensitivity_squared
from sordino_server.accounting.accountant import account
from sordino_server.accounting.calibrate import calibrate, sigma_squared_for
from sordino_server.baseline import Baseline, Pooled
from sordino_server.job import Job
from sordino_server.job_statistics import queries_of
from sordino_server.model import Traced, trace_job
from sordino_server.public_data import Table
from sordino_server.rounds.effects import Checkpoint, Effect, Result
from sordino_server.rounds.releases import Releases
from sordino_server.rounds.spdz import World
from sordino_server.rounds.statistics import statistics_round

Real = NDArray[np.float64]
NOT_COVERED: Final = (
    "held-out rows, over which exact sums are formed for the metrics",
    "how many rows each device has, who takes part, and when",
    "the choice of ranges and settings after looking at earlier runs on the same rows",
)
# Without privacy a repeated sum costs nothing; with a target epsilon the noise is for one release.
_EXACT_RETRIES: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsRun:
    """`mechanism`: of the one release; None without privacy."""

    job: Job
    traced: Traced
    mechanism: Mechanism | None
    releases: Releases
    world: World

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters: the ridge model's, or none."""
        return self.traced.names if self.job.spec.statistics.ridge is not None else ()

    @property
    def security(self) -> str:
        """For people: what the server sees, and what is promised."""
        secure, privacy = self.job.spec.secure, self.job.spec.privacy
        assert secure is not None
        sums = f"secure aggregation, sums over {secure.minimum} devices or more"
        if self.mechanism is None or privacy is None:
            return f"{sums}; no noise"
        epsilon = account([self.mechanism], privacy.delta, accountant=privacy.accountant).epsilon
        return f"{sums}; record-level differential privacy, epsilon {epsilon:.4g} at delta {privacy.delta:g}"

    def rounds(self, run: str, resumed: Checkpoint | None) -> Generator[Effect, Result, Checkpoint]:
        """The one round, its release counted before it begins."""
        noise = None if self.mechanism is None else SumNoise(sigma_squared=self.mechanism.sigma_squared)
        if noise is not None and resumed is None and self.releases.left == 0:
            raise BudgetRefused(
                f"run {run}: its one noised sum was begun before the run was interrupted, and somebody may know it; "
                "another one is another release. Start a new run: the devices' budgets count both"
            )
        retries = _EXACT_RETRIES if noise is None else 0
        generator = statistics_round(
            self.job.spec,
            run=run,
            programs=self.traced.programs,
            params=self.traced.params if self.names else (),
            world=self.world,
            noise=noise,
            retries=retries,
            resumed=resumed,
        )
        return generator if noise is None else self.releases.counted(generator)

    def summary(self, final: Checkpoint) -> dict[str, Any]:
        """`statistics` and `privacy`."""
        # A closed form against a closed form: how long each takes says nothing.
        return {"statistics": final.findings, "privacy": self.spent(), "overhead_vs_torch": None}

    def spent(self) -> dict[str, Any] | None:
        """`privacy` as of now."""
        privacy, secure, one = self.job.spec.privacy, self.job.spec.secure, self.mechanism
        if privacy is None or secure is None or one is None:
            return None
        begun = self.releases.begun
        spent = (dataclasses.replace(one, count=begun),) if begun else ()
        found = account(spent, privacy.delta, accountant=privacy.accountant)
        s = "s" if secure.helpers != 1 else ""
        return {
            "unit": "record",
            "epsilon": found.epsilon,
            "delta": privacy.delta,
            "accountant": found.accountant,
            "noise_multiplier": one.noise_multiplier,
            "clip_norm": None,  # data.ranges and the questions bound what a row adds
            "sampling_rate": 1.0,
            "moments_epsilon": found.moments,
            "rdp_epsilon": found.rdp,
            "pld_epsilon": found.pld,
            "target_epsilon": privacy.epsilon,
            "releases": begun,
            "noise_from": f"each of {secure.helpers} helper{s} and the server",
            "sigma_squared": one.sigma_squared,
            "sensitivity_squared": one.sensitivity_squared,
            "adversary": _adversary(secure.helpers),
            "rounds": 1,
            "not_covered": list(NOT_COVERED),
            "device": None,
        }

    def baseline(self, pooled: Pooled, stopwatch: Callable[[], float]) -> Baseline | None:
        """Least squares on the pooled rows, without noise; None if the job learns no model."""
        spec = self.job.spec
        if spec.statistics.ridge is None:
            return None
        began_s = stopwatch()
        x, y = _design(spec.data.features, spec.data.target, pooled.train)
        solution, *_ = np.linalg.lstsq(x, y, rcond=None)
        test_x, test_y = _design(spec.data.features, spec.data.target, pooled.test)
        mse = float(np.mean(np.square(test_x @ solution - test_y)))
        metrics = {"test_mse": mse, "test_rmse": math.sqrt(mse)}
        return Baseline(metrics=metrics, curve=(metrics,), epochs=1, seconds=stopwatch() - began_s)


def statistics_run(job: Job, model: nn.Module, world: World | None, *, begun: int) -> StatisticsRun:
    """`begun`: releases of the run before this process. Raises `TargetOutOfReach` for a target that no noise keeps."""
    if world is None:
        raise LocalError("a statistics run needs a world")
    spec = job.spec
    privacy, mechanism = spec.privacy, None
    if privacy is not None:
        mechanism = Mechanism(unit="record", sensitivity_squared=sensitivity_squared(queries_of(spec)), sigma_squared=1)
        if privacy.noise_multiplier is not None:
            sigma_squared = sigma_squared_for(privacy.noise_multiplier, mechanism.sensitivity_squared)
            mechanism = dataclasses.replace(mechanism, sigma_squared=sigma_squared)
        else:
            assert privacy.epsilon is not None
            mechanism = calibrate(
                mechanism, epsilon=privacy.epsilon, delta=privacy.delta, accountant=privacy.accountant
            )
    return StatisticsRun(
        job=job,
        traced=trace_job(job, model),
        mechanism=mechanism,
        releases=Releases(planned=1, identify=_release_of, begun=begun),
        world=world,
    )


def _adversary(helpers: int) -> str:
    who = "the server as long as the helper is honest, against the helper"
    if helpers > 1:
        who = f"the server together with all but one of the {helpers} helpers"
    whole = "each of helpers and server adds the whole noise"
    return f"Holds against {who}, the broker, and whoever sees the result: {whole}."


def _release_of(message: Message) -> bytes | None:
    return message.terms.session if isinstance(message, SumStatistics) and message.terms.noise is not None else None


def _design(features: tuple[str, ...], target: str, table: Table) -> tuple[Real, Real]:
    columns = [np.asarray(table.columns[name], dtype=np.float64) for name in features]
    x = np.stack([*columns, np.ones(table.rows)], axis=1)
    return x, np.asarray(table.columns[target], dtype=np.float64)
