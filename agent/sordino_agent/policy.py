"""What this device lets a server ask of it. Deny by default: what the policy does not name is refused.

A command from the server is a request. The checks here need no data and run before any work starts; the minimum number
of rows is checked where the rows are (`compute.py`). Every refusal says which setting to change on the device.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from sordino_agent.spdz.policy import SpdzPolicy
from sordino_common.errors import PolicyRefusal
from sordino_common.messages.base import Name
from sordino_common.privacy.mechanism import Mechanism

JobKind = Literal[
    "describe",
    "moments",
    "train",
    "evaluate",
    "tensors",
    "aggregate",
    "statistics",
    "help",
    "spdz-compute",
    "spdz-data",
    "spdz-model",
]
JOB_KINDS: Final[tuple[JobKind, ...]] = (
    *("describe", "moments", "train", "evaluate", "tensors"),
    *("aggregate", "statistics", "help"),
    *("spdz-compute", "spdz-data", "spdz-model"),
)
DataJob = Literal["moments", "train", "evaluate", "tensors", "aggregate", "statistics", "spdz-data"]

PlanHex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The device owner's rules.

    `jobs`: kinds of command that are served. `plans`: "any", or the SHA-256 (hex) of every Plan that may run here.
    With "any" a hostile server can write a Plan whose update encodes rows (see SECURITY.md); pin Plans where that
    matters. `datasets`: for which jobs each dataset may be used; a dataset that is not named is open to all of `jobs`
    if the mapping is absent, and closed if it is there. `fetch`: which tensors may leave,
    stored ones by `tensor-get`, shared ones when they open: "none"; "sent", those in which no row of a dataset is;
    "any"; or the Plans (hex) whose outputs may leave, where a tensor in which rows are leaves only if all Plans between
    the rows and it are listed. Rows themselves never leave. `min_rows`: fewest rows that an answer may be formed over.
    `exact_evaluation`: whether sums over held-out rows may leave without noise although the dataset has a privacy
    budget, which does not cover them then. `min_noise_multiplier`: the least noise (σ over sensitivity) of a private
    release. `aggregate`: contribute to secure sums, of at least `min_cohort` contributors and with at least
    `min_helpers` helpers; `statistics`: to sums of counts, moments, products and histograms of its columns, which no
    Plan describes; `help`: be a helper, for at least as many contributors. `spdz-compute`: be a party of
    sessions on shares; `spdz-data`: input rows, or stored tensors, into them, masked; `spdz-model`: input the first
    parameters, masked; `spdz`: which sessions. `models`: "any", or the names of the models that may be input."""

    jobs: tuple[JobKind, ...] = ("describe", "moments", "train", "evaluate", "aggregate")
    plans: Literal["any"] | tuple[PlanHex, ...] = ()
    datasets: dict[Name, tuple[DataJob, ...]] | None = None
    fetch: Literal["none", "sent", "any"] | tuple[PlanHex, ...] = "none"
    min_rows: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)] = 10
    exact_evaluation: bool = False
    min_noise_multiplier: Annotated[float, msgspec.Meta(ge=0.0, le=1e6)] = 0.0
    min_cohort: Annotated[int, msgspec.Meta(ge=2, le=20_000)] = 5
    min_helpers: Annotated[int, msgspec.Meta(ge=1, le=3)] = 1
    models: Literal["any"] | tuple[Name, ...] = ()
    spdz: SpdzPolicy = SpdzPolicy()

    def require_job(self, kind: JobKind) -> None:
        """Raise `PolicyRefusal` unless this kind of job is served here."""
        if kind not in self.jobs:
            served = ", ".join(self.jobs) or "none"
            raise PolicyRefusal(
                f"jobs of kind `{kind}` are not served here (served: {served}); its owner can add it to policy.jobs"
            )

    def require_keeping(self) -> None:
        """Raise `PolicyRefusal` unless tensors may be kept here: a server's, or masked values of a committee."""
        if "spdz-compute" not in self.jobs:
            self.require_job("tensors")

    def require_plan(self, plan_id: bytes) -> None:
        """Raise `PolicyRefusal` unless the Plan with this SHA-256 may run here."""
        if self.plans != "any" and plan_id.hex() not in self.plans:
            raise PolicyRefusal(
                f"Plan {plan_id.hex()} is not among the {len(self.plans)} Plans that may run here; "
                "the device's owner can add it to policy.plans"
            )

    def require_dataset(self, dataset: str, job: DataJob) -> None:
        """Raise `PolicyRefusal` unless `dataset` may be used for `job`."""
        self.require_job(job)
        if self.datasets is not None and job not in self.datasets.get(dataset, ()):
            raise PolicyRefusal(
                f"dataset {dataset!r} may not be used for `{job}` here; its owner can allow it in policy.datasets"
            )

    def require_noise(self, mechanism: Mechanism) -> None:
        """Raise `PolicyRefusal` if one release would have less noise for its sensitivity than the owner demands."""
        if mechanism.noise_multiplier < self.min_noise_multiplier:
            raise PolicyRefusal(
                f"a noise multiplier of {mechanism.noise_multiplier:.4g} (sigma² {mechanism.sigma_squared}, "
                f"sensitivity² {mechanism.sensitivity_squared}); this device demands {self.min_noise_multiplier:g} "
                "(policy.min_noise_multiplier)"
            )

    def require_model(self, model: str) -> None:
        """Raise `PolicyRefusal` unless `model` may be input, masked, into a session on shares."""
        self.require_job("spdz-model")
        if self.models != "any" and model not in self.models:
            raise PolicyRefusal(
                f"model {model!r} may not be input into a session here; its owner can allow it in policy.models"
            )

    def shows_dataset(self, dataset: str) -> bool:
        """Whether a description lists `dataset`: only if some job may use it."""
        return self.datasets is None or bool(self.datasets.get(dataset))

    def require_fetch(self, made_by: bytes | None, lineage: frozenset[bytes] | None) -> None:
        """Raise `PolicyRefusal` unless a tensor may leave that the Plan `made_by` made (None: the server put it), with
        the rows of a dataset in it if `lineage`, the Plans between them and it, is not None."""
        if lineage is not None and not lineage:
            raise PolicyRefusal(
                "these are rows of a dataset, which never leave the device, whatever its policy; compute an aggregate "
                "of them there"
            )
        if self.fetch == "any" or (self.fetch == "sent" and lineage is None):
            return
        if lineage is not None:
            missing = [plan.hex() for plan in sorted(lineage) if plan.hex() not in self.fetch]
            if self.fetch not in ("none", "sent") and not missing:
                return
            listed = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            raise PolicyRefusal(
                f"this tensor was computed from rows of a dataset; the device's owner can let it leave by listing, in "
                f"policy.fetch, all Plans that made it: {listed}"
            )
        if made_by is not None and made_by.hex() in self.fetch:
            return
        raise PolicyRefusal("this tensor may not leave the device; the device's owner can allow it in policy.fetch")


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds on what one device spends. The defaults suit a board with 1 GB of memory.

    `memory_bytes`: what one task may hold in the worker (rows, Plan's peak, parameters). `plan_seconds`: longest task.
    `payload_bytes`: largest command, answer or message of a session on shares. `store_bytes`, `plans_bytes`,
    `results_bytes`: what the daemon keeps of tensors, Plans, and answers already given. `queue`: tasks waiting or
    running. `threads`: of the worker's linear algebra (with 1, the same command gives the same bytes). `idle_s`: an
    idle worker process ends after this time. `spdz_bytes`: preprocessing that waits for its step. `sessions`: sessions
    on shares at a time."""

    memory_bytes: Annotated[int, msgspec.Meta(ge=1 << 20, le=1 << 50)] = 256 << 20
    plan_seconds: Annotated[float, msgspec.Meta(gt=0.0, le=86_400.0)] = 300.0
    payload_bytes: Annotated[int, msgspec.Meta(ge=1 << 10, le=1 << 40)] = 64 << 20
    store_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)] = 32 << 20
    plans_bytes: Annotated[int, msgspec.Meta(ge=1 << 10, le=1 << 40)] = 16 << 20
    results_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] = 8 << 20
    queue: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 8
    threads: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    idle_s: Annotated[float, msgspec.Meta(ge=0.0, le=86_400.0)] = 60.0
    spdz_bytes: Annotated[int, msgspec.Meta(ge=1 << 10, le=1 << 40)] = 64 << 20
    sessions: Annotated[int, msgspec.Meta(ge=0, le=8)] = 4
