"""What privacy for each record costs: a step of DP-SGD against a plain one, by the same interpreter in the same run.

*What the bar counts* is `dp/plain`: what a device does with a batch between two draws of noise (the gradient Plan,
norms, clipping, quantisation, the exact integer sum, and the optimizer's step by the apply Plan) over the training Plan
of the same job on the same batch. Its parts, each run by itself, are in plain steps as well; they add up to less, for
each leaves the next one a cache full of its own. `noise` is what the device's own noise costs a step; small models draw
for many steps at once, so it is the time of such a draw, shared among them; it does not depend on the batch.

*What a device pays at a low rate* is more, and `sampled` says it: a whole step on 10 B rows of which each is taken with
probability 1/10, so that B are expected, as many as the plain step has: coins, batches, sums, noise, optimizer. Rows
keep their places (`private_sum`), so the fullest place decides how many batches there are, beside it for a middling
sample. At the full rate there is a batch for each B rows, and none more.

*The floor* is measured, too, where all gradients are outer products (`fewest_calls`): the two Plans, and between them
the fewest NumPy calls on these very arrays that clip rows and add them exactly, L layers, written down one after the
other, without a check, a method or a choice. Each is there for a reason:

    2L     factors become float64: float32 holds no sum of products of integers of more than 9 bits
    L      the ones beside each right factor, which give the bias: one column of the product instead of a pass
    2L     Σ squares of each factor: a row is scaled by its norm, so that this comes first
    L      N, each row's norm²: a product for each layer, and their sum
    4      √(K / √max(N, C²)): two powers of one half and a quotient (`power` is one call and takes longer)
    2      scaled, rounded toward zero: no ufunc does both, and integers have no fast product of matrices
    L      products of matrices, exact in float64
    2      int64 from here on; shifted to the grid

What the device does besides, and this does not: it takes the bound of each row from its very scale and holds it against
the limit (3 calls), counts rows and leaves out those that are not in the sample, and puts biases and weights in the
Plan's order (1). What `dp/plain` has above the floor is this, and Python. The floor is no proof: it is what is left if
a step is two Plans with an exact sum of clipped outer products between them, by NumPy's calls, and no call is wasted.

Opacus (eager PyTorch, one thread) is run beside it if it is installed, its DP step against eager PyTorch's own plain
step: `pip install --no-deps opacus opt-einsum scipy`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import importlib.util
import random
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

from sordino_agent.private_step import AHEAD, Applier, PrivateSums, StepNoise, gradient_layout
from sordino_agent.private_sum import RowSum, batches_of, poisson_sample
from sordino_common.plan.gradients import OuterRows, RowGradients, WholeRows
from sordino_common.plan.interpreter import NumpyProgram
from sordino_common.plan.spec import TensorSpec
from sordino_server.trace.optimizers import Sgd
from sordino_server.trace.row_gradients import apply_plan, gradient_plan
from sordino_server.trace.steps import training_plan
from sordino_server.trace.subject import examples

CLIP_NORM, GRID_BITS = 1.0, 16
SIGMA_SQUARED = (1 << GRID_BITS) ** 2  # noise multiplier 1
RATE = 10  # a row in so many is taken
THRESHOLD = (1 << 32) // RATE
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


def steps(task: Task) -> tuple[dict[str, Callable[[], object]], int]:
    """The plain step, the DP step, its parts and its floor; and how many steps' noise the part `noise` takes."""
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
    fewest = fewest_calls(layout.gradients, outs, GRID_BITS)
    everybody = np.ones(task.batch, dtype=np.bool_)

    def clip_and_sum() -> Any:
        sums.add(outs, everybody)
        return sums.take()

    now: list[Any] = [params]

    def apply(gradient: Any) -> None:
        # By 0, so that all steps are alike: from trained parameters come gradients of other sizes, or subnormal ones.
        now[0] = applier.step(now[0], gradient, 0.0)

    def private() -> None:
        sums.add(gradient.run([*now[0], x, y], own=False, quiet=True), everybody)
        apply(sums.take())

    def floor() -> None:
        assert fewest is not None
        apply(fewest(gradient.run([*now[0], x, y], own=False, quiet=True)))

    at_once = max(1, AHEAD // sums.length)

    def noise() -> None:
        for _ in range(at_once):
            steps_noise.take()

    x_all, y_all = (rows.numpy() for rows in examples(task.x, task.y, RATE * task.batch))
    coins = middling_coins(task.batch)
    drawn = PrivateSums(
        gradient,
        layout,
        x=x_all,
        y=y_all,
        clip_norm=CLIP_NORM,
        grid_bits=GRID_BITS,
        threshold=THRESHOLD,
        random=lambda count: (os.urandom(count), coins)[1],
    )

    def sampled() -> None:
        total = drawn.draw(now[0])
        total += steps_noise.take()
        apply(total)

    total = clip_and_sum()
    made: dict[str, Callable[[], object]] = {
        "plain": lambda: plain.run([*params, x, y], quiet=True),
        "private": private,
        "gradients": lambda: gradient.run([*params, x, y], own=False, quiet=True),
        "clip, sum": clip_and_sum,
        "apply": lambda: apply(total),
        "noise": noise,
        "sampled": sampled,
    }
    return made if fewest is None else {**made, "floor": floor}, at_once


def batches_with(coins: bytes, batch: int) -> int:
    sample = poisson_sample(RATE * batch, THRESHOLD, lambda _: coins)
    return sum(1 for _ in batches_of(sample, batch, RATE * batch))


def middling_coins(batch: int) -> bytes:
    """Coins of a sample that takes as many batches as half of all samples do at most."""
    many = [random.Random(seed).randbytes(4 * RATE * batch) for seed in range(99)]
    return sorted(many, key=lambda coins: batches_with(coins, batch))[len(many) // 2]


def fewest_calls(layout: RowGradients, outs: list[Any], grid_bits: int) -> Callable[[list[Any]], Any] | None:
    """The calls of the module's text: from a run's outputs to int64[P], of weights with their biases beside them."""
    pairs = [block for block in layout.blocks if isinstance(block, OuterRows)]
    if not all(isinstance(block, OuterRows) or block.rides is not None for block in layout.blocks):
        return None
    riders = {block.rides for block in layout.blocks if isinstance(block, WholeRows)}
    sources = [block.left for block in pairs] + [block.right for block in pairs]
    widths = [block.shape[0] for block in pairs] + [block.shape[1] + (block.left in riders) for block in pairs]
    whole = np.ones((layout.rows, sum(widths)))
    factors = np.split(whole, np.cumsum(widths)[:-1], axis=1)
    ones = [factor[:, outs[place].shape[1] :] for place, factor in zip(sources, factors, strict=True)]
    ones = [part for part in ones if part.size]
    loads = [(place, factor[:, : outs[place].shape[1]]) for place, factor in zip(sources, factors, strict=True)]
    norms = np.zeros((2 * len(pairs), layout.rows))
    squares, (first, *more) = list(zip(factors, norms, strict=True)), norms[: len(pairs)]
    others, scale = norms[len(pairs) :], np.zeros((layout.rows, 1))
    z = scale[:, 0]
    ends = np.cumsum(
        [left.shape[1] * right.shape[1] for left, right in zip(factors, factors[len(pairs) :], strict=False)]
    )
    flat = np.zeros(ends[-1])
    total = np.zeros(ends[-1], dtype=np.int64)
    products = [
        (left.T, right, place.reshape(left.shape[1], right.shape[1]))
        for left, right, place in zip(factors, factors[len(pairs) :], np.split(flat, ends[:-1]), strict=False)
    ]

    def calls(outs: list[Any]) -> Any:
        for place, part in loads:
            part[:] = outs[place]
        for part in ones:
            part.fill(1.0)
        for factor, sums in squares:
            np.vecdot(factor, factor, out=sums)
        np.multiply(norms[: len(pairs)], others, out=norms[: len(pairs)])
        for one in more:
            np.add(first, one, out=first)
        np.maximum(first, CLIP_NORM, out=z)
        np.sqrt(z, out=z)
        np.divide(4.0**20, z, out=z)
        np.sqrt(z, out=z)
        np.multiply(whole, scale, out=whole)
        np.trunc(whole, out=whole)
        for left, right, place in products:
            np.matmul(left, right, out=place)
        total[:] = flat
        np.right_shift(total, 40 - grid_bits, out=total)
        return total

    return calls


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
    print(
        "model        batch  dp/plain  at most  floor   noise   gradients  clip,sum  apply    sampled   plain us  "
        "opacus/eager"
    )
    for task in tasks():
        (own, at_once), theirs = steps(task), opacus_steps(task)
        with np.errstate(all="ignore"):  # as the device does, once for all steps
            seconds = best_seconds({**own, **theirs}, rounds=ROUNDS, slice_s=SLICE_S)
        seconds["noise"] /= at_once
        part = {name: seconds[name] / seconds["plain"] for name in own}
        floor = f"{part['floor']:.2f}" if "floor" in part else "-"
        batches = batches_with(middling_coins(task.batch), task.batch)
        sampled = f"{part['sampled']:.1f} in {batches}"
        opacus = f"{seconds['opacus'] / seconds['eager']:.2f}" if theirs else "not installed"
        print(
            f"{task.name:12s} {task.batch:5d} {part['private']:9.2f} {task.at_most:8.2f} {floor:>6s} "
            f"{part['noise']:7.2f} {part['gradients']:11.2f} {part['clip, sum']:9.2f} {part['apply']:6.2f} "
            f"{sampled:>10s} {seconds['plain'] * 1e6:10.0f} {opacus:>13s}"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
