"""The user's model file: imported here, on the user's own machine, and traced into the run's two Plans.

Errors name the line of the user's file. Nothing but the Plans leaves this process.
"""

from __future__ import annotations

import hashlib
import importlib.util
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from sordino_common.errors import ConfigError
from sordino_common.plan.spec import TensorSpec
from sordino_server.job import Job, JobSpec, SgdSpec
from sordino_server.rounds.effects import Params
from sordino_server.rounds.fedavg import Programs
from sordino_server.rounds.roll import Program
from sordino_server.trace.optimizers import Adam, Sgd
from sordino_server.trace.steps import evaluation_plan, training_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What a run needs of the model: its Plans, its first parameters, their names in the state dict."""

    programs: Programs
    params: Params
    names: tuple[str, ...]
    parameters: int  # scalars, all told


def make_model(job: Job) -> nn.Module:
    """The job's model, initialised from the job's seed (the caller's generator is left as it was)."""
    module = _import(job)
    factory = getattr(module, job.spec.model.factory, None)
    if not callable(factory):
        raise job.error("model.factory", f"{job.model_file} has no function {job.spec.model.factory}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.spec.train.seed)
        try:
            model = factory(**job.spec.model.args)
        except Exception as error:
            call = f"{job.spec.model.factory}(...)"
            if isinstance(error, TypeError) and error.__traceback__ is not None and error.__traceback__.tb_next is None:
                raise job.error("model.args", f"{call} in {job.model_file} does not take them: {error}") from error
            raise _at_line(job, error, f"{call} failed") from error
    if not isinstance(model, nn.Module):
        raise job.error("model.factory", f"returned {type(model).__name__}, expected a torch.nn.Module")
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        if not bool(torch.isfinite(value).all()):
            raise job.error("model", f"parameter {name} starts with values that are not finite")
    return model


def trace_job(job: Job, model: nn.Module) -> Traced:
    """Both Plans. Raises `PlanError` naming module and line for what no device could run."""
    spec = job.spec
    x = TensorSpec(dtype="float32", shape=spec.data.x_shape)
    y = TensorSpec(dtype="int64" if spec.loss == "cross_entropy" else "float32", shape=())
    batch_rows = spec.train.batch_rows
    evaluate_rows = spec.evaluate.batch_rows or batch_rows
    step = training_plan(model, loss=spec.loss, optimizer=optimizer_of(spec), x=x, y=y, batch_rows=batch_rows)
    evaluate = evaluation_plan(model, loss=spec.loss, x=x, y=y, batch_rows=evaluate_rows)
    state = model.state_dict()
    names = tuple(entry.name for entry in step.plan.inputs if entry.role == "param")
    # A copy: the model stays usable, and nobody else writes into the run's parameters.
    params = tuple(state[name].detach().cpu().numpy().copy() for name in names)
    return Traced(
        programs=Programs(
            train=Program(plan=step.data, plan_id=step.plan_id),
            evaluate=Program(plan=evaluate.data, plan_id=evaluate.plan_id),
            evaluate_rows=evaluate_rows,
            row_names=tuple(output.name for output in evaluate.plan.outputs),
        ),
        params=params,
        names=names,
        parameters=sum(param.size for param in params),
    )


def optimizer_of(spec: JobSpec) -> Sgd | Adam:
    chosen = spec.optimizer
    if isinstance(chosen, SgdSpec):
        return Sgd(lr=chosen.lr, momentum=chosen.momentum, nesterov=chosen.nesterov, weight_decay=chosen.weight_decay)
    return Adam(lr=chosen.lr, beta1=chosen.beta1, beta2=chosen.beta2, eps=chosen.eps, weight_decay=chosen.weight_decay)


def model_digest(job: Job) -> str:
    """SHA-256 of the model file: a run is only resumed with the model it began with."""
    return hashlib.sha256(job.model_file.read_bytes()).hexdigest()


def _import(job: Job) -> ModuleType:
    path = job.model_file
    spec = importlib.util.spec_from_file_location("sordino_user_model", path)
    if spec is None or spec.loader is None:
        raise job.error("model.file", f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _at_line(job, error, "the model file can't be imported") from error
    return module


def _at_line(job: Job, error: Exception, what: str) -> ConfigError:
    """The innermost line of the user's file that led to `error`."""
    path = job.model_file
    line = 0
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename) == path:
        line = error.lineno or 0
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename) == path:
            line = frame.lineno or line
    where = f"{path}:{line}" if line else f"{path}"
    return ConfigError(f"{where}: {what}: {type(error).__name__}: {error}")
