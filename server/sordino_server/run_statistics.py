"""A statistics job's run: its noise, its one round, what the summary says, and the same regression without noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sordino_common.errors import BudgetRefused, LocalError
from sordino_common.messages import SumNoise
from sordino_server.baseline import Baseline, Pooled
from sordino_server.guarantee import Guarantee, guarantee_of
from sordino_server.job import Job
from sordino_server.model import Traced, trace_job
from sordino_server.public_data import Table
from sordino_server.rounds.effects import Checkpoint, Effect, Result
from sordino_server.rounds.releases import Releases
from sordino_server.rounds.spdz import World
from sordino_server.rounds.statistics import statistics_round

Real = NDArray[np.float64]
# Without privacy a repeated sum costs nothing; with a target epsilon the noise is for one release.
_EXACT_RETRIES: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsRun:
    """`guarantee`: of the one release; None without privacy."""

    job: Job
    traced: Traced
    guarantee: Guarantee | None
    releases: Releases
    world: World

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters: the ridge model's, or none."""
        return self.traced.names if self.job.spec.statistics.ridge is not None else ()

    @property
    def security(self) -> str:
        """For people: what the server sees, and what is promised."""
        secure = self.job.spec.secure
        assert secure is not None
        sums = f"secure aggregation, sums over {secure.minimum} devices or more"
        return f"{sums}; no noise" if self.guarantee is None else f"{sums}; {self.guarantee.label}"

    def rounds(self, run: str, resumed: Checkpoint | None) -> Generator[Effect, Result, Checkpoint]:
        """The one round, its release counted before it begins."""
        guarantee = self.guarantee
        noise = None if guarantee is None else SumNoise(sigma_squared=guarantee.first.one.sigma_squared)
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
            releases=None if noise is None else self.releases,
            resumed=resumed,
        )
        return generator if noise is None else self.releases.counted(generator)

    def summary(self, final: Checkpoint) -> dict[str, Any]:
        """`statistics` and `privacy`."""
        # A closed form against a closed form: how long each takes says nothing.
        return {"statistics": final.findings, "privacy": self.spent(), "overhead_vs_torch": None}

    def spent(self) -> dict[str, Any] | None:
        """`privacy` as of now."""
        return None if self.guarantee is None else self.guarantee.summary(begun=self.releases.begun, rounds=1)

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
    """`begun`: releases of the run before this process. Raises `ConfigError` for a target that no noise keeps."""
    if world is None:
        raise LocalError("a statistics run needs a world")
    return StatisticsRun(
        job=job,
        traced=trace_job(job, model),
        guarantee=None if job.spec.privacy is None else guarantee_of(job),
        releases=Releases(planned=1, begun=begun),
        world=world,
    )


def _design(features: tuple[str, ...], target: str, table: Table) -> tuple[Real, Real]:
    columns = [np.asarray(table.columns[name], dtype=np.float64) for name in features]
    x = np.stack([*columns, np.ones(table.rows)], axis=1)
    return x, np.asarray(table.columns[target], dtype=np.float64)
