"""What privacy for each record costs: a step of DP-SGD against a plain one, by the same interpreter in the same run.

*What the bar counts* is `dp/plain`: what a device does with a batch between two draws of noise (the gradient Plan,
norms, clipping, quantisation, the exact integer sum, and the optimizer's step by the apply Plan) over the training Plan
of the same job on the same batch. Its parts, each run by itself, are in plain steps as well; they add up to less, for
each leaves the next one a cache full of its own. `+ noise` is dp/plain when the device draws its own noise each step.
The sampler and the noise do not depend on the batch: they grow with the rows of the split and with the parameters.

Opacus (eager PyTorch, one thread) is run beside it if it is installed, its DP step against eager PyTorch's own plain
step: `pip install --no-deps opacus opt-einsum scipy`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import best_seconds
from torch import nn

from sordino_agent.private_step import Applier, StepNoise, gradient_layout
from sordino_agent.private_sum import RowSum
from sordino_common.plan.interpreter import NumpyProgram
from sordino_common.plan.spec import TensorSpec
from sordino_server.trace.optimizers import Sgd
from sordino_server.trace.row_gradients import apply_plan, gradient_plan
from sordino_server.trace.steps import training_plan
from sordino_server.trace.subject import examples

CLIP_NORM, GRID_BITS = 1.0, 16
SIGMA_SQUARED = (1 << GRID_BITS) ** 2  # noise multiplier 1
OPTIMIZER = Sgd(lr=0.1)
ROUNDS, SLICE_S = 150, 0.0008  # short slices: on a busy machine a long one is always disturbed


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    model: nn.Module
    loss: str
    x: TensorSpec
    y: TensorSpec
    batch: int
    at_most: float  # the ratio that is asked for


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(13, 64), nn.Sigmoid(), nn.Linear(64, 1))


def cnn() -> nn.Module:
    path = Path(__file__).parent.parent / "examples" / "models" / "cnn.py"
    spec = importlib.util.spec_from_file_location("example_cnn", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_model()


def tasks() -> list[Task]:
    x, y = TensorSpec("float32", (13,)), TensorSpec("float32", ())
    images, labels = TensorSpec("float32", (1, 28, 28)), TensorSpec("int64", ())
    return [
        Task(name="mlp 13-64-1", model=mlp(), loss="mse", x=x, y=y, batch=32, at_most=1.25),
        Task(name="mlp 13-64-1", model=mlp(), loss="mse", x=x, y=y, batch=256, at_most=1.25),
        Task(name="cnn 28x28", model=cnn(), loss="cross_entropy", x=images, y=labels, batch=32, at_most=2.0),
    ]


def steps(task: Task) -> dict[str, Callable[[], object]]:
    """The plain step, the DP step, and the DP step's parts."""
    what: Any = {"loss": task.loss, "x": task.x, "y": task.y, "batch_rows": task.batch}
    plain = NumpyProgram(training_plan(task.model, optimizer=OPTIMIZER, **what).plan)
    gradient = NumpyProgram(gradient_plan(task.model, **what).plan)
    layout = gradient_layout(gradient.plan)
    sums = RowSum(layout.gradients, clip_norm=CLIP_NORM, grid_bits=GRID_BITS, most_rows=1 << 20)
    applier = Applier(NumpyProgram(apply_plan(task.model, optimizer=OPTIMIZER).plan), gradient.plan, layout)
    params: list[Any] = [parameter.detach().numpy() for parameter in task.model.parameters()]
    x, y = (batch.numpy() for batch in examples(task.x, task.y, task.batch))
    outs = gradient.run([*params, x, y], own=False, quiet=True)
    steps_noise = StepNoise(SIGMA_SQUARED, sums.length, 1 << 40)
    everybody = np.ones(task.batch, dtype=np.bool_)

    def clip_and_sum() -> Any:
        sums.add(outs, everybody)
        return sums.take()

    now: list[Any] = [params]

    def apply(gradient: Any) -> None:
        # By 0, so that all steps are alike: from trained parameters come gradients of other sizes, or subnormal ones.
        now[0] = applier.step(now[0], gradient, 0.0)

    def private(noise: bool) -> None:
        sums.add(gradient.run([*now[0], x, y], own=False, quiet=True), everybody)
        total = sums.take()
        if noise:
            total += steps_noise.take()
        apply(total)

    total = clip_and_sum()
    return {
        "plain": lambda: plain.run([*params, x, y], quiet=True),
        "private": lambda: private(False),
        "noised": lambda: private(True),
        "gradients": lambda: gradient.run([*params, x, y], own=False, quiet=True),
        "clip, sum": clip_and_sum,
        "apply": lambda: apply(total),
        "noise": steps_noise.take,
    }


def opacus_steps(task: Task) -> dict[str, Callable[[], object]]:
    """Eager PyTorch's plain step and Opacus's DP step without noise; nothing if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus import GradSampleModule
            from opacus.optimizers import DPOptimizer
    except ImportError:
        return {}
    x, y = examples(task.x, task.y, task.batch)
    criterion: Any = nn.CrossEntropyLoss() if task.loss == "cross_entropy" else lambda p, t: ((p[:, 0] - t) ** 2).mean()
    factory = cnn if task.loss == "cross_entropy" else mlp

    def step_of(model: nn.Module, optimizer: Any) -> Callable[[], object]:
        def step() -> None:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

        return step

    own = factory()
    private = GradSampleModule(factory())
    optimizer = DPOptimizer(
        torch.optim.SGD(private.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=task.batch,
    )
    return {
        "eager": step_of(own, torch.optim.SGD(own.parameters(), lr=0.1)),
        "opacus": step_of(private, optimizer),
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # Opacus hooks modules in a way that PyTorch warns of
    print("times the plain step of the same kind\n")
    print("model        batch  dp/plain  at most  + noise   gradients  clip,sum  apply  noise   plain us  opacus/eager")
    for task in tasks():
        own, theirs = steps(task), opacus_steps(task)
        with np.errstate(all="ignore"):  # as the device does, once for all steps
            seconds = best_seconds({**own, **theirs}, rounds=ROUNDS, slice_s=SLICE_S)
        part = {name: seconds[name] / seconds["plain"] for name in own}
        opacus = f"{seconds['opacus'] / seconds['eager']:.2f}" if theirs else "not installed"
        print(
            f"{task.name:12s} {task.batch:5d} {part['private']:9.2f} {task.at_most:8.2f} {part['noised']:8.2f} "
            f"{part['gradients']:11.2f} {part['clip, sum']:9.2f} {part['apply']:6.2f} {part['noise']:6.2f} "
            f"{seconds['plain'] * 1e6:10.0f} {opacus:>13s}"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
