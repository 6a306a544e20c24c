"""A thousand simulated agents in one process, each with one local step of a model of about 10,000 parameters.

s/round        wall time of the best measured round, for orientation only; it depends on the machine
x steps        that time over the same thousand steps by the NumPy interpreter, with nothing around them
kB/agent       what this process grows by per agent: keys, rows, sessions, and the server's part of it
bytes ratio    packet bytes both ways over the parameters' own bytes both ways (exact)
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import itertools
import tempfile
import time
from pathlib import Path

from step_inputs import step_inputs
from timing import best_seconds

from sordino_common.plan.executors import load_program
from sordino_common.plan.plan import decode_plan
from sordino_server.job import load_job
from sordino_server.model import make_model, trace_job
from sordino_server.rounds.events import Event, RoundDone
from sordino_sim.runner import simulate

AGENTS = 1_000
MODEL = """
from torch import nn

def make_model():
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(196, 48), nn.ReLU(), nn.Linear(48, 10))
"""
JOB = f"""
job: thousand
mode: federated
model: {{file: model.py}}
data: {{dataset: mnist, features: [image], shape: [1, 28, 28], target: digit, task: multiclass,
       standardize: given, offset: [0.0], scale: [255.0]}}
loss: cross_entropy
optimizer: {{name: sgd, lr: 0.1}}
train: {{rounds: 5, local_steps: 1, batch_rows: 4, evaluate_every: 0}}
simulation: {{agents: {AGENTS}, data: mnist, profile: pi4}}
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.py").write_text(MODEL, "utf-8")
        path = Path(folder) / "job.yaml"
        path.write_text(JOB, "utf-8")
        job = load_job(path)
        traced = trace_job(job, make_model(job))
        plan = decode_plan(traced.programs.train.plan)
        program, inputs = load_program(plan), step_inputs(plan, traced)
        step_s = best_seconds({"step": lambda: program.run(inputs)})["step"]
        marks: list[float] = []
        records = []

        def observe(event: Event) -> None:
            if isinstance(event, RoundDone):
                marks.append(time.perf_counter())
                records.append(event.record)

        done = simulate(job, observer=observe, with_baseline=False)
    # The first round also sends the Plan and sets sessions up; the last one also evaluates.
    best = min(after - before for before, after in itertools.pairwise(marks[:-1]))
    parameters = sum(param.size for param in traced.params)
    moved = 2 * 4 * parameters * AGENTS
    print("agents  parameters  answered   s/round   x steps   kB/agent   bytes ratio")
    print(
        f"{AGENTS:6d}  {parameters:10,d}  {sum(s.outcome == 'answered' for s in records[1].shares.values()):8d}"
        f"  {best:8.2f}  {best / (AGENTS * step_s):8.1f}  {done.summary['memory_per_agent_bytes'] / 1e3:9.0f}"
        f"  {(records[1].bytes_up + records[1].bytes_down) / moved:12.4f}"
    )


if __name__ == "__main__":
    main()
