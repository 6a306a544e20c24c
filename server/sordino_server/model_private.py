"""The Plans of a private run: gradients of rows, the optimizer's step, and the evaluation; and its guarantee."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from sordino_common.plan.spec import TensorSpec
from sordino_server.guarantee import Guarantee, guarantee_of
from sordino_server.job import Job
from sordino_server.model import Traced, optimizer_of, trace_job
from sordino_server.rounds.private_steps import ServerStep
from sordino_server.rounds.roll import Program
from sordino_server.trace.row_gradients import apply_plan, gradient_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateTraced:
    """`traced`: Plans, first parameters and names; its training Plan gives gradients of rows if the unit is record.
    The optimizer's step: `apply`, where devices take it and add the noise of records themselves, or `step`, where the
    server does; neither for the unit device alone.
    `trainable[k]`: whether parameter k is trained."""

    traced: Traced
    guarantee: Guarantee
    apply: Program | None
    step: ServerStep | None
    trainable: tuple[bool, ...]


def trace_private(job: Job, model: nn.Module) -> PrivateTraced:
    """Raises `PlanError` naming module and line for what no device could run, or would not prove to be private."""
    spec = job.spec
    traced = trace_job(job, model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainable = tuple(name in trained for name in traced.names)
    sizes = [param.size for param in traced.params]
    guarantee = guarantee_of(
        job,
        gradient_length=sum(size for size, used in zip(sizes, trainable, strict=True) if used),
        update_length=sum(sizes),
    )
    if spec.privacy is None or spec.privacy.unit == "device":
        return PrivateTraced(traced=traced, guarantee=guarantee, apply=None, step=None, trainable=trainable)
    x = TensorSpec(dtype="float32", shape=spec.data.x_shape)
    y = TensorSpec(dtype="int64" if spec.loss == "cross_entropy" else "float32", shape=())
    gradient = gradient_plan(model, loss=spec.loss, x=x, y=y, batch_rows=spec.train.batch_rows)
    apply = apply_plan(model, optimizer=optimizer_of(spec))
    names = tuple(entry.name for entry in gradient.plan.inputs if entry.role == "param")
    assert names == traced.names, "both Plans list the model's parameters in its own order"
    programs = replace(traced.programs, train=Program(plan=gradient.data, plan_id=gradient.plan_id))
    return PrivateTraced(
        traced=replace(traced, programs=programs),
        guarantee=guarantee,
        apply=Program(plan=apply.data, plan_id=apply.plan_id) if spec.privacy.noise_at == "device" else None,
        step=None if spec.privacy.noise_at == "device" else ServerStep.of(apply.plan),
        trainable=trainable,
    )
