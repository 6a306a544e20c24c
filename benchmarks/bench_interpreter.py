"""A training step of the three example models: the Plan by NumPy, and the Plan by torch, against eager PyTorch.

One thread for all. What it is held against is eager PyTorch's own step: forward, backward, optimizer.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys
from pathlib import Path

import torch
from step_inputs import step_inputs
from timing import best_seconds

from sordino_common.plan.executors import load_program
from sordino_common.plan.plan import decode_plan
from sordino_server.job import load_job
from sordino_server.model import make_model, optimizer_of, trace_job

EXAMPLES = Path(__file__).parent.parent / "examples"
LOSSES = {
    "mse": lambda prediction, y: torch.nn.functional.mse_loss(prediction.reshape(-1), y),
    "bce_with_logits": lambda p, y: torch.nn.functional.binary_cross_entropy_with_logits(p.reshape(-1), y),
    "cross_entropy": torch.nn.functional.cross_entropy,
}


def main() -> None:
    torch.set_num_threads(1)
    print("job                  nodes  numpy/eager  torch plan/eager   peak bytes   flops/step")
    for name in ("boston-fedavg", "pima-fedavg", "mnist-cnn-fedavg"):
        job = load_job(EXAMPLES / f"{name}.yaml")
        model = make_model(job)
        traced = trace_job(job, model)
        plan = decode_plan(traced.programs.train.plan)
        inputs = step_inputs(plan, traced)
        x, y = (torch.from_numpy(values) for values in inputs[-2:])
        chosen = optimizer_of(job.spec)
        optimizer = torch.optim.SGD(model.parameters(), lr=chosen.lr, momentum=getattr(chosen, "momentum", 0.0))
        if hasattr(chosen, "beta1"):
            optimizer = torch.optim.Adam(model.parameters(), lr=chosen.lr)
        loss_of = LOSSES[job.spec.loss]

        def eager(model=model, x=x, y=y, optimizer=optimizer, loss_of=loss_of) -> None:
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            optimizer.step()

        programs = {kind: load_program(plan, kind) for kind in ("numpy", "torch")}
        seconds = best_seconds(
            {
                "eager": eager,
                "numpy": lambda programs=programs, inputs=inputs: programs["numpy"].run(inputs),
                "torch": lambda programs=programs, inputs=inputs: programs["torch"].run(inputs),
            }
        )
        cost = programs["numpy"].cost
        print(
            f"{name:20s} {len(plan.nodes):5d}  {seconds['numpy'] / seconds['eager']:10.2f}"
            f"  {seconds['torch'] / seconds['eager']:15.2f}   {cost.peak_bytes:11,d}  {cost.flops:11,d}"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
