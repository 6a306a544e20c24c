"""A private job's run: which generator, what is counted, what the summary says of it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from torch import nn

from sordino_common.errors import LocalError
from sordino_server.job import Job
from sordino_server.model_private import PrivateTraced, trace_private
from sordino_server.rounds.effects import Checkpoint, Effect, Result
from sordino_server.rounds.fedavg import federated_averaging
from sordino_server.rounds.fedavg_secure import secure_averaging
from sordino_server.rounds.private import Gradients, Recipe, Updates, private_training
from sordino_server.rounds.releases import LocalNoise, Releases
from sordino_server.rounds.spdz import World


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateRun:
    """`releases` is shared with the rounds: after them it has what was spent."""

    job: Job
    private: PrivateTraced
    releases: Releases
    world: World | None

    @property
    def names(self) -> tuple[str, ...]:
        return self.private.traced.names

    @property
    def security(self) -> str:
        """For people: what the server sees, and what is promised."""
        secure, label = self.job.spec.secure, self.private.guarantee.label
        if secure is None:
            return f"the server sees each device's update, noised on the device; {label}"
        helpers = f"{secure.helpers} helper{'s' if secure.helpers != 1 else ''}"
        return f"secure aggregation, {helpers}, sums over {secure.minimum} devices or more; {label}"

    def rounds(self, run: str, resumed: Checkpoint | None) -> Generator[Effect, Result, Checkpoint]:
        """All rounds, every release counted before it begins."""
        return self.releases.counted(self._rounds(run, resumed))

    def summary(self, rounds: int) -> dict[str, Any]:
        """`privacy`, from the releases that were begun."""
        code = {} if self.job.spec.secure is not None else {"security": "local-noise"}
        return {**code, "privacy": self.private.guarantee.summary(begun=self.releases.begun, rounds=rounds)}

    def spent(self) -> dict[str, Any]:
        """`privacy` as of now."""
        return self.private.guarantee.summary(begun=self.releases.begun, rounds=0)

    def _rounds(self, run: str, resumed: Checkpoint | None) -> Generator[Effect, Result, Checkpoint]:
        spec, traced, noise = self.job.spec, self.private.traced, self._local_noise()
        if noise is not None and spec.secure is None:
            return federated_averaging(
                spec, run=run, programs=traced.programs, params=traced.params, resumed=resumed, private=noise
            )
        if self.world is None:
            raise LocalError("a private run over secure sums needs a world")
        if noise is not None and self.private.guarantee.second is None:
            return secure_averaging(
                spec,
                run=run,
                programs=traced.programs,
                params=traced.params,
                world=self.world,
                resumed=resumed,
                private=noise,
            )
        return private_training(
            spec,
            run=run,
            programs=traced.programs,
            extra=() if noise is None else (noise.apply,),
            params=traced.params,
            recipe=self._recipe(noise),
            world=self.world,
            releases=self.releases,
            resumed=resumed,
        )

    def _local_noise(self) -> LocalNoise | None:
        """If devices add the noise of records."""
        apply = self.private.apply
        if apply is None:
            return None
        record = self.private.guarantee.record_terms(apply.plan_id)
        return LocalNoise(record=record, apply=apply, releases=self.releases)

    def _recipe(self, noise: LocalNoise | None) -> Recipe:
        guarantee, step = self.private.guarantee, self.private.step
        first, second = guarantee.first, guarantee.second
        if step is not None:
            return Gradients(
                clip_norm=first.clip,
                grid_bits=guarantee.grid_bits,
                sampling_threshold=first.one.sampling_threshold,
                sigma_squared=first.one.sigma_squared,
                step=step,
            )
        device = first if second is None else second
        return Updates(
            clip_norm=device.clip,
            grid_bits=guarantee.grid_bits,
            sigma_squared=device.one.sigma_squared,
            trainable=self.private.trainable,
            record=None if noise is None else noise.record,
        )


def private_run(job: Job, model: nn.Module, world: World | None, *, begun: int) -> PrivateRun:
    """`begun`: releases of the run before this process. Raises `PlanError`, and `ConfigError` for a
    target that no noise keeps."""
    private = trace_private(job, model)
    releases = Releases(planned=private.guarantee.first.releases, begun=begun)
    return PrivateRun(job=job, private=private, releases=releases, world=world)
